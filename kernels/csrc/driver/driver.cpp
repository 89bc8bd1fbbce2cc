#include "driver.h"

#include <fstream>
#include <iterator>
#include <limits>

#include "cuda.h"

namespace fssdeploy {
namespace {

constexpr unsigned kThreadsPerWarp = 32;
constexpr std::size_t kHiddenParameters = 2;  // Triton's scratch pointers, which our kernels do not use
// More than this a kernel must ask for before it is launched.
constexpr std::int64_t kOrdinarySharedBytes = 48 * 1024;
constexpr int kLastPortableMajor = 8;
// Limits of the driver's interface: blocks along x, and along y or z.
constexpr std::int64_t kMaxBlocks[] = {std::numeric_limits<std::int32_t>::max(), 65535, 65535};

std::string read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw DriverError("the kernel " + path + " cannot be read");
  // The terminating zero of c_str() is what the driver wants at the end of PTX.
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

// The bytes of one argument as the kernel reads them.
struct Slot {
  alignas(8) unsigned char bytes[8];

  template <typename Value>
  void set(Value value) {
    *reinterpret_cast<Value*>(bytes) = value;
  }
};

[[noreturn]] void refuse(const KernelRecord& kernel, const Parameter& parameter, const std::string& why) {
  throw DriverError(kernel.name + ": argument " + parameter.name + " (" + parameter.type + ") " + why);
}

Slot encode(const KernelRecord& kernel, const Parameter& parameter, const Argument& argument) {
  Slot slot{};
  std::int64_t promised = 0;
  if (parameter.type[0] == '*') {
    const auto* pointer = std::get_if<const void*>(&argument);
    if (pointer == nullptr) refuse(kernel, parameter, "must be a pointer");
    slot.set(*pointer);
    promised = static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(*pointer));
  } else if (parameter.type == "i32" || parameter.type == "i64") {
    const auto* number = std::get_if<std::int64_t>(&argument);
    if (number == nullptr) refuse(kernel, parameter, "must be an integer");
    using Narrow = std::numeric_limits<std::int32_t>;
    if (parameter.type == "i64") {
      slot.set(*number);
    } else if (*number < Narrow::min() || *number > Narrow::max()) {
      refuse(kernel, parameter, "is " + std::to_string(*number) + ", more than 32 bits hold");
    } else {
      slot.set(static_cast<std::int32_t>(*number));
    }
    promised = *number;
  } else if (parameter.type == "fp32") {
    const auto* number = std::get_if<float>(&argument);
    if (number == nullptr) refuse(kernel, parameter, "must be a float");
    slot.set(*number);
  } else {
    refuse(kernel, parameter, "has a type that this library does not pass");
  }
  if (promised % parameter.multiple != 0) {
    refuse(kernel, parameter, "must be a multiple of " + std::to_string(parameter.multiple));
  }
  return slot;
}

// What grid formulas can name: integer arguments, and constants that are whole numbers.
std::map<std::string, std::int64_t> named_values(const KernelRecord& kernel, const std::vector<Argument>& arguments) {
  std::map<std::string, std::int64_t> values;
  for (const auto& [name, text] : kernel.constants) {
    if (text.find_first_not_of("-0123456789") == std::string::npos) values[name] = std::stoll(text);
  }
  for (std::size_t i = 0; i < arguments.size(); ++i) {
    if (const auto* number = std::get_if<std::int64_t>(&arguments[i])) values[kernel.parameters[i].name] = *number;
  }
  return values;
}

int current_capability(const Cuda& api) {
  int device = 0, major = 0, minor = 0;
  api.check(api.device(&device), "asking for the current device");
  api.check(api.attribute(&major, kComputeCapabilityMajor, device), "asking for the compute capability");
  api.check(api.attribute(&minor, kComputeCapabilityMinor, device), "asking for the compute capability");
  return 10 * major + minor;
}

}  // namespace

