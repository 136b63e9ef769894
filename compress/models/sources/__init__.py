"""Where a model comes from: a folder, a hub, a GGUF file, a wheel."""
