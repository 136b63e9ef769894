"""ONNX graphs that onnxruntime runs, and a model that runs them."""
