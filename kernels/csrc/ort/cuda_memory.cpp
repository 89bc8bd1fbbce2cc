#include "cuda_memory.h"

#include <dlfcn.h>

#include <cstdint>
#include <cstdlib>

#include "cuda.h"
#include "driver.h"

namespace fssdeploy {
namespace {

using DevicePointer = std::uint64_t;

struct Memory {
  int (*clear)(DevicePointer to, unsigned char value, std::size_t bytes, void* stream);
  int (*copy)(DevicePointer to, DevicePointer from, std::size_t bytes, void* stream);
};

template <typename Function>
void find(void* library, const char* symbol, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, symbol));
  if (function == nullptr) throw DriverError(std::string("this driver of CUDA has no ") + symbol);
}

Memory open() {
  cuda();  // says it well if there is no driver
  const char* named = std::getenv("FSSDEPLOY_LIBCUDA");
  void* library = dlopen(named != nullptr ? named : "libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) throw DriverError("the CUDA driver cannot be opened again");
  Memory memory{};
  find(library, "cuMemsetD8Async", memory.clear);
  find(library, "cuMemcpyDtoDAsync_v2", memory.copy);
  return memory;
}

}  // namespace

void copy_padded(void* stream, void* to, std::size_t padded_bytes, const void* from, std::size_t row_bytes,
                 std::size_t rows) {
  static const Memory memory = open();
  const auto target = reinterpret_cast<DevicePointer>(to), source = reinterpret_cast<DevicePointer>(from);
  cuda().check(memory.clear(target, 0, padded_bytes * rows, stream), "clearing memory");
  for (std::size_t row = 0; row < rows; ++row)
    cuda().check(memory.copy(target + row * padded_bytes, source + row * row_bytes, row_bytes, stream), "copying rows");
}

}  // namespace fssdeploy
