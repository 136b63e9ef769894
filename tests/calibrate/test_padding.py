"""What a method does to a model does not depend on how much padding its batches have."""

from __future__ import annotations

import pytest
import torch

import compress

_TRAINING = {"steps": 4, "batch": 1, "precision": "float32"}
STEPS = (
    {"method": "wanda", "pattern": "2:4"},
    {"method": "sparsegpt", "pattern": "2:4"},
    {"method": "gptq", "bits": 4, "group_size": 16},
    {"method": "ffn_width", "share": 0.25},
    {"method": "head_width", "share": 0.5, "importance": "activation"},
    {"method": "asvd", "ratio": 0.5},
    {"method": "shortgpt", "remove": 1},
    {"method": "sleb", "remove": 1},
    {"method": "maskllm", "training": _TRAINING, "tuning": _TRAINING},
)


@pytest.mark.parametrize("model_type", ["llama", "bert"])
@pytest.mark.parametrize("step", STEPS, ids=lambda step: step["method"])
def test_padding_is_no_data(step, model_type, tiny, tokens):
    if model_type == "bert" and step["method"] == "maskllm":
        pytest.skip("the same code as for llama")
    lengths = [24, 10, 17, 20]
    plain, padded = [], []
    for row, length in zip(tokens, lengths, strict=False):
        ids = row[None, :length]
        # Labels, so that nothing is left to chance for the masked model.
        plain.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids})
        wide = torch.zeros(1, 40, dtype=ids.dtype)
        wide[:, :length] = ids
        mask = (torch.arange(40) < length).long()[None]
        padded.append({"input_ids": wide, "attention_mask": mask, "labels": wide})
    one, other = (
        compress.apply(tiny(model_type, num_hidden_layers=2), [step], batches, compute="float32")
        for batches in (plain, padded)
    )
    weights = other.state_dict()
    assert one.state_dict().keys() == weights.keys()
    for name, value in one.state_dict().items():
        assert torch.allclose(value.float(), weights[name].float(), rtol=2e-3, atol=2e-4), name
