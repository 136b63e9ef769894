"""Results in the formats of other runtimes: GGUF (llama.cpp) and ONNX (onnxruntime)."""
