// The functions of libcuda that the driver code uses, without a GPU behind them.
#include "fake_cuda.h"

#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED FakeCuda* fake_cuda() {
  static FakeCuda fake;
  return &fake;
}

namespace {

FakeCuda& fake = *fake_cuda();

int answer(const char* function) { return fake.failing == function ? 700 : 0; }

}  // namespace

EXPORTED int cuInit(unsigned) { return answer("cuInit"); }

EXPORTED int cuCtxGetCurrent(void** context) {
  *context = fake.context;
  return answer("cuCtxGetCurrent");
}

EXPORTED int cuCtxGetDevice(int* device) {
  *device = 3;
  return answer("cuCtxGetDevice");
}

EXPORTED int cuDeviceGetAttribute(int* value, int attribute, int device) {
  if (device != 3) return 101;
  *value = attribute == 75 ? fake.capability / 10 : attribute == 76 ? fake.capability % 10 : -1;
  return answer("cuDeviceGetAttribute");
}

EXPORTED int cuModuleLoadData(void** module, const void* image) {
  fake.images.emplace_back(static_cast<const char*>(image));
  *module = &fake.images;
  return answer("cuModuleLoadData");
}

EXPORTED int cuModuleGetFunction(void** function, void* module, const char* name) {
  if (module != &fake.images) return 400;
  fake.entries.emplace_back(name);
  *function = &fake.entries;
  return answer("cuModuleGetFunction");
}

EXPORTED int cuFuncSetAttribute(void* function, int attribute, int value) {
  if (function != &fake.entries || attribute != 8) return 400;
  fake.shared_limits.push_back(value);
  return answer("cuFuncSetAttribute");
}

EXPORTED int cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                            unsigned bz, unsigned shared, void* stream, void** parameters, void** extra) {
  if (function != &fake.entries || extra != nullptr) return 400;
  Launch launch{{gx, gy, gz}, {bx, by, bz}, shared, stream, {}};
  for (std::size_t i = 0; i < fake.sizes.size(); ++i) {
    const auto* bytes = static_cast<const unsigned char*>(parameters[i]);
    launch.parameters.emplace_back(bytes, bytes + fake.sizes[i]);
  }
  fake.launches.push_back(launch);
  return answer("cuLaunchKernel");
}

EXPORTED int cuGetErrorName(int, const char** name) {
  *name = "CUDA_ERROR_ILLEGAL_ADDRESS";
  return 0;
}

EXPORTED int cuGetErrorString(int, const char** text) {
  *text = "an illegal memory access was encountered";
  return 0;
}
