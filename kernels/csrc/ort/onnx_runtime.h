// The C interface of ONNX Runtime in the few forms that operators need. Errors are exceptions in here; the callbacks
// that ONNX Runtime calls turn them into its statuses.
#pragma once

#include <onnxruntime_c_api.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "tiles.h"

namespace fssdeploy::ort {

// The oldest interface that has all we call; any newer ONNX Runtime gives it.
constexpr std::uint32_t kApiVersion = 17;

using Type = ONNXTensorElementDataType;
using Shape = std::vector<std::int64_t>;
constexpr Type kAny = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
constexpr Type kFloat = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
constexpr Type kHalf = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
constexpr Type kBfloat = ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16;
constexpr Type kInt64 = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;

// What a node is given does not fit; the message says what.
class InvalidArgument : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Set once, when the library is registered.
extern const OrtApi* api;

// Throws what `status` says, unless it is success.
void check(OrtStatus* status);

// Status of the exception that is being handled; use in a catch block.
OrtStatus* status_of_exception() noexcept;

std::int64_t elements(const Shape& shape);

inline void require(bool holds, const char* message) {
  if (!holds) throw InvalidArgument(message);
}

// Attributes of a node; throws if one is missing.
class Attributes {
 public:
  explicit Attributes(const OrtKernelInfo* info) : info_(info) {}
  std::int64_t integer(const char* name) const;
  float number(const char* name) const;
  std::string text(const char* name) const;

 private:
  const OrtKernelInfo* info_;
};

// An input in float32: the tensor itself, or a converted copy of float16 and bfloat16.
class Floats {
 public:
  Floats(const void* values, Type type, Shape shape);
  Floats(Floats&&) = default;

  const float* data() const { return copy_.empty() ? values_ : copy_.data(); }
  std::int64_t size(std::size_t axis) const { return shape_[axis]; }
  const Shape& shape() const { return shape_; }
  // All but the last axis as rows.
  cpu::View rows() const;

 private:
  const float* values_;
  std::vector<float> copy_;
  Shape shape_;
};

// One run of a node.
class Run {
 public:
  explicit Run(OrtKernelContext* context) : context_(context) {}

  // An input of any floating type; throws InvalidArgument unless it has `rank` axes (-1: at least one).
  Floats floats(std::size_t index, int rank) const;
  // A vector of int64.
  const std::int64_t* integers(std::size_t index, std::int64_t& count) const;
  // Address and shape of an input, of whatever type and on whatever device it is.
  const void* tensor(std::size_t index, Shape& shape, Type& type) const;
  // Memory of an output, null where nobody reads it.
  void* output(std::size_t index, const Shape& shape, Type& type) const;

  // The threads of the session.
  cpu::Parallel parallel() const;
  // A CUDA stream, on the provider for CUDA.
  void* stream() const;

 private:
  friend class DeviceMemory;

  OrtKernelContext* context_;
};

// Memory of the device that the first input is on, until this ends.
class DeviceMemory {
 public:
  explicit DeviceMemory(const Run& run);
  ~DeviceMemory();
  DeviceMemory(const DeviceMemory&) = delete;

  void* allocate(std::size_t bytes);

 private:
  OrtAllocator* allocator_ = nullptr;
  std::vector<void*> held_;
};

// An output that is computed in `Value`, and stored in the type that it has when store() is called.
template <typename Value>
class Output {
 public:
  Output(const Run& run, std::size_t index, const Shape& shape);

  Value* data() { return copy_.empty() ? static_cast<Value*>(memory_) : copy_.data(); }
  void store();

 private:
  Type type_ = kAny;
  void* memory_;
  std::vector<Value> copy_;
};

}  // namespace fssdeploy::ort
