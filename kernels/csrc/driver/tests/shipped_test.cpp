// Launches every kernel of a shipped folder on every architecture, with a libcuda of our own: shipped_test LIBCUDA FOLDER
#include <dlfcn.h>

#include <cstdlib>
#include <iostream>

#include "driver.h"
#include "fake_cuda.h"

namespace {

// Of each kind of parameter a value that every promise allows.
fssdeploy::Argument any_argument(const fssdeploy::Parameter& parameter) {
  alignas(16) static unsigned char memory[16];
  if (parameter.type[0] == '*') return static_cast<const void*>(memory);
  if (parameter.type == "fp32") return 1.0f;
  return std::int64_t{1024};
}

}  // namespace

int main(int, char** arguments) {
  setenv("FSSDEPLOY_LIBCUDA", arguments[1], 1);
  FakeCuda& fake = *reinterpret_cast<FakeCuda* (*)()>(dlsym(dlopen(arguments[1], RTLD_NOW), "fake_cuda"))();
  const std::string folder = arguments[2];
  try {
    for (const int capability : {80, 86, 87, 89, 90, 100, 103, 120, 121}) {
      fake.capability = capability;
      fssdeploy::KernelLibrary kernels(folder);
      for (const auto& kernel : fssdeploy::read_records(folder + "/kernels.txt")) {
        std::vector<fssdeploy::Argument> values;
        for (const auto& parameter : kernel.parameters) values.push_back(any_argument(parameter));
        kernels.launch(kernel.name, nullptr, values);
        if (capability == 80) std::cout << kernel.name << '\n';
      }
    }
  } catch (const fssdeploy::DriverError& error) {
    std::cerr << error.what() << '\n';
    return 1;
  }
  return fake.launches.empty() ? 1 : 0;
}
