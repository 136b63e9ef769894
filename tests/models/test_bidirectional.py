"""Causal classes that ``config.is_causal=False`` lets look ahead: nothing may lose the flag."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import compress

FAMILIES = ("llama", "qwen3", "gpt2")
# One of each kind of change, each on a family; tests/conformance runs all methods on one of them.
STEPS = [
    {"method": "wanda", "pattern": "2:4"},
    {"method": "rtn", "bits": 4, "group_size": 16},
    {"method": "shortgpt", "remove": 1},
    {"method": "ffn_width", "share": 0.25},
    {"method": "svd_llm", "rank": 8},
]


def sees_the_last_token(model, tokens) -> bool:
    """Whether the logits of the first position depend on the last token."""
    other = tokens.clone()
    other[:, -1] = (tokens[:, -1] - 7 + 1) % 200 + 7
    with torch.no_grad():
        first = model.eval()(input_ids=tokens).logits[:, 0]
        second = model(input_ids=other).logits[:, 0]
    return not torch.equal(first, second)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("causal", [True, False])
def test_the_flag_decides(family, causal, tiny, tokens, tmp_path):
    model = tiny(family) if causal else tiny(family, is_causal=False)
    assert sees_the_last_token(model, tokens) is not causal
    compress.save(model, tmp_path)
    assert sees_the_last_token(compress.load(tmp_path)[0], tokens) is not causal


@pytest.mark.parametrize(
    ("step", "family"),
    list(zip(STEPS, itertools.cycle(FAMILIES), strict=False)),
    ids=lambda value: value["method"] if isinstance(value, dict) else value,
)
def test_steps_keep_it_live_and_streamed(
    family, step, tiny, checkpoint, tokens, text, helpers, tmp_path
):
    model = compress.apply(tiny(family, is_causal=False), [step], tokens)
    assert sees_the_last_token(model, tokens)
    compress.save(model, tmp_path / "live")
    run = compress.run(
        helpers.recipe(checkpoint(family, is_causal=False), [step], text), tmp_path / "run"
    )
    for folder in (tmp_path / "live", run.model):
        assert json.loads((folder / "config.json").read_text())["is_causal"] is False
        assert sees_the_last_token(AutoModelForCausalLM.from_pretrained(folder), tokens)


@pytest.mark.parametrize("family", FAMILIES)
def test_calibration_runs_the_model_as_it_is(family, tiny, tokens, helpers):
    """Inputs of the last block, where attention has mixed them, are those of the whole model."""
    seen = {}
    for causal in (True, False):
        model = tiny(family) if causal else tiny(family, is_causal=False)
        compress.apply(model, [{"method": "sparsegpt", "pattern": "2:4"}], tokens)
        seen[causal] = model
    weights = [dict(seen[c].named_parameters()) for c in (True, False)]
    first = next(n for n in weights[0] if ".0." in n and ("q_proj" in n or "c_attn.weight" in n))
    last = next(n for n in weights[0] if ".2." in n and ("q_proj" in n or "c_attn.weight" in n))
    # Before any attention the two models compute the same; behind it they do not.
    assert torch.equal(weights[0][first], weights[1][first])
    assert not torch.equal(weights[0][last], weights[1][last])


def test_inspect_and_masks(checkpoint, helpers, tokens, tmp_path):
    folder = checkpoint("llama", is_causal=False)
    assert compress.inspect(folder)["family"] == "table"
    steps = [{"method": "magnitude", "pattern": "2:4"}]
    run = compress.run(helpers.recipe(folder, steps), tmp_path / "run")
    made = compress.apply_mask(run.model / "masks.safetensors", folder, tmp_path / "out")
    assert sees_the_last_token(compress.load(made.folder)[0], tokens)
