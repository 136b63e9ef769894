"""The Python API on live models."""

from __future__ import annotations

import inspect

import pytest
import torch

import compress
from compress.methods.sparsity.magnitude import Magnitude


def test_three_lines(tiny, tokens, helpers, tmp_path):
    model = compress.apply(tiny("llama"), [{"method": "wanda", "pattern": "2:4"}], tokens)
    folder = compress.save(model, tmp_path / "smaller")
    again, tokenizer = compress.load(folder)
    assert tokenizer is None
    assert helpers.difference(helpers.logits(again, tokens), helpers.logits(model, tokens)) < 1e-5


def test_steps_in_every_form(tiny, helpers, tokens):
    logits = [
        helpers.logits(compress.apply(tiny("llama"), [step]), tokens)
        for step in ("magnitude", {"method": "magnitude"}, Magnitude(), Magnitude(sparsity=0.5))
    ]
    assert all(torch.equal(x, logits[0]) for x in logits)


def test_it_works_in_place_and_keeps_the_mode(tiny, tokens):
    model = tiny("llama").train()
    assert compress.apply(model, ["wanda"], tokens) is model and model.training
    assert not compress.apply(model.eval(), ["magnitude"]).training


def test_calibration_in_every_form(tiny, tokens, helpers):
    step = [{"method": "sparsegpt", "pattern": "2:4"}]
    forms = (
        tokens,
        list(tokens.split(1)),
        [{"input_ids": part} for part in tokens.split(1)],
        ({"input_ids": t, "attention_mask": torch.ones_like(t)} for t in tokens.split(1)),
    )
    found = [helpers.logits(compress.apply(tiny("llama"), step, form), tokens) for form in forms]
    assert all(helpers.difference(x, found[0]) < 1e-5 for x in found)


def test_refused_steps_leave_the_model_alone(tiny, tokens):
    model = tiny("llama")
    before = {n: p.clone() for n, p in model.named_parameters()}
    for steps in (["magnitude", "wanda"], ["magnitude", {"method": "rtn", "group_size": 128}]):
        with pytest.raises(compress.CompressError, match="steps.1"):
            compress.apply(model, steps)
    with pytest.raises(compress.CompressError, match=r"\[samples, length\]"):
        compress.apply(model, ["wanda"], tokens[0])
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_depth_on_a_live_model_generates(tiny, tokens):
    model = compress.apply(tiny("llama"), [{"method": "shortgpt", "remove": 1}], tokens)
    assert model.config.num_hidden_layers == len(model.model.layers) == 2
    out = model.generate(tokens[:1, :4], max_new_tokens=4, do_sample=False, pad_token_id=0)
    cached = model.generate(
        tokens[:1, :4], max_new_tokens=4, do_sample=False, pad_token_id=0, use_cache=False
    )
    assert torch.equal(out, cached)


def test_width_on_a_live_model_generates(tiny, tokens):
    steps = [{"method": "ffn_width", "share": 0.25}, {"method": "head_width", "share": 0.5}]
    model = compress.apply(tiny("llama"), steps, tokens)
    assert model.config.intermediate_size == 48
    out = model.generate(tokens[:1, :4], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert out.shape[1] > 4


def test_save_refuses_a_folder_with_something_in_it(tiny, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(compress.CompressError, match="empty"):
        compress.save(tiny("llama"), tmp_path)


def test_inspect_live_and_on_disk_agree(tiny, checkpoint):
    live, stored = compress.inspect(tiny("bert")), compress.inspect(checkpoint("bert"))
    assert live["blocks"] == stored["blocks"] and live["parameters"] == stored["parameters"]
    count = sum(p.numel() for p in tiny("bert").parameters())
    assert live["parameters"] == count


def test_methods_and_names():
    assert set(compress.__all__) <= set(dir(compress))
    assert all(compress.list_methods().values())
    with pytest.raises(AttributeError, match="no attribute 'pruned'"):
        compress.pruned  # noqa: B018


def test_signatures_name_every_option():
    for name in ("load", "plan", "run", "apply", "save", "evaluate", "compare", "inspect"):
        parameters = inspect.signature(getattr(compress, name)).parameters.values()
        assert {p.kind for p in parameters} <= {
            inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
        }, name  # fmt: skip


def test_progress_is_shown_on_request(tiny, tokens, capsys):
    compress.apply(tiny("llama"), ["magnitude"])
    assert not capsys.readouterr().err
    compress.apply(tiny("llama"), ["magnitude"], progress=True)
    assert "step 1/1 magnitude (solve): 3/3" in capsys.readouterr().err


def test_a_limit_of_memory_may_be_a_size(checkpoint):
    with pytest.raises(compress.CompressError, match="within 0.00 GB"):
        compress.plan({"model": str(checkpoint("llama")), "steps": ["magnitude"]}, max_memory="1MB")
