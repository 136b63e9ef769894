"""Everything that learns, in float32 and in bfloat16, on any processor."""

from __future__ import annotations

import json

import pytest
import torch

from compress.engine.runner import run
from compress.models.sources.source import load_model
from compress.planning.recipe import parse_recipe
from compress.train import loop, options

PRECISIONS = ("float32", "bfloat16")


def wanted(sections, text, kind: str, **training):
    """A recipe that trains a model, learns masks in both scopes, and tunes what they keep."""
    short = {"steps": 3, "batch": 2, "learning_rate": 1e-2, **training}
    learned = {
        "method": "maskllm",
        "training": {**short, "clip": None},
        "end_to_end": short,
        "distillation": {"labels": 0.5, "logits": 0.5},
        "tuning": {**short, "learning_rate": 1e-3},
        "tuning_scope": "model",
    }
    data = {"images": {"source": "digits"}} if kind == "digits" else {"text": {"source": str(text)}}
    return parse_recipe(
        {
            "name": "learns",
            "model": {"train": getattr(sections, kind)(training=short)},
            "calibration": {**data, "samples": 6, "length": 16},
            "steps": [learned],
        }
    )


@pytest.mark.parametrize("kind", ["causal", "masked", "digits"])
def test_all_that_learns_learns_in_either_precision(kind, sections, text, tmp_path):
    found = {}
    for precision in PRECISIONS:
        out = tmp_path / precision
        model = load_model(run(wanted(sections, text, kind, precision=precision), out).model)
        weights = [m.weight for n, m in model.named_modules() if n.endswith(("k_proj", "key"))]
        assert weights and all(
            int((w != 0).unflatten(1, (-1, 4)).sum(-1).max()) <= 2 and w.isfinite().all()
            for w in weights
        )
        lines = (out / "base" / "training.jsonl").read_text().splitlines()
        found[precision] = [json.loads(line)["loss"] for line in lines]
    assert found["bfloat16"] == pytest.approx(found["float32"], rel=0.05)
    assert found["bfloat16"] != found["float32"]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_blocks_tune_and_refit_in_either_precision(precision, tiny, tokens):
    import compress

    training = {"steps": 2, "batch": 2, "clip": None, "precision": precision}
    step = {"method": "maskllm", "training": training, "tuning": training, "least_squares": True}
    weight = compress.apply(tiny("gpt2"), [step], tokens).transformer.h[0].mlp.c_fc.weight.t()
    assert weight.isfinite().all()
    assert bool(((weight != 0).unflatten(1, (-1, 4)).sum(-1) == 2).all())


def test_a_run_goes_on_in_the_precision_that_it_began_in(sections, text, tmp_path, monkeypatch):
    used = []

    def compute_dtype(precision, device):
        used.append(precision)
        return options.compute_dtype(precision, device)

    monkeypatch.setattr(loop, "compute_dtype", compute_dtype)
    recipe, out = wanted(sections, text, "causal"), tmp_path / "run"
    with monkeypatch.context() as began, pytest.raises(KeyboardInterrupt):
        began.setattr(options, "fast_bfloat16", lambda _device: True)
        began.setattr("compress.engine.job.Job.compress", _interrupted)
        run(recipe, out)
    assert used == ["bfloat16"]
    assert json.loads((out / "lock.json").read_text())["kept"]["precision"] == "bfloat16"
    monkeypatch.setattr(options, "fast_bfloat16", lambda _device: False)
    run(recipe, out)
    assert len(used) == 5 and set(used) == {"bfloat16"}  # two blocks, the model, its tuning
    assert options.compute_dtype("auto", torch.device("cpu")) == torch.float32


def _interrupted(_job) -> None:
    raise KeyboardInterrupt
