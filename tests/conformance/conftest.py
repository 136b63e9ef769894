"""Every method of the catalogue on every family: what to call it with, and results made once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pytest
import torch

import compress
from compress.conformance.models import token_ids
from compress.conformance.tiny import TinyFamily
from compress.conformance.trial import Trial, lower_rank
from compress.methods.base import Method
from compress.methods.catalog import METHODS
from compress.planning.recipe import parse_steps

# A variant is a family with other config fields: "<family>-<name>".
VARIANTS: dict[str, dict[str, Any]] = {
    "llama-bidirectional": {"is_causal": False},
    "modernbert-global": {"global_attn_every_n_layers": 1},
}
FAMILIES = ("llama", "qwen3", "gpt2", "opt", "bert", "modernbert", "llama-bidirectional")


@dataclass(frozen=True)
class Case:
    """How the suite calls a method.

    Attributes:
        options: that compress the tiny models noticeably.
        idle: options with which the method has nothing to do.
        tolerance: largest relative difference of logits that ``idle`` may cause.
        first: steps that the model goes through before, not where there is nothing to do.
        needs_first: also where there is nothing to do: without them the method refuses the model.
        families: those that the method takes.
        low_rank: the model's linears get this rank first, so that ``idle`` loses nothing.
    """

    options: dict[str, Any]
    idle: dict[str, Any]
    tolerance: float = 0.0
    low_rank: int | None = None
    first: tuple[dict[str, Any], ...] = ()
    needs_first: bool = False
    families: tuple[str, ...] = field(default=FAMILIES)


# Whatever learns is tested in both: "<method> in <precision>".
PRECISIONS = ("float32", "bfloat16")

_PRUNE = Case({"pattern": "2:4"}, {"sparsity": 0.0})
_ROUND = Case({"bits": 4, "group_size": 16}, {"bits": 8, "group_size": 16}, tolerance=0.05)
_FACTOR = Case({"ratio": 0.6}, {"rank": 8}, tolerance=2e-4, low_rank=8)
_DEPTH = Case({"remove": 1}, {"remove": 0})
_LEARN = {"steps": 2, "batch": 2, "learning_rate": 0.003, "clip": None}

# Methods with the same passes differ in what they solve, which does not know whether a model is
# streamed. So one of each kind of pass is streamed on every family, the others on one.
STREAMED = ("wanda", "gptq", "svd_llm", "ffn_width", "head_width", "shortgpt", "maskllm in float32")

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
    # Without a step before it the model is its own teacher, of whom there is nothing to learn.
    **{
        f"distill in {precision}": Case(
            {**options, "training": {**_LEARN, "precision": precision}},
            {"training": {**_LEARN, "precision": precision}},
            first=({"method": "magnitude", "pattern": "2:4"},),
        )
        for precision, options in zip(
            PRECISIONS, ({}, {"scope": "model", "train": "lora", "teacher": "cached"}), strict=True
        )
    },
    "rtn": _ROUND,
    "gptq": _ROUND,
    "w8a8": Case({}, {}, tolerance=0.1),
    "shortgpt": _DEPTH,
    "sleb": _DEPTH,
    "drop_blocks": Case({"blocks": [1]}, {"blocks": []}),
    # Those whose norms are all in front of linears, and whose layers are of one type.
    "flatten": replace(
        _DEPTH, families=("llama", "gpt2", "opt", "llama-bidirectional", "modernbert-global")
    ),
    **{
        f"fuse in {precision}": Case(
            {"remove": 1, "rank": 4, **options, "training": {**_LEARN, "precision": precision}},
            {"remove": 0},
            families=families,
        )
        for precision, options, families in (
            # Neighbours of one layer type are needed.
            ("float32", {}, ("llama", "qwen3", "gpt2", "opt", "bert", "modernbert-global")),
            ("bfloat16", {"group": 1}, ("llama", "llama-bidirectional")),
        )
    },
    "ffn_width": Case({"share": 0.25}, {"share": 0.0}),
    "head_width": Case({"share": 0.5}, {"share": 0.0}),
    "drop_experts": Case(
        {"keep": 2}, {"share": 0.0}, families=("mixtral", "qwen2_moe", "qwen3_moe")
    ),
    # Gates alone on all widths, and weights with them on some.
    "vib in float32": Case(
        {
            "share": 0.3,
            "of": "model",
            "units": ["hidden", "heads", "neurons"],
            "start_batches": 2,
            "training": {**_LEARN, "precision": "float32"},
            "tuning": None,
        },
        {"share": 0.0, "training": None, "tuning": None, "start_batches": 1},
        families=tuple(f for f in FAMILIES if f != "llama-bidirectional"),  # learns from labels
    ),
    "vib in bfloat16": Case(
        {
            "share": 0.2,
            "of": "model",
            "units": ["heads", "neurons"],
            "mode": "full",
            "start_batches": 2,
            "training": {**_LEARN, "precision": "bfloat16"},
            "fine_tune": {**_LEARN, "precision": "bfloat16"},
        },
        {"share": 0.0, "training": None, "tuning": None, "start_batches": 1},
        families=("llama", "bert"),
    ),
    "svd": _FACTOR,
    "asvd": _FACTOR,
    "svd_llm": _FACTOR,
    "drone": _FACTOR,
    # The loss of a model that sees both ways needs labels, which these ids have none of.
    "fwsvd": replace(
        _FACTOR,
        options={"ratio": 0.6, "windows": 2},
        families=tuple(f for f in FAMILIES if f != "llama-bidirectional"),
    ),
    **{
        f"dense_sparse in {precision}": Case(
            {"ratio": 0.5, "rounds": 2, "refine": {**_LEARN, "precision": precision}},
            {"rank": 8, "nonzeros": 8, "rounds": 1},
            tolerance=1e-3,
            low_rank=8,
        )
        for precision in PRECISIONS
    },
    # Rates at which nothing moves: the layers come out as they went in, at other scales.
    **{
        f"stf in {precision}": Case(
            {**options, "every": 1, "training": training, "tuning": training},
            {**options, "training": {**training, "learning_rate": 1e-12}, "tuning": None},
            tolerance=1e-4,
            first=({"method": "dense_sparse", "ratio": 0.5, "rounds": 2, "weighting": "plain"},),
            needs_first=True,
            families=families,
        )
        for precision, options, families in (
            ("float32", {"mode": "latent"}, ("llama", "bert")),
            ("bfloat16", {"mode": "proxy"}, ("llama", "gpt2")),
        )
        for training in ({**_LEARN, "precision": precision},)
    },
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "some_family" in metafunc.fixturenames:
        # One of those that a method has been streamed on, in turn, so that every family has some.
        turns = [(m, _turn(_streamed(m), i)) for i, m in enumerate(sorted(CASES))]
        metafunc.parametrize(("method", "some_family"), turns)
    elif "streamed_family" in metafunc.fixturenames:
        pairs = [(m, f) for m in sorted(CASES) for f in _streamed(m)]
        metafunc.parametrize(("method", "streamed_family"), pairs)
    elif "family" in metafunc.fixturenames:
        pairs = [(m, f) for m in sorted(CASES) for f in CASES[m].families]
        metafunc.parametrize(("method", "family"), pairs)
    elif "method" in metafunc.fixturenames:
        metafunc.parametrize("method", sorted(CASES))


def _streamed(method: str) -> tuple[str, ...]:
    families = CASES[method].families
    return families if method in STREAMED else families[:1]


def _turn(families: tuple[str, ...], number: int) -> str:
    return families[number % len(families)]


@pytest.fixture(scope="session")
def families(tmp_path_factory) -> Callable[[str], TinyFamily]:
    """``families(family)``: the tiny model of a family or variant."""
    made: dict[str, TinyFamily] = {}

    def get(family: str) -> TinyFamily:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            made[family] = TinyFamily(family.partition("-")[0], folder, **VARIANTS.get(family, {}))
        return made[family]

    return get


@pytest.fixture(scope="session")
def trial(families, tmp_path_factory) -> Callable[[str, str], Trial]:
    """``trial(case, family)``: the step of a case on a family, its results made once."""
    made: dict[tuple[str, str], Trial] = {}

    def get(case: str, family: str) -> Trial:
        if (case, family) not in made:
            folder = tmp_path_factory.mktemp("trials") / f"{family}-{method_of(case)}"
            step = method(case, CASES[case].options)
            first = tuple(parse_steps(CASES[case].first))
            made[case, family] = Trial(step, families(family), folder, first)
        return made[case, family]

    return get


@pytest.fixture(scope="session")
def calibration(families) -> Callable[[str], list[dict[str, torch.Tensor]]]:
    """``calibration(family)``: batches of model inputs."""
    return lambda family: families(family).batches


def method_of(case: str) -> str:
    return case.partition(" in ")[0]


def method(case: str, options: dict[str, Any]) -> Method:
    return METHODS.get(method_of(case))(**options)


@pytest.fixture(scope="session")
def idle() -> Callable[[str], tuple[Method, float, Callable[[Any], None] | None]]:
    """``idle(case)``: a step with nothing to do, its tolerance, and what makes a model that has
    nothing for it."""

    def get(case: str) -> tuple[Method, float, Callable[[Any], None] | None]:
        given = CASES[case]
        prepare = partial(lower_rank, rank=given.low_rank) if given.low_rank else None
        if given.needs_first:
            prepare = partial(_through, given.first)
        return method(case, given.idle), given.tolerance, prepare

    return get


def _through(steps: tuple[dict[str, Any], ...], model: Any) -> None:
    """Take a model through steps that look at nothing of what it reads."""
    compress.apply(model, list(steps), token_ids())


@pytest.fixture(scope="session")
def methods() -> set[str]:
    """The methods that the suite covers."""
    return {method_of(case) for case in CASES}
