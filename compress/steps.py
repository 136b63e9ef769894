"""Carry out one step of a recipe on a model: survey, decide, then solve block after block.

The same code serves a checkpoint on disk (one block in memory at a time, each finished block handed
to a sink that makes it durable) and a live model (blocks changed in place).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from compress.calibrate.activations import Activations
from compress.calibrate.replay import BlockCall, BlockReplay
from compress.calibrate.statistics import GRAM, MOMENTS, NOTHING, InputStatistics
from compress.errors import CompressError
from compress.methods.base import BlockSurvey, Method, SiteWork
from compress.models.anatomy import BlockAnatomy, Site, block_anatomy
from compress.models.linears import is_linear
from compress.models.stream import StreamedModel, capture_inputs

SURVEY, SOLVE = "survey", "solve"


class Sink(Protocol):
    """Where finished blocks go, and what is known of an interrupted run."""

    def finished(self, stage: str) -> int:
        """Number of leading blocks whose ``stage`` is done."""

    def notes(self, stage: str) -> list[Any]:
        """What ``record`` was given for the finished blocks."""

    def load(self, index: int, block: nn.Module) -> None:
        """Fill a block with the weights that enter the step."""

    def store(self, index: int, block: nn.Module, anatomy: BlockAnatomy) -> None:
        """Make the weights of a solved block durable."""

    def record(self, stage: str, index: int, note: Any, activations: dict[str, Any] | None) -> None:
        """Note that a block's ``stage`` is done, and what the next block starts from."""

    def activations(self, stage: str) -> dict[str, Any] | None:
        """The last ``activations`` given to ``record``."""


class MemorySink:
    """The sink of a live model: blocks are what they are, nothing is durable."""

    def __init__(self) -> None:
        self._notes: dict[str, list[Any]] = {}

    def finished(self, stage: str) -> int:
        return 0

    def notes(self, stage: str) -> list[Any]:
        return self._notes.get(stage, [])

    def load(self, index: int, block: nn.Module) -> None:
        """A live block holds its weights."""

    def store(self, index: int, block: nn.Module, anatomy: BlockAnatomy) -> None:
        """A live block keeps its weights."""

    def record(self, stage: str, index: int, note: Any, activations: dict[str, Any] | None) -> None:
        self._notes.setdefault(stage, []).append(note)

    def activations(self, stage: str) -> dict[str, Any] | None:
        return None


@dataclass
class StepContext:
    """What a step works with.

    Attributes:
        source: the model.
        batches: calibration batches (dicts of model inputs); may be empty for data-free methods.
        scratch: folder for activations.
        labels: for masked language models, the tokens behind the masks (-100 elsewhere), a tensor a
            batch; methods of model scope find them in their batches under ``labels``.
        storage_dtype: dtype of unquantised values in the checkpoint that will be written.
        report: called with (stage, block index, number of blocks, note) after each block.
        guard: called before each block; raises when a limit is exceeded.
    """

    source: StreamedModel
    batches: list[dict[str, torch.Tensor]]
    scratch: Path
    labels: list[torch.Tensor] | None = None
    storage_dtype: torch.dtype = torch.float32
    sink: Sink = field(default_factory=MemorySink)
    report: Callable[[str, int, int, Any], None] = lambda *_: None
    guard: Callable[[], None] = lambda: None


def run_step(method: Method, context: StepContext) -> Any:
    """Apply a method to every block; returns its decision (None where it makes none).

    Raises:
        CompressError: naming the block at which it happened.
    """
    source = context.source
    decision = None
    if method.scope == "model":
        decision = _decide_on_whole_model(method, context)
    elif method.surveys:
        notes = _stream(SURVEY, method, context, None)
        decision = method.decide(notes, source.anatomy)
    if method.kept_blocks(decision, source.anatomy) is None:
        _stream(SOLVE, method, context, decision)
    return decision


def _decide_on_whole_model(method: Method, context: StepContext) -> Any:
    source = context.source
    done = context.sink.notes(SURVEY)
    if done:
        return done[0]
    source.fill_outer()
    for index in range(len(source.anatomy.blocks)):
        context.sink.load(index, source.block(index))
    source.model.to(source.device)
    batches = [{k: v.to(source.device) for k, v in batch.items()} for batch in context.batches]
    for batch, labels in zip(batches, context.labels or (), strict=False):
        batch["labels"] = labels.to(source.device)
    decision = method.decide_on_model(source.model, source.anatomy, batches)
    context.sink.record(SURVEY, 0, decision, None)
    for index in range(len(source.anatomy.blocks)):
        source.release_block(index)
    source.release_outer()
    return decision


