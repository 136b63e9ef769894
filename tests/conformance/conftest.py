"""Every method of the catalogue on every family: what to call it with, and results made once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import compress
from compress.data.calibration import calibration_batches
from compress.data.calibration_spec import CalibrationSpec

# A variant is a family with other config fields: "<family>-<name>".
VARIANTS: dict[str, dict[str, Any]] = {"llama-bidirectional": {"is_causal": False}}
FAMILIES = ("llama", "qwen3", "gpt2", "opt", "bert", "modernbert", *VARIANTS)


@dataclass(frozen=True)
class Case:
    """How the suite calls a method.

    Attributes:
        options: that compress the tiny models noticeably.
        idle: options with which the method has nothing to do.
        tolerance: largest relative difference of logits that ``idle`` may cause.
        low_rank: the model's linears get this rank first, so that ``idle`` loses nothing.
    """

    options: dict[str, Any]
    idle: dict[str, Any]
    tolerance: float = 0.0
    low_rank: int | None = None
    families: tuple[str, ...] = field(default=FAMILIES)


# Whatever learns is tested in both: "<method> in <precision>".
PRECISIONS = ("float32", "bfloat16")

_PRUNE = Case({"pattern": "2:4"}, {"sparsity": 0.0})
_ROUND = Case({"bits": 4, "group_size": 16}, {"bits": 8, "group_size": 16}, tolerance=0.05)
_FACTOR = Case({"ratio": 0.6}, {"rank": 8}, tolerance=2e-4, low_rank=8)
_DEPTH = Case({"remove": 1}, {"remove": 0})

# A new method needs an entry here: test_methods.py fails without.
CASES: dict[str, Case] = {
    "magnitude": _PRUNE,
    "wanda": _PRUNE,
    "sparsegpt": _PRUNE,
    **{
        f"maskllm in {precision}": Case(
            {"training": {"steps": 2, "batch": 2, "clip": None, "precision": precision}},
            {"pattern": "4:4", "prior": "magnitude", "training": None},
        )
        for precision in PRECISIONS
    },
    "rtn": _ROUND,
    "gptq": _ROUND,
    "w8a8": Case({}, {}, tolerance=0.1),
    "shortgpt": _DEPTH,
    "sleb": _DEPTH,
    "ffn_width": Case({"share": 0.25}, {"share": 0.0}),
    "head_width": Case({"share": 0.5}, {"share": 0.0}),
    "svd": _FACTOR,
    "asvd": _FACTOR,
    "svd_llm": _FACTOR,
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "method" in metafunc.fixturenames:
        metafunc.parametrize("method", sorted(CASES))
    if "family" in metafunc.fixturenames:
        metafunc.parametrize("family", FAMILIES)


@pytest.fixture(scope="session")
def tiny(tiny):
    """As everywhere, and for the variants too."""
    return lambda name, **fields: tiny(family_of(name), **VARIANTS.get(name, {}), **fields)


@pytest.fixture(scope="session")
def checkpoint(checkpoint):
    """As everywhere, and for the variants too."""
    return lambda name, **fields: checkpoint(family_of(name), **VARIANTS.get(name, {}), **fields)


@pytest.fixture(scope="session")
def helpers(helpers):
    """As everywhere, and for the variants too."""
    return SimpleNamespace(**{**vars(helpers), "auto": lambda name: helpers.auto(family_of(name))})


def method_of(case: str) -> str:
    return case.partition(" in ")[0]


def family_of(name: str) -> str:
    return name.partition("-")[0] if name in VARIANTS else name


@pytest.fixture(scope="session")
def cases() -> dict[str, Case]:
    return CASES


@pytest.fixture(scope="session")
def methods() -> set[str]:
    """The methods that the suite covers."""
    return {method_of(case) for case in CASES}


@pytest.fixture(scope="session")
def step() -> Callable[[str], dict[str, Any]]:
    """``step(method)``: the recipe step with the options of the suite."""
    return lambda case: {"method": method_of(case), **CASES[case].options}


@pytest.fixture(scope="session")
def calibration(tiny, tokenizer, text) -> Callable[[str], list[dict[str, torch.Tensor]]]:
    """``calibration(family)``: the batches that a recipe of ``helpers.recipe`` makes."""

    def get(family: str) -> list[dict[str, torch.Tensor]]:
        spec = CalibrationSpec(text={"source": str(text)}, samples=8, length=24)
        made = calibration_batches(spec, tokenizer, tiny(family).config)
        if made.labels is None:
            return made.batches
        return [{**b, "labels": y} for b, y in zip(made.batches, made.labels, strict=True)]

    return get


@pytest.fixture(scope="session")
def compressed(tiny, calibration, step, tmp_path_factory) -> Callable[[str, str], SimpleNamespace]:
    """``compressed(method, family)``: a live model after the step, and where it was saved."""
    made: dict[tuple[str, str], SimpleNamespace] = {}

    def get(method: str, family: str) -> SimpleNamespace:
        if (method, family) not in made:
            model = compress.apply(tiny(family), [step(method)], calibration(family))
            folder = tmp_path_factory.mktemp("saved") / f"{family}-{method}"
            compress.save(model, folder)
            made[method, family] = SimpleNamespace(model=model, folder=folder)
        return made[method, family]

    return get


@pytest.fixture(scope="session")
def ran(checkpoint, step, text, helpers, tmp_path_factory) -> Callable[[str, str], Path]:
    """``ran(method, family)``: the folder of a run of the step on the saved model."""
    made: dict[tuple[str, str], Path] = {}

    def get(method: str, family: str) -> Path:
        if (method, family) not in made:
            out = tmp_path_factory.mktemp("runs") / f"{family}-{method}"
            compress.run(helpers.recipe(checkpoint(family), [step(method)], text), out)
            made[method, family] = out
        return made[method, family]

    return get
