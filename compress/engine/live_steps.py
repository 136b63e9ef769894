"""Steps on a live model, one after the other: all of them, or the model as it was."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from compress.checkpoint.config import apply_records, keep_layers
from compress.checkpoint.records import record_block
from compress.engine.context import StepContext
from compress.engine.steps import run_step
from compress.engine.transaction import (
    LiveSink,
    Transaction,
    explained,
    global_state,
    keeping_gradients,
)
from compress.methods.base import Method
from compress.methods.passes import kept_blocks
from compress.models.stream import StreamedModel


def run_live(
    model: PreTrainedModel,
    steps: Sequence[Method],
    batches: list[dict[str, torch.Tensor]],
    *,
    seed: int,
    atomic: bool | None,
    follow_config: bool,
    compute: torch.dtype = torch.float32,
) -> None:
    """Carry out steps on a live model that has been checked with them.

    Args:
        batches: model inputs on the model's device; labels of masked tokens under ``labels``.
        seed: of everything random.
        atomic: see :class:`compress.engine.transaction.Transaction`.
        follow_config: write into the model's config what its modules are after each step.
        compute: dtype of matrix products in calibration passes.

    Raises:
        CompressError: a step failed. The model is as it was, or the error says that it is not.
    """
    source = StreamedModel(model, device=model.device)
    blocks = [source.block(i) for i in range(len(source.anatomy.blocks))]
    transaction, where, failed = Transaction(model, blocks, atomic), "", True
    del blocks
    labels = [b["labels"] for b in batches if "labels" in b] or None
    inputs = [{k: v for k, v in b.items() if k != "labels"} for b in batches]
    try:
        model.eval()
        for number, method in enumerate(steps):
            sink = LiveSink(transaction)
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
                )  # fmt: skip
                decision = run_step(method, context)
            transaction.finished()
            if follow_config:
                transaction.began = True
                _update(model, source, kept_blocks(method.passes(), decision, source.anatomy))
        failed = False
    except BaseException as error:
        told = explained(error, transaction.began, transaction.atomic, where)
        if told is error:
            raise
        raise told from error
    finally:
        transaction.close(failed)


def _plain(batches: list[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
    """Copies of tensors that were made in inference mode: no gradient flows beside such."""
    return [{k: v.clone() if v.is_inference() else v for k, v in b.items()} for b in batches]


def _update(model: PreTrainedModel, streamed: StreamedModel, kept: list[int] | None) -> None:
    """Make a live model's config say what its modules are after a step."""
    anatomy = streamed.anatomy
    family, path = anatomy.family, anatomy.blocks_path
    if kept is not None:
        blocks = model.get_submodule(path)
        config = keep_layers(model.config, family, kept, path)
        parent, _, leaf = path.rpartition(".")
        remaining = [blocks[i] for i in kept]
        for index, block in enumerate(remaining):
            for module in block.modules():
                if hasattr(module, "layer_idx"):
                    module.layer_idx = index
        setattr(model.get_submodule(parent), leaf, torch.nn.ModuleList(remaining))
    else:
        after = StreamedModel(model).anatomy
        records = [record_block(model.get_submodule(b.path), b) for b in after.blocks]
        config = apply_records(model.config, family, records, path)
    _adopt(model, config)


def _adopt(model: PreTrainedModel, config: Any) -> None:
    """Put the new config's values into the objects that all modules of the model refer to."""
    model.config.__dict__.clear()
    model.config.__dict__.update(config.__dict__)