def _stream(stage: str, method: Method, context: StepContext, decision: Any) -> list[Any]:
    """Pass over all blocks behind the last finished one; returns the notes of all."""
    source, sink = context.source, context.sink
    count = len(source.anatomy.blocks)
    start = sink.finished(stage)
    if start == count:
        return sink.notes(stage)
    needs_inputs = method.needs == "calibration"
    calls: list[list[BlockCall]] = [[] for _ in range(count)]
    hidden = None
    if needs_inputs:
        hidden, calls = _first_inputs(stage, context, start)
    learned: dict[str, Any] = {}
    for index in range(start, count):
        context.guard()
        block = source.block(index)
        sink.load(index, block)
        block.to(source.device)
        anatomy = source.anatomy.blocks[index]
        try:
            replay = None
            if needs_inputs:
                replay = BlockReplay(
                    block, anatomy, hidden, calls[index], context.scratch, source.device, learned
                )
            if stage == SURVEY:
                note, hidden = _survey_block(method, context, index, block, replay)
            else:
                note = _solve_block(
                    method, block, anatomy, replay, decision, source.device, context.storage_dtype
                )
                final = block_anatomy(
                    block, anatomy.path, index, source.model.config, anatomy.family
                )
                sink.store(index, block, final)
                hidden = _advance(context, stage, index, replay)
        except CompressError as error:
            raise error.within(f"step {method.name}, block {index}") from error
        finally:
            source.release_block(index)
        carried = None
        if hidden is not None:
            carried = {"shapes": [list(s) for s in hidden.shapes], "checksum": hidden.checksum}
        sink.record(stage, index, note, carried)
        # Only now is the previous block's input of no use to anybody.
        if needs_inputs:
            _file(context, stage, index).unlink(missing_ok=True)
        context.report(stage, index, count, note)
    if hidden is not None:
        hidden.remove()
    return sink.notes(stage)


def _first_inputs(
    stage: str, context: StepContext, start: int
) -> tuple[Activations, list[list[BlockCall]]]:
    """Inputs of block ``start`` and how each block is called."""
    source = context.source
    if source.anatomy.family.shared_blocks:
        raise CompressError(
            "a model whose layers have weights of their own",
            f"{source.anatomy.model_type}, whose layers share one set",
            "Use a method that needs no calibration (magnitude, rtn)",
        )
    hidden = Activations(_file(context, stage, 0))
    source.fill_outer()
    batches = [{k: v.to(source.device) for k, v in batch.items()} for batch in context.batches]
    calls = capture_inputs(source.model, source.anatomy, batches, hidden)
    source.release_outer()
    if start == 0:
        return hidden, calls
    hidden.remove()
    carried = context.sink.activations(stage)
    resumed = Activations(_file(context, stage, start), shapes=carried["shapes"])
    if not resumed.verify(carried["checksum"]):
        raise CompressError(
            "the activations that the interrupted run left behind",
            f"another content in {resumed.path.name}",
            "The machine went down or the folder was changed; start the run in a new folder",
        )
    return resumed, calls


def _file(context: StepContext, stage: str, index: int) -> Path:
    return context.scratch / f"{stage}-hidden-{index:05d}.bin"


def _advance(
    context: StepContext, stage: str, index: int, replay: BlockReplay | None
) -> Activations | None:
    """Run the block as it is now; its outputs are the next block's inputs."""
    if replay is None:
        return None
    outputs = Activations(_file(context, stage, index + 1), checked=True)
    replay.finish(outputs.write)
    return outputs


def _solve_block(
    method: Method,
    block: nn.Module,
    anatomy: BlockAnatomy,
    replay: BlockReplay | None,
    decision: Any,
    device: torch.device,
    storage_dtype: torch.dtype,
) -> dict[str, float]:
    metrics: dict[str, float] = {}
    with torch.no_grad():
        for site in anatomy.sites:
            names = method.targets(anatomy, site)
            if not names:
                continue
            statistics = _collect(method.statistic(site), block, site, names, replay, device)
            work = SiteWork(block, anatomy, site, names, statistics, decision, storage_dtype)
            method.solve(work)
            if work.kept_columns is not None and replay is not None:
                replay.keep_columns(site, work.kept_columns)
            metrics.update({f"{site.kind}.{k}": v for k, v in work.metrics.items()})
    return metrics


def _collect(
    kind: str,
    block: nn.Module,
    site: Site,
    names: tuple[str, ...],
    replay: BlockReplay | None,
    device: torch.device,
) -> dict[str, InputStatistics]:
    """Statistics of a site's inputs; linears of a site with one input share one object."""
    if kind == NOTHING or replay is None:
        return {}
    if any(not is_linear(block.get_submodule(n)) for n in names):
        kind = GRAM  # a low-rank pair's second factor needs it to derive its own statistics
    found: dict[str, InputStatistics] = {}

    def observe(name: str, x: torch.Tensor) -> None:
        if name not in found:
            found[name] = InputStatistics(x.shape[-1], kind, device)
        found[name].update(x)

    replay.visit(site, observe)
    shared = found.get(site.linears[0])
    return {name: found.get(name, shared) for name in names}


def _survey_block(
    method: Method, context: StepContext, index: int, block: nn.Module, replay: BlockReplay
) -> tuple[Any, Activations]:
    anatomy = context.source.anatomy.blocks[index]
    statistics: dict[str, InputStatistics] = {}
    for site in anatomy.sites:
        kind = method.survey_statistic(site)
        if kind in (MOMENTS, GRAM):
            statistics |= _collect(kind, block, site, site.linears, replay, context.source.device)
    outputs = Activations(_file(context, SURVEY, index + 1), checked=True)
    similarity, rows = 0.0, 0

    def consume(batch: int, output: torch.Tensor) -> None:
        nonlocal similarity, rows
        outputs.write(batch, output)
        before = replay.inputs.read(batch).to(output.device)
        cosine = nn.functional.cosine_similarity(before, output, dim=-1)
        similarity += float(cosine.double().sum())
        rows += cosine.numel()

    replay.finish(consume)
    survey = BlockSurvey(anatomy, block, statistics, 1 - similarity / rows)
    return method.observe(survey), outputs
