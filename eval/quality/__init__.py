"""How good a model is: perplexity, masked likelihood and lm-eval tasks."""