const Image& choose_image(const KernelRecord& kernel, int cc) {
  const Image* chosen = nullptr;
  const Image* ptx = nullptr;
  for (const Image& image : kernel.images) {
    if (image.target == "ptx") {
      if (image.cc <= cc) ptx = &image;
      continue;
    }
    const bool older = cc / 10 == kLastPortableMajor && image.cc / 10 == kLastPortableMajor && image.cc < cc;
    if ((image.cc == cc || older) && (chosen == nullptr || image.cc > chosen->cc)) chosen = &image;
  }
  if (chosen == nullptr) chosen = ptx;
  if (chosen == nullptr) {
    throw DriverError(kernel.name + " was not compiled for compute capability " + std::to_string(cc / 10) + "." +
                      std::to_string(cc % 10) + ", nor is there PTX that it could run");
  }
  return *chosen;
}

KernelLibrary::KernelLibrary(std::string folder) : folder_(std::move(folder)) {
  for (KernelRecord& kernel : read_records(folder_ + "/kernels.txt")) {
    const std::string name = kernel.name;
    kernels_.emplace(name, std::move(kernel));
  }
}

const KernelRecord* KernelLibrary::find(const std::string& name) const {
  const auto found = kernels_.find(name);
  return found == kernels_.end() ? nullptr : &found->second;
}

void KernelLibrary::launch(const std::string& name, void* stream, const std::vector<Argument>& arguments) {
  const KernelRecord* kernel = find(name);
  if (kernel == nullptr) throw DriverError("there is no kernel " + name + " in " + folder_);
  if (arguments.size() != kernel->parameters.size()) {
    throw DriverError(name + " takes " + std::to_string(kernel->parameters.size()) + " arguments, not " +
                      std::to_string(arguments.size()));
  }
  std::vector<Slot> slots;
  for (std::size_t i = 0; i < arguments.size(); ++i) {
    slots.push_back(encode(*kernel, kernel->parameters[i], arguments[i]));
  }
  slots.resize(slots.size() + kHiddenParameters);
  std::vector<void*> parameters;
  for (Slot& slot : slots) parameters.push_back(slot.bytes);

  const auto values = named_values(*kernel, arguments);
  unsigned grid[3];
  for (std::size_t axis = 0; axis < 3; ++axis) {
    const std::int64_t blocks = evaluate(kernel->grid[axis], values);
    if (blocks == 0) return;
    if (blocks < 0 || blocks > kMaxBlocks[axis]) {
      throw DriverError(name + ": " + std::to_string(blocks) + " blocks along axis " + std::to_string(axis) +
                        " of the grid cannot be launched");
    }
    grid[axis] = static_cast<unsigned>(blocks);
  }

  const Loaded loaded = load(*kernel);
  cuda().check(cuda().launch(loaded.function, grid[0], grid[1], grid[2], kThreadsPerWarp * kernel->num_warps, 1, 1,
                             loaded.shared, stream, parameters.data(), nullptr),
               "launching " + name);
}

KernelLibrary::Loaded KernelLibrary::load(const KernelRecord& kernel) {
  const Cuda& api = cuda();
  void* context = nullptr;
  api.check(api.context(&context), "asking for the current context");
  if (context == nullptr) throw DriverError("no context of CUDA is current in this thread");

  const std::lock_guard<std::mutex> lock(mutex_);
  const auto known = loaded_.find({context, kernel.name});
  if (known != loaded_.end()) return known->second;

  const Image& image = choose_image(kernel, current_capability(api));
  const std::string path = folder_ + "/" + image.file;
  const std::string content = read_file(path);
  void* module = nullptr;
  Loaded loaded{nullptr, static_cast<unsigned>(image.shared)};
  api.check(api.load(&module, content.c_str()), "loading " + path);
  api.check(api.function(&loaded.function, module, kernel.entry.c_str()), "finding " + kernel.entry + " in " + path);
  if (image.shared > kOrdinarySharedBytes) {
    api.check(api.set(loaded.function, kMaxDynamicSharedSize, static_cast<int>(image.shared)),
              "reserving shared memory for " + kernel.name);
  }
  loaded_[{context, kernel.name}] = loaded;
  return loaded;
}

}  // namespace fssdeploy
