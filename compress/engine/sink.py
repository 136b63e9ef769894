"""Finished blocks of a run, made durable: a file a block, a journal line that says it counts."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from compress.checkpoint.embeddings import marked, stored_outer
from compress.checkpoint.records import BlockRecord, dump_block
from compress.checkpoint.state import ModelState
from compress.checkpoint.storage import Storage
from compress.checkpoint.stored import read_block
from compress.engine.context import OUTER
from compress.engine.workspace import Workspace
from compress.linear.grid import QuantScheme
from compress.methods.passes import SOLVE
from compress.methods.questions import kind_of
from compress.models.anatomy import Anatomy, BlockAnatomy
from compress.models.groups import Groups
from compress.models.stream import StreamedModel
from compress.system.files import content_digest, disk_error, sync


class JournalSink:
    """The :class:`compress.engine.context.Sink` of a run on disk.

    Args:
        workspace: the run's folder.
        step: index of the step in the recipe.
        state: the model that enters the step; afterwards the one that leaves it.
        storage: types of unquantised values in the files.
    """

    def __init__(
        self,
        workspace: Workspace,
        step: int,
        name: str,
        state: ModelState,
        anatomy: Anatomy,
        storage: Storage,
    ) -> None:
        self.workspace, self.step, self.state = workspace, step, state
        self.anatomy, self.storage = anatomy, storage
        self.folder = workspace.work / f"{step:02d}-{name}"
        self.scratch = workspace.work / "activations"
        for folder in (self.folder, self.scratch):
            folder.mkdir(parents=True, exist_ok=True)
        for folder in (workspace.work, workspace.folder):
            sync(folder)  # files are durable in folders that are
        self._records: list[BlockRecord] = []  # of blocks that were stored since the last line
        self._hidden = 0  # width of the residual stream there, if it has changed
        self._digests: dict[str, str] = {}  # of files that no journal line vouches for yet

    def finished(self, stage: str) -> int:
        return sum(event.get("blocks", 1) for event in self._events(stage))

    def notes(self, stage: str) -> list[Any]:
        return [e["note"] for e in self._events(stage)]

    def activations(self, stage: str) -> dict[str, Any] | None:
        events = self._events(stage)
        return events[-1]["activations"] if events else None

    def load(self, index: int, block: nn.Module) -> None:
        self.state.load(index, block, self.anatomy)

    def store(self, stage: str, index: int, block: nn.Module, anatomy: BlockAnatomy) -> None:
        tensors, record = dump_block(
            block, anatomy, self.storage.dtype, self.storage.wide_in_blocks
        )
        self._records.append(record)
        self._write(self.file(stage, index), tensors)
        self._hidden = anatomy.hidden if anatomy.hidden != self.anatomy.blocks[0].hidden else 0

    def touch_outer(self, model: nn.Module) -> None:
        """A model that is filled from files leaves them alone."""

    def store_outer(self, stage: str, model: nn.Module) -> None:
        if self._outer(stage) is not None:
            return  # by this run, before it was interrupted
        held = model.state_dict()
        outer = ((name, held[name].detach()) for name in self.state.outer())
        stored = stored_outer(model, outer, self.storage.dtype)
        tensors = {name: self.storage.outside(name, tensor) for name, tensor in stored}
        # Tied tensors are one in memory and two in a file.
        self._write(
            self._outer_file(stage), {n: t.clone().contiguous() for n, t in tensors.items()}
        )
        event = {"event": "outer", "step": self.step, "stage": stage, "files": self._digests}
        if rounded := marked(model):
            event["embeddings"] = {p: s.model_dump(mode="json") for p, s in rounded.items()}
        self._digests = {}
        self.workspace.append(event)

    def _outer(self, stage: str) -> Path | None:
        """The file of what lies outside the blocks, where a stage has changed it."""
        done = self.workspace.find(event="outer", step=self.step, stage=stage)
        return self._outer_file(stage) if done else None

    def _rounded(self, stage: str) -> dict[str, QuantScheme] | None:
        """What of it is on a grid since then; None where nothing new is."""
        for event in self.workspace.find(event="outer", step=self.step, stage=stage):
            if "embeddings" in event:
                return {p: QuantScheme.model_validate(s) for p, s in event["embeddings"].items()}
        return None

    def _write(self, path: Path, tensors: dict[str, torch.Tensor]) -> None:
        temporary = path.with_suffix(".partial")
        try:
            save_file({k: v.cpu() for k, v in tensors.items()}, temporary, {"format": "pt"})
            sync(temporary)
            os.replace(temporary, path)
            sync(self.folder)
            self._digests[str(path.relative_to(self.workspace.folder))] = content_digest(path)
        except (OSError, SafetensorError) as error:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            if not isinstance(error, OSError):
                error = OSError(0, str(error))
            raise disk_error(self.folder, error) from error

    def keep(self, stage: str, index: int, tensors: dict[str, torch.Tensor]) -> None:
        self._write(self._learned(stage, index), tensors)

    def learned(self, stage: str, index: int) -> dict[str, torch.Tensor]:
        return read_block(self._learned(stage, index))

    def record(
        self,
        stage: str,
        index: int,
        note: Any,
        activations: dict[str, Any] | None,
        blocks: int = 1,
    ) -> None:
        self._sync_carried(activations)
        event = {
            "event": "block",
            "step": self.step,
            "stage": stage,
            "block": index,
            "note": note,
            "activations": activations,
        }
        if self._digests:
            event["files"], self._digests = self._digests, {}
        if blocks > 1:
            event["blocks"] = blocks
        if self._records:
            records = [record.model_dump(mode="json") for record in self._records]
            event |= {"record": records[0]} if blocks == 1 else {"records": records}
            self._records = []
            if self._hidden:
                event["hidden"] = self._hidden
        self.workspace.append(event)

    def again(self, stage: str, why: str) -> None:
        self.workspace.rewind(self._events(stage)[0], why)

    def _sync_carried(self, carried: dict[str, Any] | None) -> None:
        """Make the files of activations durable that a journal line is to vouch for."""
        try:
            held = carried or {}
            for state in (carried, held.get("reference"), held.get("detours")):
                if state is not None:
                    sync(self.scratch / state["file"])
                    sync(self.scratch)
        except OSError as error:
            raise disk_error(self.scratch, error) from error

    def _learned(self, stage: str, index: int) -> Path:
        name = "outer" if index == OUTER else f"{index:05d}"
        return self.folder / f"{stage}-{name}.safetensors"

    def _outer_file(self, stage: str) -> Path:
        return self.folder / f"outer-{stage}.safetensors"

    def file(self, stage: str, index: int) -> Path:
        name = "block" if stage == SOLVE else stage
        return self.folder / f"{name}-{index:05d}.safetensors"

    def changed(self, stage: str, groups: Groups, source: StreamedModel) -> StreamedModel:
        """The model that leaves the stage. A block whose line has no record is what it was."""
        if kind_of(stage) == SOLVE:
            records, blocks, hidden = [], [], 0
            made = [r for event in self._events(stage) for r in _records(event)]
            for index, (record, group) in enumerate(zip(made, groups, strict=True)):
                records.append(
                    self.state.records[group[0]]
                    if record is None
                    else BlockRecord.model_validate(record)
                )
                blocks.append(
                    self.state.blocks[group[0]] if record is None else self.file(stage, index)
                )
            for event in self._events(stage):
                hidden = event.get("hidden", hidden)
            self.state = self.state.after(
                groups, records, blocks, self._outer(stage), hidden, self._rounded(stage)
            )
        else:
            self.state = self.state.after(groups)
        source = self.state.streamed(source.device)
        self.anatomy = source.anatomy
        return source

    def origins(self) -> list[tuple[int, int]]:
        return list(self.state.origins)

    def _events(self, stage: str) -> list[dict[str, Any]]:
        return self.workspace.find(event="block", step=self.step, stage=stage)


def _records(event: dict[str, Any]) -> list[dict[str, Any] | None]:
    """What an event of a solving pass says of each block that it tells of; None of one that was
    left as it is."""
    return event.get("records") or [event.get("record")]


class ReadingSink(JournalSink):
    """The sink of a process that takes part in a training of a run that another one carries out."""

    def store(self, stage: str, index: int, block: nn.Module, anatomy: BlockAnatomy) -> None:
        """The other process stores the same block."""

    def store_outer(self, stage: str, model: nn.Module) -> None:
        """The other process stores the same tensors."""

    def keep(self, stage: str, index: int, tensors: dict[str, torch.Tensor]) -> None:
        """The other process keeps the same tensors."""

    def record(
        self,
        stage: str,
        index: int,
        note: Any,
        activations: dict[str, Any] | None,
        blocks: int = 1,
    ) -> None:
        """The journal is the other process's."""

    def again(self, stage: str, why: str) -> None:
        """The journal is the other process's."""
