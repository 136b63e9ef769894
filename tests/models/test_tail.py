"""Logits from the hidden states that leave the last block are the model's own."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, GPT2Config, LlamaConfig

from compress.models.anatomy import anatomy_of
from compress.models.halves import tail_logits, trunk_hidden

CONFIGS = {
    # The one's blocks return a tuple, the others' a tensor; nobody has run one before.
    "bloom": BloomConfig(vocab_size=50, hidden_size=16, n_layer=2, n_head=2),
    "gpt2": GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2),
    "llama": LlamaConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=16,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", CONFIGS)
def test_equal_logits_and_gradients_that_flow(kind):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind]).eval()
    batch, anatomy = {"input_ids": torch.arange(3, 15).reshape(2, 6)}, anatomy_of(model)
    hidden, _ = trunk_hidden(model, anatomy, batch)
    hidden = hidden.detach().requires_grad_()
    logits = tail_logits(model, anatomy, batch, hidden)
    torch.testing.assert_close(logits, model(**batch).logits)
    assert type(logits) is torch.Tensor
    logits.sum().backward()
    assert hidden.grad.abs().sum() > 0
