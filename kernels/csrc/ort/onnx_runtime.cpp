#include "onnx_runtime.h"

#include <functional>
#include <numeric>

namespace fssdeploy::ort {
namespace {

template <typename From, typename To>
void convert(const void* from, void* to, std::int64_t count) {
  using Target = Eigen::Array<To, Eigen::Dynamic, 1>;
  const Eigen::Map<const Eigen::Array<From, Eigen::Dynamic, 1>> source(static_cast<const From*>(from), count);
  Eigen::Map<Target>(static_cast<To*>(to), count) = source.template cast<To>();
}

struct Description {
  OrtTensorTypeAndShapeInfo* info = nullptr;
  ~Description() { api->ReleaseTensorTypeAndShapeInfo(info); }
};

Shape describe(const OrtValue* value, Type& type) {
  Description description;
  check(api->GetTensorTypeAndShape(value, &description.info));
  check(api->GetTensorElementType(description.info, &type));
  std::size_t rank = 0;
  check(api->GetDimensionsCount(description.info, &rank));
  Shape shape(rank);
  check(api->GetDimensions(description.info, shape.data(), rank));
  return shape;
}

}  // namespace

const OrtApi* api = nullptr;

std::int64_t elements(const Shape& shape) {
  return std::accumulate(shape.begin(), shape.end(), std::int64_t{1}, std::multiplies<>());
}

void check(OrtStatus* status) {
  if (status == nullptr) return;
  const std::string message = api->GetErrorMessage(status);
  api->ReleaseStatus(status);
  throw std::runtime_error(message);
}

OrtStatus* status_of_exception() noexcept {
  try {
    throw;
  } catch (const InvalidArgument& error) {
    return api->CreateStatus(ORT_INVALID_ARGUMENT, error.what());
  } catch (const std::exception& error) {
    return api->CreateStatus(ORT_RUNTIME_EXCEPTION, error.what());
  } catch (...) {
    return api->CreateStatus(ORT_RUNTIME_EXCEPTION, "unknown exception");
  }
}

std::int64_t Attributes::integer(const char* name) const {
  std::int64_t value = 0;
  check(api->KernelInfoGetAttribute_int64(info_, name, &value));
  return value;
}

float Attributes::number(const char* name) const {
  float value = 0;
  check(api->KernelInfoGetAttribute_float(info_, name, &value));
  return value;
}

std::string Attributes::text(const char* name) const {
  std::size_t size = 0;
  check(api->KernelInfoGetAttribute_string(info_, name, nullptr, &size));
  std::string value(size, '\0');
  check(api->KernelInfoGetAttribute_string(info_, name, value.data(), &size));
  value.resize(size - 1);  // without the terminating zero
  return value;
}

Floats::Floats(const void* values, Type type, Shape shape)
    : values_(static_cast<const float*>(values)), shape_(std::move(shape)) {
  if (type == kFloat) return;
  require(type == kHalf || type == kBfloat, "inputs are float32, float16 or bfloat16");
  copy_.resize(elements(shape_));
  (type == kHalf ? convert<Eigen::half, float> : convert<Eigen::bfloat16, float>)(values, copy_.data(), copy_.size());
}

cpu::View Floats::rows() const {
  const std::int64_t columns = shape_.back();
  return cpu::View(data(), columns == 0 ? 0 : elements(shape_) / columns, columns);
}

Floats Run::floats(std::size_t index, int rank) const {
  Shape shape;
  Type type;
  const void* values = tensor(index, shape, type);
  if (rank < 0 ? shape.empty() : shape.size() != static_cast<std::size_t>(rank))
    throw InvalidArgument("input " + std::to_string(index) + " has " + std::to_string(shape.size()) + " axes");
  return Floats(values, type, std::move(shape));
}

const std::int64_t* Run::integers(std::size_t index, std::int64_t& count) const {
  Shape shape;
  Type type;
  const void* values = tensor(index, shape, type);
  require(type == kInt64 && shape.size() == 1, "labels are a vector of int64");
  count = shape[0];
  return static_cast<const std::int64_t*>(values);
}

const void* Run::tensor(std::size_t index, Shape& shape, Type& type) const {
  const OrtValue* value = nullptr;
  check(api->KernelContext_GetInput(context_, index, &value));
  shape = describe(value, type);
  void* data = nullptr;  // the only accessor; nothing writes to inputs
  check(api->GetTensorMutableData(const_cast<OrtValue*>(value), &data));
  return data;
}

void* Run::output(std::size_t index, const Shape& shape, Type& type) const {
  OrtValue* value = nullptr;
  check(api->KernelContext_GetOutput(context_, index, shape.data(), shape.size(), &value));
  if (value == nullptr) return nullptr;
  describe(value, type);
  void* data = nullptr;
  check(api->GetTensorMutableData(value, &data));
  return data;
}

cpu::Parallel Run::parallel() const {
  return [context = context_](cpu::Index count, const std::function<void(cpu::Index)>& body) {
    const auto call = [](void* work, std::size_t index) {
      (*static_cast<const std::function<void(cpu::Index)>*>(work))(static_cast<cpu::Index>(index));
    };
    void* work = const_cast<std::function<void(cpu::Index)>*>(&body);
    check(api->KernelContext_ParallelFor(context, call, static_cast<std::size_t>(count), 0, work));
  };
}

void* Run::stream() const {
  void* stream = nullptr;
  check(api->KernelContext_GetGPUComputeStream(context_, &stream));
  return stream;
}

DeviceMemory::DeviceMemory(const Run& run) {
  const OrtValue* value = nullptr;
  check(api->KernelContext_GetInput(run.context_, 0, &value));
  const OrtMemoryInfo* place = nullptr;
  check(api->GetTensorMemoryInfo(value, &place));
  check(api->KernelContext_GetAllocator(run.context_, place, &allocator_));
}

DeviceMemory::~DeviceMemory() {
  for (void* memory : held_) allocator_->Free(allocator_, memory);
  api->ReleaseAllocator(allocator_);
}

void* DeviceMemory::allocate(std::size_t bytes) {
  held_.push_back(allocator_->Alloc(allocator_, bytes));
  return held_.back();
}

template <typename Value>
Output<Value>::Output(const Run& run, std::size_t index, const Shape& shape)
    : memory_(run.output(index, shape, type_)) {
  const bool direct = type_ == (sizeof(Value) == sizeof(float) ? kFloat : kInt64);
  if (!direct) copy_.resize(elements(shape));
}

template <typename Value>
void Output<Value>::store() {
  if (memory_ == nullptr || copy_.empty()) return;
  (type_ == kHalf ? convert<Value, Eigen::half> : convert<Value, Eigen::bfloat16>)(copy_.data(), memory_, copy_.size());
}

template class Output<float>;
template class Output<std::int64_t>;

}  // namespace fssdeploy::ort
