// Records, grid formulas, choice of images and launches, against a libcuda of our own (its path is the argument).
#include "driver.h"

#include <dlfcn.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iostream>

#include "fake_cuda.h"

using fssdeploy::Argument;
using fssdeploy::DriverError;
using fssdeploy::KernelLibrary;

namespace {

int failures = 0;

void expect(bool condition, const std::string& what) {
  if (condition) return;
  ++failures;
  std::cerr << "FAILED: " << what << '\n';
}

void expect_error(const std::string& text, const std::function<void()>& action) {
  try {
    action();
  } catch (const DriverError& error) {
    expect(std::string(error.what()).find(text) != std::string::npos,
           "\"" + std::string(error.what()) + "\" says \"" + text + "\"");
    return;
  }
  expect(false, "nothing was thrown that says \"" + text + "\"");
}

const std::string kRecords =
    "fssdeploy-kernels 1\n"
    "kernel pairs_fp16 pairs 8\n"
    "grid cdiv(rows,BLOCK)\n"
    "grid shots*2\n"
    "grid 1\n"
    "parameter query *fp16 16\n"
    "parameter rows i32 1\n"
    "parameter stride i64 16\n"
    "parameter shots i32 1\n"
    "parameter scale fp32 1\n"
    "constant BLOCK 64\n"
    "constant PRECISION ieee\n"
    "image sm_80 80 1024 pairs.sm_80.cubin\n"
    "image sm_86 86 2048 pairs.sm_86.cubin\n"
    "image sm_90 90 98304 pairs.sm_90.cubin\n"
    "image ptx 80 1024 pairs.ptx\n";

void write(const std::filesystem::path& path, const std::string& content) { std::ofstream(path) << content; }

template <typename Value>
Value parameter(const Launch& launch, std::size_t index) {
  Value value;
  std::memcpy(&value, launch.parameters[index].data(), sizeof value);
  return value;
}

void test_formulas() {
  const std::map<std::string, std::int64_t> values{{"rows", 130}, {"BLOCK_Q", 64}};
  const auto value = [&](const std::string& formula) { return fssdeploy::evaluate(formula, values); };
  expect(value("cdiv(rows, BLOCK_Q)") == 3, "cdiv rounds up");
  expect(value("2 + 3 * 4 - 5") == 9, "products before sums");
  expect(value("(2 + 3) * -4") == -20, "brackets and signs");
  expect(value("rows / BLOCK_Q / 2") == 1, "division from the left");
  expect(value("10 - 4 - 3") == 3, "subtraction from the left");
  expect(value("max(1, min(rows, 7))") == 7, "nested calls");
  for (const auto& [formula, why] : std::map<std::string, std::string>{{"rows +", "missing"},
                                                                       {"columns", "columns"},
                                                                       {"f(1, 2)", "no function f"},
                                                                       {"cdiv(1)", "',' is missing"},
                                                                       {"1 / 0", "zero"},
                                                                       {"rows rows", "unexpected"},
                                                                       {"", "missing"}}) {
    expect_error(why, [&, formula = formula] { value(formula); });
  }
}

void test_records(const std::filesystem::path& folder) {
  const auto kernels = fssdeploy::read_records((folder / "kernels.txt").string());
  expect(kernels.size() == 1 && kernels[0].name == "pairs_fp16" && kernels[0].entry == "pairs", "the kernel's names");
  expect(kernels[0].parameters.size() == 5 && kernels[0].parameters[2].multiple == 16, "its parameters");
  expect(kernels[0].constants.at("PRECISION") == "ieee", "its constants");

  expect_error("cannot be read", [&] { KernelLibrary((folder / "nowhere").string()); });
  const auto damaged = [&](const std::string& content, const std::string& why) {
    write(folder / "damaged.txt", content);
    expect_error(why, [&] { fssdeploy::read_records((folder / "damaged.txt").string()); });
  };
  damaged("", "damaged");
  damaged("fssdeploy-kernels 2\n", "version 2");
  damaged("fssdeploy-kernels 1\n", "damaged");
  damaged("fssdeploy-kernels 1\ngrid 1\n", "damaged");
  damaged(kRecords + "colour red\n", "colour");
  damaged(kRecords + "parameter rows i32 many\n", "many");
  damaged(kRecords + "kernel next entry 4\n", "the end");
}

void test_choice(const std::filesystem::path& folder) {
  const auto kernel = fssdeploy::read_records((folder / "kernels.txt").string())[0];
  const auto chosen = [&](int cc) { return fssdeploy::choose_image(kernel, cc).target; };
  expect(chosen(80) == "sm_80" && chosen(86) == "sm_86" && chosen(90) == "sm_90", "its own image");
  expect(chosen(87) == "sm_86" && chosen(89) == "sm_86", "the nearest older one of its generation");
  expect(chosen(100) == "ptx" && chosen(103) == "ptx" && chosen(121) == "ptx", "else PTX");
  expect_error("7.5", [&] { chosen(75); });
}

void test_without_driver(const std::filesystem::path& folder) {
  setenv("FSSDEPLOY_LIBCUDA", (folder / "no-such-library.so").c_str(), 1);
  KernelLibrary kernels(folder.string());
  expect(kernels.find("pairs_fp16") != nullptr, "records can be read without a driver");
  expect_error("CUDA driver cannot be opened", [&] {
    kernels.launch("pairs_fp16", nullptr, {Argument(nullptr), std::int64_t{1}, std::int64_t{16}, std::int64_t{1}, 1.0f});
  });
}

void test_launches(const std::filesystem::path& folder, FakeCuda& fake) {
  KernelLibrary kernels(folder.string());
  alignas(16) static unsigned char memory[32];
  const auto arguments = [&](std::int64_t rows) {
    return std::vector<Argument>{static_cast<const void*>(memory), rows, std::int64_t{1} << 40, std::int64_t{3}, 0.5f};
  };
  int stream = 0;
  fake.sizes = {8, 4, 8, 4, 4, 8, 8};
  kernels.launch("pairs_fp16", &stream, arguments(130));
  expect(fake.images == std::vector<std::string>{"cubin of 80"} && fake.entries == std::vector<std::string>{"pairs"},
         "the cubin of the device is loaded");
  expect(fake.shared_limits.empty(), "no more shared memory is asked for than ordinary");
  const Launch& first = fake.launches.at(0);
  expect(first.grid[0] == 3 && first.grid[1] == 6 && first.grid[2] == 1, "the grid follows the formulas");
  expect(first.block[0] == 256 && first.block[1] == 1 && first.block[2] == 1, "32 threads a warp");
  expect(first.shared == 1024 && first.stream == &stream, "shared memory and stream");
  expect(parameter<const void*>(first, 0) == memory, "pointer");
  expect(parameter<std::int32_t>(first, 1) == 130 && parameter<std::int32_t>(first, 3) == 3, "32-bit integers");
  expect(parameter<std::int64_t>(first, 2) == std::int64_t{1} << 40, "64-bit integer");
  expect(parameter<float>(first, 4) == 0.5f, "float");
  expect(parameter<void*>(first, 5) == nullptr && parameter<void*>(first, 6) == nullptr, "two null pointers follow");

  kernels.launch("pairs_fp16", &stream, arguments(64));
  expect(fake.images.size() == 1 && fake.launches.size() == 2, "a kernel is loaded once");
  kernels.launch("pairs_fp16", &stream, arguments(0));
  expect(fake.launches.size() == 2, "an empty grid is not launched");

  int other_context = 0;
  fake.context = &other_context;
  fake.capability = 90;
  kernels.launch("pairs_fp16", &stream, arguments(1));
  expect(fake.images.back() == "cubin of 90", "another context loads its own");
  expect(fake.shared_limits == std::vector<int>{98304}, "much shared memory is asked for");
  int third_context = 0;
  fake.context = &third_context;
  fake.capability = 120;
  kernels.launch("pairs_fp16", &stream, arguments(1));
  expect(fake.images.back() == "text", "PTX where no cubin fits");

  const std::size_t launched = fake.launches.size();
  const auto refused = [&](const std::string& why, std::size_t index, const Argument& argument) {
    auto wrong = arguments(1);
    wrong[index] = argument;
    expect_error(why, [&] { kernels.launch("pairs_fp16", &stream, wrong); });
  };
  refused("must be a multiple of 16", 0, static_cast<const void*>(memory + 2));
  refused("must be a multiple of 16", 2, std::int64_t{24});
  refused("more than 32 bits", 1, std::int64_t{1} << 31);
  refused("must be a pointer", 0, std::int64_t{0});
  refused("must be an integer", 1, 1.0f);
  refused("must be a float", 4, std::int64_t{1});
  refused("cannot be launched", 1, std::int64_t{-200});
  refused("cannot be launched", 3, std::int64_t{40000});
  expect_error("takes 5 arguments, not 1", [&] { kernels.launch("pairs_fp16", &stream, {1.0f}); });
  expect_error("no kernel triples", [&] { kernels.launch("triples", &stream, {}); });
  expect(fake.launches.size() == launched, "what is refused is not launched");

  fake.failing = "cuLaunchKernel";
  expect_error("launching pairs_fp16 failed: CUDA_ERROR_ILLEGAL_ADDRESS (an illegal memory access",
               [&] { kernels.launch("pairs_fp16", &stream, arguments(1)); });
  fake.failing.clear();
  fake.context = nullptr;
  expect_error("no context", [&] { kernels.launch("pairs_fp16", &stream, arguments(1)); });
  int fourth_context = 0;
  fake.context = &fourth_context;
  fake.failing = "cuModuleLoadData";
  expect_error("loading", [&] { kernels.launch("pairs_fp16", &stream, arguments(1)); });
  fake.failing.clear();
  std::filesystem::remove(folder / "pairs.ptx");
  expect_error("pairs.ptx cannot be read", [&] { kernels.launch("pairs_fp16", &stream, arguments(1)); });
}

}  // namespace

int main(int, char** arguments) {
  const auto folder = std::filesystem::temp_directory_path() / ("fssdeploy-driver-" + std::to_string(getpid()));
  std::filesystem::create_directories(folder);
  write(folder / "kernels.txt", kRecords);
  for (const char* cc : {"80", "86", "90"}) {
    write(folder / (std::string("pairs.sm_") + cc + ".cubin"), std::string("cubin of ") + cc);
  }
  write(folder / "pairs.ptx", "text");

  test_formulas();
  test_records(folder);
  test_choice(folder);
  test_without_driver(folder);

  setenv("FSSDEPLOY_LIBCUDA", arguments[1], 1);
  void* library = dlopen(arguments[1], RTLD_NOW);
  expect(library != nullptr, "the fake libcuda can be opened");
  if (library != nullptr) {
    test_launches(folder, *reinterpret_cast<FakeCuda* (*)()>(dlsym(library, "fake_cuda"))());
  }
  std::filesystem::remove_all(folder);
  std::cout << (failures == 0 ? "all hold\n" : std::to_string(failures) + " failed\n");
  return failures == 0 ? 0 : 1;
}
