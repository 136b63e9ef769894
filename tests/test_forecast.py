"""What a plan says of a step's memory against every tensor that is alive while it runs."""

from __future__ import annotations

import gc
import shutil
import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, MixtralConfig, MixtralForCausalLM

import compress
from compress.engine.steps import run_step
from compress.errors import CompressError
from compress.eval.bench.llama import write_llama
from compress.linear.statistics import GRAM
from compress.methods.catalog import BUILT_IN
from compress.methods.passes import Survey
from compress.planning import forecast

_LEARNING = {"steps": 2, "batch": 1, "precision": "float32"}
OPTIONS = {
    "shortgpt": {"remove": 1},
    "sleb": {"remove": 1},
    "drop_blocks": {"blocks": [1]},
    "flatten": {"remove": 1},
    "fuse": {"remove": 1, "training": _LEARNING},
    "ffn_width": {"share": 0.25},
    "head_width": {"share": 0.25},
    "drop_experts": {"keep": 2},
    "svd": {"ratio": 0.3},
    "asvd": {"ratio": 0.3},
    "svd_llm": {"ratio": 0.3},
    "drone": {"ratio": 0.3},
    "fwsvd": {"ratio": 0.3, "windows": 1},
    "dense_sparse": {"ratio": 0.5, "rounds": 2, "refine": _LEARNING},
    "maskllm": {"training": _LEARNING, "prior": "magnitude"},
    "distill": {"training": _LEARNING},
    "vib": {"share": 0.3, "training": _LEARNING, "tuning": None, "start_batches": 2},
    "stf": {"training": _LEARNING, "tuning": _LEARNING},
}
# What a method needs to work on.
FIRST = {
    "stf": {"method": "dense_sparse", "ratio": 0.5, "rounds": 1, "coding": "correlation",
            "weighting": "plain"},
}  # fmt: skip


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of all storages that operations have made and that are still alive.

    Unlike resident memory it does not depend on allocators, libraries or earlier tests.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive: set[int] = set()
        self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor) and value.device.type != "meta":
                self._count(value.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.alive:
            return
        self.alive.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self.alive.discard(key)
        self.now -= size


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Blocks of 4 MB in float32, stored in bfloat16: exact counts need no large ones."""
    config = LlamaConfig(
        hidden_size=256, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, vocab_size=300, max_position_embeddings=64,
        tie_word_embeddings=False,
    )  # fmt: skip
    return write_llama(tmp_path_factory.mktemp("memory") / "llama", config, torch.bfloat16)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Blocks that weigh little beside what 24 sequences leave in them."""
    config = LlamaConfig(
        hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, vocab_size=300, max_position_embeddings=64,
    )  # fmt: skip
    return write_llama(tmp_path_factory.mktemp("memory") / "small", config, torch.float32)


@pytest.fixture(scope="module")
def mixture(model, tmp_path_factory):
    """The same with four experts in each block."""
    config = MixtralConfig(
        hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, vocab_size=300, max_position_embeddings=64, num_local_experts=4,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("memory") / "mixtral"
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors*", "config.json"))
    MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("name", "compute"),
    [(name, "float32") for name in sorted(BUILT_IN)]
    + [(name, "bfloat16") for name in ("wanda", "gptq", "shortgpt", "sleb")],
)
def test_steps_hold_what_was_planned(name, compute, request, text, tmp_path, monkeypatch):
    model = request.getfixturevalue("mixture" if name == "drop_experts" else "model")
    step = {"method": name, **OPTIONS.get(name, {})}
    held, planned = held_and_planned(step, compute, model, text, tmp_path, monkeypatch)
    assert held <= 1.1 * planned, f"{held / 1e6:.1f} of {planned / 1e6:.1f} MB"


def test_dense_weights_that_are_factorised_while_they_learn(model, text, tmp_path, monkeypatch):
    step = {"method": "stf", "mode": "proxy", "training": _LEARNING, "distillation": {}}
    held, planned = held_and_planned(step, "float32", model, text, tmp_path, monkeypatch)
    assert 0.3 * planned < held <= 1.1 * planned, f"{held / 1e6:.1f} of {planned / 1e6:.1f} MB"


@pytest.mark.parametrize("train", ["full", "lora"])
def test_a_model_with_its_teacher_holds_what_was_planned(train, model, text, tmp_path, monkeypatch):
    step = {"method": "distill", "scope": "model", "train": train, "teacher": "live",
            "training": _LEARNING}  # fmt: skip
    held, planned = held_and_planned(step, "float32", model, text, tmp_path, monkeypatch)
    assert 0.3 * planned < held <= 1.1 * planned, f"{held / 1e6:.1f} of {planned / 1e6:.1f} MB"


def _training(batch: int, **options) -> dict[str, Any]:
    return {**_LEARNING, "steps": 1, "batch": batch, **options}


DISTILLED = {"method": "distill", "scope": "model", "teacher": "live"}
MANY = {
    "whole model": {**DISTILLED, "training": _training(24)},
    "recomputed": {**DISTILLED, "training": _training(24, gradient_checkpointing=True)},
    "blocks": {"method": "dense_sparse", "ratio": 0.5, "rounds": 1, "coding": "correlation",
               "refine": _training(24)},
    "outputs": {"method": "vib", "share": 0.3, "units": ["neurons"], "tuning": None,
                "start_batches": 1},
}  # fmt: skip


@pytest.mark.parametrize("name", MANY)
def test_many_sequences_at_once_hold_what_was_planned(name, small, text, tmp_path, monkeypatch):
    calibration = {"samples": 24} if name == "outputs" else {}
    held, planned = held_and_planned(
        MANY[name], "float32", small, text, tmp_path, monkeypatch, **calibration
    )
    assert 0.3 * planned < held <= planned, f"{held / 1e6:.1f} of {planned / 1e6:.1f} MB"


@pytest.mark.parametrize(
    "step",
    [DISTILLED, {"method": "distill"}, {"method": "maskllm", "scope": "model"}],
    ids=["model", "block", "masks"],
)
def test_a_training_of_too_many_sequences_at_once_is_refused(step, small, text):
    def peak(limit=None, **options) -> int:
        calibration = {"text": {"source": str(text)}, "samples": 4, "length": 32}
        steps = [{**step, "training": _training(256, **options)}]
        recipe = {"model": str(small), "steps": steps, "calibration": calibration}
        return compress.plan(recipe, max_memory=limit).peak_bytes

    few, many = peak(micro_batch=2), peak(limit=10**12)
    assert many > few + 250 * 2 * 4 * 32 * 192  # two states of each FFN
    peak(limit=many - 2**20, micro_batch=2)
    with pytest.raises(CompressError, match="micro_batch"):
        peak(limit=many - 2**20)


def test_the_disk_has_room_for_what_a_teacher_says(model, text):
    def room(**options) -> int:
        step = {"method": "distill", "scope": "model", "training": _LEARNING, **options}
        calibration = {"text": {"source": str(text)}, "samples": 2, "length": 32}
        return compress.plan(
            {"model": str(model), "steps": [step], "calibration": calibration}
        ).disk_bytes

    assert room(teacher="cached", top_k=10) - room(teacher="live") == 2 * 32 * (8 * 10 + 4)


def test_a_survey_holds_what_was_planned(model, text, register_observer, tmp_path, monkeypatch):
    # The Gram matrices of all sites of a block, which are there at once.
    survey = Survey(lambda survey: len(survey.statistics), lambda *_: None, lambda _site: GRAM)
    register_observer(survey)
    step = {"method": "observe"}
    held, planned = held_and_planned(step, "float32", model, text, tmp_path, monkeypatch)
    grams = 4 * (1024**2 + 3 * 256**2)
    assert grams < held <= 1.1 * planned, f"{held / 1e6:.1f} of {planned / 1e6:.1f} MB"


def held_and_planned(
    step, compute, model, text, tmp_path, monkeypatch, **calibration
) -> tuple[int, int]:
    """Bytes of tensors at a step's peak, and what the plan says."""
    first = [FIRST[step["method"]]] if step["method"] in FIRST else []
    recipe = {
        "model": str(model), "steps": [*first, step], "compute": compute,
        "calibration": {"text": {"source": str(text)}, "samples": 2, "length": 32, **calibration},
    }  # fmt: skip
    found = []

    def watched(method, context):
        if method.name != step["method"]:
            return run_step(method, context)
        gc.collect()
        with LiveTensors() as live:
            run_step(method, context)
        found.append(live.peak)
        raise KeyboardInterrupt  # the rest of the run is not this test's concern

    monkeypatch.setattr("compress.engine.job.run_step", watched)
    *_, planned = compress.plan(recipe).steps
    with pytest.raises(KeyboardInterrupt):
        compress.run(recipe, tmp_path / "run")
    calibration = compress.plan(recipe).recipe.calibration
    expected = forecast.tensor_bytes(
        planned.method, planned.before, calibration, getattr(torch, compute)
    )
    return found[0], expected
