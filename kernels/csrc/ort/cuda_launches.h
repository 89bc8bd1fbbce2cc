// Operations as launches of the kernels that the package ships: the counterpart of the launchers in kernels/*.py, for
// packed tensors on the device. What a kernel was not made for is refused with DriverError.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "driver.h"

namespace fssdeploy {

// `type` is Triton's name of the element type of features ("fp16"). `scratch` gives memory of the device that lives
// until everything that was launched so far on `stream` is done.
struct Launcher {
  KernelLibrary& kernels;
  void* stream;
  std::string type;
  std::function<void*(std::size_t bytes)> scratch;
};

// query (query_rows, channels), support (shots, support_rows, channels).
struct Pair {
  std::int64_t shots, query_rows, support_rows, channels;
};

// A vector of maxima and one of the places where they are.
struct Maxima {
  void* values;   // float32
  void* indices;  // int64
};

// weights (shots, masks, support_rows) of the type of query and support -> maxima (shots, masks, query_rows).
void masked_max(const Launcher& launcher, const Pair& sizes, std::int64_t masks, bool exclude, const void* query,
                const void* support, const void* weights, const Maxima& maxima);

// -> maxima of rows (shots, query_rows) and of columns (shots, support_rows).
void mutual_argmax(const Launcher& launcher, const Pair& sizes, const void* query, const void* support,
                   const Maxima& rows, const Maxima& columns);

// projection (shots, support_rows, outputs) -> output (shots, query_rows, outputs), all of one type.
void correlation_projection(const Launcher& launcher, const Pair& sizes, std::int64_t outputs, const void* query,
                            const void* support, const void* projection, void* output);

}  // namespace fssdeploy
