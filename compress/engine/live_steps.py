"""Steps on a live model, one after the other: all of them, or the model as it was."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from transformers import PreTrainedModel

from compress.engine.context import StepContext
from compress.engine.live_sink import LiveSink
from compress.engine.original import Original
from compress.engine.steps import run_step
from compress.engine.transaction import (
    Transaction,
    explained,
    global_state,
    keeping_gradients,
)
from compress.linear.layer import at_work
from compress.methods.base import Method
from compress.methods.questions import compares_blocks, uses_original
from compress.models.anatomy import find_blocks
from compress.models.stream import StreamedModel
from compress.system.progress import Progress
from compress.train.whole import other_depth


def run_live(
    model: PreTrainedModel,
    steps: Sequence[Method],
    batches: list[dict[str, torch.Tensor]],
    *,
    seed: int,
    atomic: bool | None,
    follow_config: bool,
    compute: torch.dtype = torch.float32,
    teacher: PreTrainedModel | None = None,
    progress: Progress | None = None,
) -> None:
    """Carry out steps on a live model that has been checked with them.

    Args:
        batches: model inputs on the model's device; labels of masked tokens under ``labels``.
        seed: of everything random.
        atomic: see :class:`compress.engine.transaction.Transaction`.
        follow_config: write into the model's config what its modules are after each step.
        compute: dtype of matrix products in calibration passes.
        teacher: what steps take for the model that there was before all of them; None: a copy of
            the model as it is now, if a step asks for it.
        progress: where to tell how far it is.

    Raises:
        CompressError: a step failed. The model is as it was, or the error says that it is not.
    """
    source = StreamedModel(model, device=model.device)
    blocks = [source.block(i) for i in range(len(source.anatomy.blocks))]
    original = _original(model, teacher, steps)
    origins = [(i, i + 1) for i in range(len(blocks))] if _of_one_depth(model, teacher) else None
    transaction, where, failed = Transaction(model, blocks, atomic), "", True
    del blocks
    labels = [b["labels"] for b in batches if "labels" in b] or None
    inputs = [{k: v for k, v in b.items() if k != "labels"} for b in batches]
    working = ExitStack()
    try:
        transaction.open()
        working.enter_context(at_work(model))
        model.eval()
        for number, method in enumerate(steps):
            sink = LiveSink(transaction, origins, follow_config)
            where = f"step {number} ({method.name})"
            with (
                global_state(seed),
                keeping_gradients(model),
                tempfile.TemporaryDirectory(prefix="compress-") as scratch,
            ):
                source = StreamedModel(model, device=model.device)
                context = StepContext(
                    source, _plain(inputs), Path(scratch), labels=labels, seed=seed,
                    storage_dtype=transaction.dtype, sink=sink, compute=compute,
                    original=original, progress=progress,
                )  # fmt: skip
                if progress is not None:
                    context.report = _reporting(progress, f"step {number + 1}/{len(steps)}", method)
                run_step(method, context)
            transaction.finished()
            origins = sink.origins()
        failed = False
    except BaseException as error:
        told = explained(error, transaction.began, transaction.atomic, where)
        if told is error:
            raise
        raise told from error
    finally:
        working.close()
        transaction.close(failed)


def _reporting(progress: Progress, step: str, method: Method) -> Callable[..., None]:
    """What a step calls behind each block: ``(stage, index, count, note)``."""

    def report(stage: str, index: int, count: int, _note: object) -> None:
        progress.update(f"{step} {method.name} ({stage})", index + 1, count)

    return report


def _plain(batches: list[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
    """Copies of tensors that were made in inference mode: no gradient flows beside such."""
    return [{k: v.clone() if v.is_inference() else v for k, v in b.items()} for b in batches]


def _original(
    model: PreTrainedModel, teacher: PreTrainedModel | None, steps: Sequence[Method]
) -> Original | None:
    """The model as it was before all steps, in float32, where a step asks for it.

    Raises:
        CompressError: a block is to return what a teacher with another number of blocks has: what
            each block of the model stands for is known of the steps of this call only.
    """
    if not any(uses_original(method.passes()) for method in steps):
        return None
    if not _of_one_depth(model, teacher) and any(compares_blocks(m.passes()) for m in steps):
        raise other_depth("whose blocks say what those of the model learn")
    kept = copy.deepcopy(model if teacher is None else teacher)
    kept = kept.to(model.device).float().eval().requires_grad_(False)
    return Original(lambda: StreamedModel(kept, device=model.device))


def _of_one_depth(model: PreTrainedModel, teacher: PreTrainedModel | None) -> bool:
    """Whether each block of a teacher, if there is another one, is known to be one of the model."""
    return teacher is None or len(find_blocks(teacher)[1]) == len(find_blocks(model)[1])
