#include "operator.h"

namespace fssdeploy::ort {
namespace {

// Of an operation whose output is float16 or like its input, as its attribute `half` says. ONNX Runtime asks the first
// entry of a name on behalf of all types, hence the type comes from the node.
OrtStatus* infer_half_or_same(const OrtCustomOp*, OrtShapeInferContext* context) noexcept {
  try {
    const OrtOpAttr* attribute = nullptr;
    check(api->ShapeInferContext_GetAttribute(context, "half", &attribute));
    std::int64_t half = 0;
    std::size_t size = 0;
    check(api->ReadOpAttr(attribute, ORT_OP_ATTR_INT, &half, sizeof half, &size));
    OrtTensorTypeAndShapeInfo* info = nullptr;  // the context owns it
    check(api->ShapeInferContext_GetInputTypeShape(context, 0, &info));
    if (half == 0) return api->ShapeInferContext_SetOutputTypeShape(context, 0, info);
    std::size_t rank = 0;
    check(api->GetDimensionsCount(info, &rank));
    Shape shape(rank);
    check(api->GetDimensions(info, shape.data(), rank));
    std::vector<const char*> names(rank);
    check(api->GetSymbolicDimensions(info, names.data(), rank));
    OrtTensorTypeAndShapeInfo* result = nullptr;
    check(api->CreateTensorTypeAndShapeInfo(&result));
    const std::unique_ptr<OrtTensorTypeAndShapeInfo, void (*)(OrtTensorTypeAndShapeInfo*)> owned(
        result, [](OrtTensorTypeAndShapeInfo* held) { api->ReleaseTensorTypeAndShapeInfo(held); });
    check(api->SetTensorElementType(result, kHalf));
    check(api->SetDimensions(result, shape.data(), rank));
    check(api->SetSymbolicDimensions(result, names.data(), rank));
    return api->ShapeInferContext_SetOutputTypeShape(context, 0, result);
  } catch (...) {
    return status_of_exception();
  }
}

}  // namespace

Type Operator::type_of(Place place) const {
  switch (place) {
    case Place::same:
      return type_;
    case Place::float32:
      return kFloat;
    case Place::int64:
      return kInt64;
    default:
      return kAny;
  }
}

Operator::Operator(const Operation& operation, Type type, const char* provider)
    : OrtCustomOp{}, operation_(operation), type_(type), provider_(provider) {
  using Self = const OrtCustomOp*;
  static const auto self = [](Self op) { return static_cast<const Operator*>(op); };
  static const auto one = [](Self) { return 1; };
  version = kApiVersion;
  GetName = [](Self op) { return self(op)->operation_.name; };
  GetExecutionProviderType = [](Self op) { return self(op)->provider_; };
  GetInputTypeCount = [](Self op) { return self(op)->operation_.inputs.size(); };
  GetInputType = [](Self op, std::size_t i) { return self(op)->type_of(self(op)->operation_.inputs[i]); };
  GetOutputTypeCount = [](Self op) { return self(op)->operation_.outputs.size(); };
  GetOutputType = [](Self op, std::size_t i) { return self(op)->type_of(self(op)->operation_.outputs[i]); };
  GetInputCharacteristic = [](Self, std::size_t) { return INPUT_OUTPUT_REQUIRED; };
  GetOutputCharacteristic = [](Self, std::size_t i) {
    return i == 0 ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_OPTIONAL;
  };
  GetInputMemoryType = [](Self, std::size_t) { return OrtMemTypeDefault; };
  GetVariadicInputMinArity = GetVariadicOutputMinArity = one;
  GetVariadicInputHomogeneity = GetVariadicOutputHomogeneity = one;
  GetStartVersion = one;
  GetEndVersion = one;
  CreateKernelV2 = [](Self op, const OrtApi*, const OrtKernelInfo* info, void** kernel) -> OrtStatus* {
    try {
      *kernel = self(op)->operation_.create(Attributes(info)).release();
      return nullptr;
    } catch (...) {
      return status_of_exception();
    }
  };
  KernelComputeV2 = [](void* kernel, OrtKernelContext* context) -> OrtStatus* {
    try {
      static_cast<Kernel*>(kernel)->compute(Run(context));
      return nullptr;
    } catch (...) {
      return status_of_exception();
    }
  };
  KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  if (operation.outputs[0] == Place::half_or_same) InferOutputShapeFn = infer_half_or_same;
}

}  // namespace fssdeploy::ort
