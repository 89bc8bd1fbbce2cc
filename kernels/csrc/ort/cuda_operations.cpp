// The shipped GPU kernels as operators of the CUDA provider.
#include <cstdlib>

#include "cuda_launches.h"
#include "operator.h"

namespace fssdeploy::ort {
namespace {

// An input on the device.
struct Tensor {
  Tensor(const Run& run, std::size_t index) : data(run.tensor(index, shape, type)) {}

  std::int64_t size(std::size_t axis) const { return shape[axis]; }

  Shape shape;
  Type type = kAny;
  const void* data;
};

// Memory of an output, also where nobody reads it.
void* output(const Run& run, DeviceMemory& memory, std::size_t index, const Shape& shape, std::size_t element_bytes) {
  Type type = kAny;
  void* data = run.output(index, shape, type);
  return data != nullptr ? data : memory.allocate(elements(shape) * element_bytes);
}

Maxima maxima(const Run& run, DeviceMemory& memory, std::size_t index, const Shape& shape) {
  return {output(run, memory, index, shape, sizeof(float)),
          output(run, memory, index + 1, shape, sizeof(std::int64_t))};
}

// `memory` is handed back when everything is queued: ONNX Runtime gives it out again to work on the same stream, which
// runs later.
Launcher launcher(const Run& run, DeviceMemory& memory, Type type) {
  return {*shipped_kernels(), run.stream(), kernel_suffix(type),
          [&memory](std::size_t bytes) { return memory.allocate(bytes); }};
}

Pair require_pair(const Tensor& query, const Tensor& support) {
  require(query.shape.size() == 2 && support.shape.size() == 3, "query has 2 axes, support 3");
  require(query.size(1) == support.size(2), "query and support differ in channels");
  require(query.size(0) > 0 && support.size(1) > 0, "there are no rows");
  return {support.size(0), query.size(0), support.size(1), query.size(1)};
}

class MaskedMax : public Kernel {
 public:
  explicit MaskedMax(const Attributes& attributes) : exclude_(attributes.integer("exclude") != 0) {}

  void compute(const Run& run) override {
    const Tensor query(run, 0), support(run, 1), weights(run, 2);
    const Pair sizes = require_pair(query, support);
    require(weights.shape.size() == 3 && weights.size(0) == sizes.shots && weights.size(2) == sizes.support_rows,
            "weights and support differ in shots or rows");
    const Shape shape{sizes.shots, weights.size(1), sizes.query_rows};
    DeviceMemory memory(run);
    masked_max(launcher(run, memory, query.type), sizes, weights.size(1), exclude_, query.data, support.data,
               weights.data, maxima(run, memory, 0, shape));
  }

 private:
  bool exclude_;
};

class MutualArgmax : public Kernel {
 public:
  explicit MutualArgmax(const Attributes&) {}

  void compute(const Run& run) override {
    const Tensor query(run, 0), support(run, 1);
    const Pair sizes = require_pair(query, support);
    const Shape of_rows{sizes.shots, sizes.query_rows}, of_columns{sizes.shots, sizes.support_rows};
    DeviceMemory memory(run);
    mutual_argmax(launcher(run, memory, query.type), sizes, query.data, support.data, maxima(run, memory, 0, of_rows),
                  maxima(run, memory, 2, of_columns));
  }
};

class CorrelationProjection : public Kernel {
 public:
  explicit CorrelationProjection(const Attributes&) {}

  void compute(const Run& run) override {
    const Tensor query(run, 0), support(run, 1), projection(run, 2);
    const Pair sizes = require_pair(query, support);
    require(projection.shape.size() == 3 && projection.size(0) == sizes.shots &&
                projection.size(1) == sizes.support_rows,
            "projection and support differ in shots or rows");
    const Shape shape{sizes.shots, sizes.query_rows, projection.size(2)};
    DeviceMemory memory(run);
    correlation_projection(launcher(run, memory, query.type), sizes, projection.size(2), query.data, support.data,
                           projection.data, output(run, memory, 0, shape, sizeof(float)));
  }
};

}  // namespace

const std::vector<CudaOperation>& cuda_operations() {
  static const std::vector<CudaOperation> operations{
      {"MaskedMax", "masked_max_", create<MaskedMax>},
      {"MutualArgmax", "mutual_argmax_", create<MutualArgmax>},
      {"CorrelationProjection", "correlation_projection_w64_", create<CorrelationProjection>},
  };
  return operations;
}

KernelLibrary* shipped_kernels() {
  static const char* const folder = std::getenv("FSSDEPLOY_CUDA_KERNELS");
  if (folder == nullptr) return nullptr;
  static KernelLibrary kernels(folder);
  return &kernels;
}

const char* kernel_suffix(Type type) { return type == kHalf ? "fp16" : type == kBfloat ? "bf16" : "fp32"; }

}  // namespace fssdeploy::ort
