// One entry of the library: an operation, for one type of its first input and one execution provider.
#pragma once

#include <memory>

#include "driver.h"
#include "onnx_runtime.h"

namespace fssdeploy::ort {

// A node of a session. compute() throws where its inputs do not fit.
class Kernel {
 public:
  virtual ~Kernel() = default;
  virtual void compute(const Run& run) = 0;
};

// What a place of an operation holds: the type that the entry is for, any floating type, or always the same.
enum class Place { same, floating, float32, int64, half_or_same };

using Create = std::unique_ptr<Kernel> (*)(const Attributes& attributes);

struct Operation {
  const char* name;
  std::vector<Place> inputs, outputs;
  Create create;
};

// An operation that has kernels for GPUs, shipped under the name `kernel` with the type behind it ("fp16").
struct CudaOperation {
  const char* name;
  const char* kernel;
  Create create;
};

template <typename Node>
std::unique_ptr<Kernel> create(const Attributes& attributes) {
  return std::make_unique<Node>(attributes);
}

class Operator : public OrtCustomOp {
 public:
  // `provider` is null for the CPU; `operation` must outlive this.
  Operator(const Operation& operation, Type type, const char* provider);

 private:
  Type type_of(Place place) const;

  const Operation& operation_;
  Type type_;
  const char* provider_;
};

// On the CPU, for float32, float16 and bfloat16.
const std::vector<Operation>& cpu_operations();
const std::vector<CudaOperation>& cuda_operations();

// The kernels in the folder that FSSDEPLOY_CUDA_KERNELS names, null if it is not set; throws if it cannot be read.
KernelLibrary* shipped_kernels();
// How the names of kernels end for this type.
const char* kernel_suffix(Type type);

}  // namespace fssdeploy::ort
