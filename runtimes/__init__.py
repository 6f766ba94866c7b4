"""Run a bundle with onnxruntime: no torch, no transformers, no onnx."""
