"""Calibration passes in float32 and in bfloat16: close results, float32 solvers, nothing left."""

from __future__ import annotations

import json

import pytest
import torch

import compress
from compress.errors import CompressError
from compress.system.precision import fast_bfloat16

_TRAINING = {"steps": 4, "batch": 1, "precision": "float32"}
STEPS = (
    {"method": "wanda", "pattern": "2:4"},
    {"method": "sparsegpt", "pattern": "2:4"},
    {"method": "gptq", "bits": 4, "group_size": 16},
    {"method": "svd_llm", "ratio": 0.6},
    {"method": "ffn_width", "share": 0.25},
    {"method": "shortgpt", "remove": 1},
    {"method": "sleb", "remove": 1},
    {"method": "maskllm", "training": _TRAINING},
)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("step", STEPS, ids=lambda step: step["method"])
def test_sixteen_bits_change_little(step, model_type, tiny, tokens, helpers):
    if model_type != "llama" and step["method"] in ("maskllm", "sleb"):
        pytest.skip("the same code as for llama")
    before, cost = helpers.logits(tiny(model_type), tokens), {}
    for compute in ("float32", "bfloat16"):
        model = compress.apply(tiny(model_type), [step], tokens, compute=compute)
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        cost[compute] = float((helpers.logits(model, tokens) - before).norm())
    # Masks that were nearly as good may be others now; what they cost may not.
    assert cost["bfloat16"] < 1.25 * cost["float32"]


def test_weights_keep_all_their_bits(tiny, tokens):
    model = tiny("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    compress.apply(model, [{"method": "wanda", "pattern": "2:4"}], tokens, compute="bfloat16")
    for name, value in model.state_dict().items():
        assert bool(((value == before[name]) | (value == 0)).all())


def test_runs_keep_what_they_began_with(checkpoint, text, helpers, tmp_path, monkeypatch):
    steps = [{"method": "wanda", "pattern": "2:4"}]
    recipe = helpers.recipe(checkpoint("llama"), steps, text, evaluation=helpers.evaluation(text))
    monkeypatch.setattr("compress.system.precision.fast_bfloat16", lambda _device: True)
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(
            "compress.engine.job.run_step", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            compress.run(recipe, out)
    monkeypatch.setattr("compress.system.precision.fast_bfloat16", lambda _device: False)
    seen = []
    from compress.engine.steps import run_step

    def watch(method, context):
        seen.append(context.compute)
        return run_step(method, context)

    monkeypatch.setattr("compress.engine.job.run_step", watch)
    result = compress.run(recipe, out)
    assert seen == [torch.bfloat16]
    assert json.loads((out / "lock.json").read_text())["kept"]["compute"] == "bfloat16"
    assert result.report.run.compute == "bfloat16"
    assert "bfloat16" in (out / "report.md").read_text()


def test_measuring_takes_a_moment():
    assert fast_bfloat16("cpu") in (True, False)
    assert fast_bfloat16("meta") is False


def test_unknown_types_are_refused(tiny, tokens):
    with pytest.raises(CompressError, match="compute to be one of"):
        compress.apply(tiny("llama"), ["wanda"], tokens, compute="int8")
