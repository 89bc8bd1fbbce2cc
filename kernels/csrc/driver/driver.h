// Compiled kernels launched through the CUDA driver, without CUDA at build time and without Python.
//
// A folder that `python -m fssdeploy.kernels.aot --ship FOLDER` wrote holds the kernels and `kernels.txt`, which says
// how each is launched. libcuda.so.1 is opened when the first kernel is launched (FSSDEPLOY_LIBCUDA names another
// file), so a program that contains this code starts on machines without a GPU.
//
//   KernelLibrary kernels("/opt/fssdeploy/kernels");
//   kernels.launch("masked_max_fp16", stream, {query, support, weights, 1, 2, rows, ...});
//
// Arguments are those of the Triton kernel in order, without its constants. launch() refuses what the kernel was not
// compiled for: other types, another number of arguments, and pointers or integers that are no multiples of 16 where the
// compiler was promised they are. It computes the grid from the arguments by the kernel's own formula.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>
#include <variant>
#include <vector>

namespace fssdeploy {

// No libcuda, a folder that cannot be read, arguments that do not fit, or an error of CUDA: what() says which.
class DriverError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// A parameter as kernels.txt names it: type "*fp16", "i32", "fp32", ...; `multiple` is 16 where that was promised.
struct Parameter {
  std::string name;
  std::string type;
  std::int64_t multiple = 1;
};

// The kernel for one architecture ("sm_90", compute capability x 10 = 90), or "ptx": text for any from `cc` on.
struct Image {
  std::string target;
  int cc = 0;
  std::int64_t shared = 0;  // bytes of dynamic shared memory
  std::string file;
};

struct KernelRecord {
  std::string name;
  std::string entry;
  int num_warps = 0;
  std::vector<std::string> grid;  // three formulas over parameters and constants
  std::vector<Parameter> parameters;
  std::map<std::string, std::string> constants;
  std::vector<Image> images;
};

// The records of a kernels.txt. Throws DriverError if the file is missing, damaged or of another version.
std::vector<KernelRecord> read_records(const std::string& path);

// The value of a formula of integers, names, + - * / ( ), cdiv(a, b), min(a, b), max(a, b); division truncates.
// Throws DriverError for anything else, and for division by zero.
std::int64_t evaluate(const std::string& formula, const std::map<std::string, std::int64_t>& values);

// The image that a device of compute capability `cc` (x 10) runs: its own, the nearest older one of the same
// generation (only 8.x: later ones are compiled for exactly one), else PTX. Throws DriverError if there is none.
const Image& choose_image(const KernelRecord& kernel, int cc);

// A device pointer, or a number. Integers go to i32 (if they fit) or i64, as the kernel declares.
using Argument = std::variant<const void*, std::int64_t, float>;

// Thread-safe. Kernels are loaded into the context that is current when they are first launched there, and stay loaded
// as long as the context.
class KernelLibrary {
 public:
  // Reads the records; does not touch CUDA.
  explicit KernelLibrary(std::string folder);

  // The record of a kernel, or null if there is none of that name.
  const KernelRecord* find(const std::string& name) const;

  // Launch on `stream` (a CUstream or cudaStream_t) of the current context. Does nothing where the grid is empty.
  // Throws DriverError.
  void launch(const std::string& name, void* stream, const std::vector<Argument>& arguments);

 private:
  struct Loaded {
    void* function;
    unsigned shared;
  };

  Loaded load(const KernelRecord& kernel);

  std::string folder_;
  std::map<std::string, KernelRecord> kernels_;
  std::mutex mutex_;
  std::map<std::pair<void*, std::string>, Loaded> loaded_;  // by context and name
};

}  // namespace fssdeploy
