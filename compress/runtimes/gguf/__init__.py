"""GGUF files, which llama.cpp runs: github.com/ggml-org/ggml, docs/gguf.md."""
