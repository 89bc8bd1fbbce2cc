// What ONNX Runtime calls when a session registers the library.
#include <deque>
#include <string>

#include "operator.h"

using namespace fssdeploy::ort;

namespace {

// On the CPU, all operations. With kernels for GPUs, those that have some, and of these the CPU kernels for what is
// left: an operation that the library does not know keeps its body, which runs on the GPU.
struct Domain {
  OrtCustomOpDomain* domain = nullptr;
  // Never move: ONNX Runtime keeps the addresses of operators, and they those of operations.
  std::deque<Operation> on_gpu;
  std::deque<Operator> operators;

  Domain() {
    check(api->CreateCustomOpDomain("fssdeploy", &domain));
    for (const Operation& operation : cpu_operations())
      if (add_on_gpu(operation) || shipped_kernels() == nullptr)
        for (const Type type : kTypes) operators.emplace_back(operation, type, nullptr);
    for (const Operator& entry : operators) check(api->CustomOpDomain_Add(domain, &entry));
  }

 private:
  static constexpr Type kTypes[] = {kFloat, kHalf, kBfloat};

  // Whether there are kernels of it for GPUs.
  bool add_on_gpu(const Operation& operation) {
    const fssdeploy::KernelLibrary* kernels = shipped_kernels();
    for (const CudaOperation& other : cuda_operations()) {
      if (kernels == nullptr || std::string(other.name) != operation.name) continue;
      on_gpu.push_back({operation.name, operation.inputs, operation.outputs, other.create});
      for (const Type type : kTypes)
        if (kernels->find(std::string(other.kernel) + kernel_suffix(type)) != nullptr)
          operators.emplace_back(on_gpu.back(), type, "CUDAExecutionProvider");
      return true;
    }
    return false;
  }
};

}  // namespace

extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(OrtSessionOptions* options,
                                                                               const OrtApiBase* base) {
  api = base->GetApi(kApiVersion);
  if (api == nullptr) return base->GetApi(1)->CreateStatus(ORT_FAIL, "fssdeploy needs ONNX Runtime 1.17 or newer");
  try {
    static const Domain domain;  // for all sessions of the process; sessions may outlive each other in any order
    return api->AddCustomOpDomain(options, domain.domain);
  } catch (...) {
    return status_of_exception();
  }
}
