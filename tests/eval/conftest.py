"""Results and reports with given figures; one thread."""

from __future__ import annotations

import math

import pytest
import torch

from compress.eval.cost import CostResult, Macs, PairedLatency, PeakMemory, Size
from compress.eval.cost.latency import PairedTimes
from compress.eval.quality.masked import MaskedResult
from compress.eval.quality.perplexity import PerplexityResult
from compress.eval.quality.tasks import Metric, TaskResult, TasksResult
from compress.eval.report import Environment, Report, RunInfo
from compress.eval.spec import EvaluationResult, EvaluationSpec


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny models gain nothing from threads and, on a busy machine, wait for them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def result():
    """``result(nll, …)``: what measuring a causal model gives; ``wobble`` scatters its windows."""
    return _result


@pytest.fixture(scope="session")
def masked():
    """``masked(accuracy)``: what measuring a masked model gives."""
    return _masked


@pytest.fixture(scope="session")
def report():
    """``report(before, after, **fields of its run)``: a run's report."""
    return _report


def _result(
    nll: float = 3.0,
    *,
    size: int = 1000,
    macs: int = 500,
    accuracy: float | None = None,
    speedup: tuple[float, float, float] | None = None,
    text: str = "t",
    wobble: float = 0.0,
) -> EvaluationResult:
    windows = [nll + 0.1 * math.sin(i) + wobble * math.cos(3 * i) for i in range(12)]
    mean = sum(windows) / 12
    timed = None
    if speedup:
        low, middle, high = speedup
        pair = PairedTimes(
            before=middle,
            after=1.0,
            speedup=middle,
            interval=(low, high),
            before_seconds=[middle],
            after_seconds=[1.0],
        )
        timed = PairedLatency(
            prefill=pair,
            decode=None,
            prefill_tokens=8,
            decode_tokens=0,
            repeats=3,
            threads=1,
            device="cpu",
            dtype=("float32", "float32"),
        )
    tasks = None
    if accuracy is not None:
        metric = Metric(value=accuracy, stderr=0.01, higher_is_better=True)
        piqa = TaskResult(
            metrics={"acc": metric},
            samples=100,
            num_fewshot=0,
            version="1",
            source="hub",
            files={},
        )
        tasks = TasksResult(tasks={"piqa": piqa}, limit=None, batch_size=1, lm_eval="0")
    counts = Size(
        parameters=100,
        nonzero_parameters=90,
        parameters_without_embeddings=80,
        block_weights=70,
        nonzero_block_weights=60,
        checkpoint_bytes=size,
        block_bytes=size // 2,
        bits_per_weight=4.5,
    )
    return EvaluationResult(
        model_class="LlamaForCausalLM",
        kind="causal",
        dtype="float32",
        device="cpu",
        spec=EvaluationSpec(),
        tokens_sha256=text,
        perplexity=PerplexityResult(
            perplexity=math.exp(mean),
            interval=(math.exp(mean - 0.1), math.exp(mean + 0.1)),
            nll=mean,
            nll_stderr=0.05,
            tokens=1200,
            window=101,
            stride=101,
            window_nll=windows,
        ),
        tasks=tasks,
        cost=CostResult(
            size=counts,
            macs=Macs(per_token=macs, head=10, per_token_and_position=1, context=64),
            memory=PeakMemory(libraries=1, load=2, prefill=3, tokens=8),
        ),
        latency=timed,
        seconds={},
    )


def _masked(accuracy: float, wobble: float = 0.0) -> EvaluationResult:
    scores = MaskedResult(
        pll=-1.0,
        pll_stderr=0.1,
        pseudo_perplexity=math.e,
        pseudo_perplexity_interval=None,
        pll_positions=10,
        accuracy=accuracy,
        accuracy_stderr=0.04,
        cross_entropy=1.0,
        cross_entropy_stderr=0.1,
        masked_positions=240,
        mask_fraction=0.15,
        window=128,
        seed=0,
        window_nll=[1.0] * 12,
        window_accuracy=[accuracy + wobble * math.cos(i) for i in range(12)],
        window_tokens=[20] * 12,
    )
    return _result().model_copy(update={"perplexity": None, "kind": "masked", "masked": scores})


def _report(before=None, after=None, **run) -> Report:
    steps = run.pop("steps", ())
    title = run.pop("title", "a run")
    return Report(
        title=title,
        run=RunInfo(model="m", **run),
        steps=steps,
        before=before,
        after=after or _result(),
        environment=Environment(
            platform="Linux", cpu="a cpu", cores=2, threads=1, memory_bytes=10**9, versions={}
        ),
    )
