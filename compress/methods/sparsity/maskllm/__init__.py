"""MaskLLM: N:M masks learned by gradients."""
