"""The file by which a server without NVIDIA's ONNX Runtime backend finds ours: <backends>/onnxruntime/model.py."""

from fssdeploy.serving.models.graph import OnnxRuntimeBackend as TritonPythonModel

__all__ = ["TritonPythonModel"]
