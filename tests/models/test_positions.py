"""The longest sequence that a model reads, by its config and in truth."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    BertConfig,
    BloomConfig,
    EsmConfig,
    GPT2Config,
    MPNetConfig,
    RobertaConfig,
    T5Config,
)
from transformers.models.auto.modeling_auto import AutoModel

from compress.models.positions import positions_of

SHAPE = {
    "vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 16, "max_position_embeddings": 12, "pad_token_id": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    "config",
    [
        BertConfig(**SHAPE),
        RobertaConfig(**SHAPE),
        MPNetConfig(**SHAPE),
        EsmConfig(**SHAPE, mask_token_id=4),
        GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=12),
    ],
    ids=lambda c: c.model_type,
)
def test_so_many_and_not_one_more(config):
    model, longest = AutoModel.from_config(config).eval(), positions_of(config)
    model(input_ids=torch.full((1, longest), 7))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, longest + 1), 7))


@pytest.mark.parametrize("config", [BloomConfig(), T5Config()], ids=lambda c: c.model_type)
def test_none_without_a_limit(config):
    assert positions_of(config) is None
