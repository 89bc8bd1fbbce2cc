#include "cuda.h"

#include <dlfcn.h>

#include <cstdlib>

#include "driver.h"

namespace fssdeploy {
namespace {

template <typename Function>
void find(void* library, const char* symbol, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, symbol));
  if (function == nullptr) throw DriverError(std::string("this driver of CUDA has no ") + symbol + ": it is too old");
}

Cuda open() {
  const char* named = std::getenv("FSSDEPLOY_LIBCUDA");
  void* library = dlopen(named != nullptr ? named : "libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    throw DriverError(std::string("the CUDA driver cannot be opened (") + dlerror() +
                      "); install NVIDIA's driver, or run the operations on the CPU");
  }
  Cuda cuda{};
  find(library, "cuInit", cuda.init);
  find(library, "cuCtxGetCurrent", cuda.context);
  find(library, "cuCtxGetDevice", cuda.device);
  find(library, "cuDeviceGetAttribute", cuda.attribute);
  find(library, "cuModuleLoadData", cuda.load);
  find(library, "cuModuleGetFunction", cuda.function);
  find(library, "cuFuncSetAttribute", cuda.set);
  find(library, "cuLaunchKernel", cuda.launch);
  find(library, "cuGetErrorName", cuda.error_name);
  find(library, "cuGetErrorString", cuda.error_text);
  cuda.check(cuda.init(0), "starting CUDA");
  return cuda;
}

}  // namespace

void Cuda::check(int answer, const std::string& what) const {
  if (answer == 0) return;
  const char* name = nullptr;
  const char* text = nullptr;
  error_name(answer, &name);
  error_text(answer, &text);
  throw DriverError(what + " failed: " + (name != nullptr ? name : "error " + std::to_string(answer)) +
                    (text != nullptr ? std::string(" (") + text + ")" : ""));
}

const Cuda& cuda() {
  static const Cuda opened = open();
  return opened;
}

}  // namespace fssdeploy
