// Launches of the kernels of a folder, as Python shipped them, through a libcuda of our own: arguments are a fake
// libcuda and the folder.
#include "cuda_launches.h"

#include <dlfcn.h>

#include <cstdlib>
#include <cstring>
#include <iostream>
#include <vector>

#include "fake_cuda.h"

using namespace fssdeploy;

namespace {

// What the smallest kernel is launched with, its two hidden parameters among them; each has a slot of 8 bytes.
constexpr std::size_t kSlots = 9;

FakeCuda* fake = nullptr;
int failures = 0;

void expect(bool holds, const std::string& what) {
  if (holds) return;
  ++failures;
  std::cerr << "FAILED: " << what << '\n';
}

template <typename Value>
Value parameter(std::size_t launch, std::size_t index) {
  Value value;
  std::memcpy(&value, fake->launches.at(launch).parameters.at(index).data(), sizeof value);
  return value;
}

void expect_grid(std::size_t launch, unsigned x, unsigned y, unsigned z, const std::string& what) {
  const unsigned* grid = fake->launches.at(launch).grid;
  expect(grid[0] == x && grid[1] == y && grid[2] == z, what + ": grid " + std::to_string(grid[0]) + ", " +
                                                           std::to_string(grid[1]) + ", " + std::to_string(grid[2]));
}

template <typename Action>
void expect_error(const std::string& text, Action action) {
  try {
    action();
  } catch (const DriverError& error) {
    expect(std::string(error.what()).find(text) != std::string::npos, std::string(error.what()) + " says " + text);
    return;
  }
  expect(false, "nothing says " + text);
}

// Enough of a device: the fake computes nothing.
struct Device {
  std::vector<std::vector<std::uint64_t>> blocks;
  std::vector<void*> allocated;
  alignas(16) char query[16], support[16], projection[16], output[16];
  std::vector<std::uint16_t> weights = std::vector<std::uint16_t>(2 * 3 * 300, 7);

  Launcher launcher(KernelLibrary& kernels, const char* type) {
    return {kernels, this, type, [this](std::size_t bytes) {
              blocks.emplace_back(bytes / 8 + 4, 0xFFFFFFFFFFFFFFFF);
              const auto address = reinterpret_cast<std::uintptr_t>(blocks.back().data());
              allocated.push_back(reinterpret_cast<void*>((address + 15) / 16 * 16));
              return allocated.back();
            }};
  }
};

void masked_max_launches(KernelLibrary& kernels, Device& device) {
  fake->launches.clear();
  const Pair sizes{2, 130, 300, 128};
  const Maxima maxima{device.query, device.output};
  masked_max(device.launcher(kernels, "fp16"), sizes, 3, true, device.query, device.support, device.weights.data(),
             maxima);
  expect(fake->launches.size() == 2, "tiles, then their best");
  expect_grid(0, 2, 3, 2, "masked_max");
  expect(fake->launches[0].stream == &device, "the stream of the run");
  const std::int32_t numbers[] = {2, 3, 130, 300, 128, 1};
  for (std::size_t i = 0; i < 6; ++i)
    expect(parameter<std::int32_t>(0, 3 + i) == numbers[i], "number " + std::to_string(i));
  const auto* padded = parameter<const std::uint16_t*>(0, 2);
  bool right = padded != device.weights.data();
  for (std::size_t row = 0; row < 6; ++row)
    for (std::size_t column = 0; column < 384; ++column) right &= padded[row * 384 + column] == (column < 300 ? 7 : 0);
  expect(right, "weights are filled up with zeros to whole tiles");
  expect_grid(1, 3, 6, 1, "best_of_tiles");
  expect(parameter<void*>(1, 0) == device.allocated.at(1) && parameter<void*>(1, 1) == device.allocated.at(2),
         "the second kernel reads what the first wrote");
  expect(parameter<void*>(1, 5) == device.query && parameter<void*>(1, 6) == device.output, "the results");

  fake->launches.clear();
  masked_max(device.launcher(kernels, "fp32"), {1, 1, 256, 32}, 1, false, device.query, device.support, device.output,
             maxima);
  expect(parameter<void*>(0, 2) == device.output, "weights of whole tiles are read where they are");
  expect(parameter<std::int32_t>(0, 8) == 0, "multiply");
  expect_error("72 channels", [&] {
    masked_max(device.launcher(kernels, "fp16"), {1, 1, 1, 72}, 1, true, device.query, device.support, device.output,
               maxima);
  });
  expect_error("too large", [&] {
    masked_max(device.launcher(kernels, "fp16"), {1, 1 << 20, 1, 1 << 12}, 1, true, device.query, device.support,
               device.output, maxima);
  });
}

void mutual_argmax_launches(KernelLibrary& kernels, Device& device) {
  fake->launches.clear();
  const Maxima rows{device.query, device.output}, columns{device.support, device.projection};
  mutual_argmax(device.launcher(kernels, "bf16"), {2, 130, 300, 64}, device.query, device.support, rows, columns);
  expect(fake->launches.size() == 3, "tiles, then the best of rows and of columns");
  expect_grid(0, 2, 3, 2, "mutual_argmax");
  expect_grid(1, 3, 2, 1, "best of rows");
  expect_grid(2, 5, 2, 1, "best of columns");
  expect(parameter<std::int32_t>(1, 3) == 3 && parameter<std::int32_t>(2, 3) == 2, "tiles of columns and of rows");
  expect(parameter<void*>(2, 5) == device.support && parameter<void*>(2, 6) == device.projection, "column results");
}

void correlation_projection_launches(KernelLibrary& kernels, Device& device) {
  fake->launches.clear();
  const auto launch = [&](std::int64_t outputs) {
    correlation_projection(device.launcher(kernels, "fp16"), {2, 130, 300, 64}, outputs, device.query, device.support,
                           device.projection, device.output);
  };
  launch(128);
  expect_grid(0, 3, 1, 2, "correlation_projection, 128");
  launch(192);
  expect_grid(1, 3, 3, 2, "correlation_projection, 192 by the widest that it fills");
  expect_error("100 projected channels", [&] { launch(100); });
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 3) return 2;
  setenv("FSSDEPLOY_LIBCUDA", arguments[1], 1);
  void* library = dlopen(arguments[1], RTLD_NOW);
  if (library == nullptr) return 2;
  fake = reinterpret_cast<FakeCuda* (*)()>(dlsym(library, "fake_cuda"))();
  fake->sizes.assign(kSlots, 8);
  KernelLibrary kernels(arguments[2]);
  Device device;
  masked_max_launches(kernels, device);
  mutual_argmax_launches(kernels, device);
  correlation_projection_launches(kernels, device);
  return failures == 0 ? 0 : 1;
}
