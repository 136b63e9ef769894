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

from compress.checkpoint.records import BlockRecord, dump_block
from compress.checkpoint.state import ModelState, read_block
from compress.engine.workspace import Workspace
from compress.methods.passes import LEARN, SOLVE, TRAIN
from compress.models.anatomy import Anatomy, BlockAnatomy
from compress.system.files import content_digest, disk_error, sync


class JournalSink:
    """The :class:`compress.engine.context.Sink` of a run on disk.

    Args:
        workspace: the run's folder.
        step: index of the step in the recipe.
        state: the model that enters the step.
        dtype: of unquantised values in the files.
    """

    def __init__(
        self,
        workspace: Workspace,
        step: int,
        name: str,
        state: ModelState,
        anatomy: Anatomy,
        dtype: torch.dtype,
    ) -> None:
        self.workspace, self.step, self.state = workspace, step, state
        self.anatomy, self.dtype = anatomy, dtype
        self.folder = workspace.work / f"{step:02d}-{name}"
        self.scratch = workspace.work / "activations"
        for folder in (self.folder, self.scratch):
            folder.mkdir(parents=True, exist_ok=True)
        for folder in (workspace.work, workspace.folder):
            sync(folder)  # files are durable in folders that are
        self._record: BlockRecord | None = None
        self._digests: dict[str, str] = {}  # of files that no journal line vouches for yet

    def finished(self, stage: str) -> int:
        return len(self._events(stage))

    def notes(self, stage: str) -> list[Any]:
        return [e["note"] for e in self._events(stage)]

    def activations(self, stage: str) -> dict[str, Any] | None:
        events = self._events(stage)
        return events[-1]["activations"] if events else None

    def load(self, index: int, block: nn.Module) -> None:
        self.state.load(index, block, self.anatomy)

    def store(self, index: int, block: nn.Module, anatomy: BlockAnatomy) -> None:
        tensors, self._record = dump_block(block, anatomy, self.dtype)
        self._write(self.file(index), tensors)

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

    def learned(self, index: int) -> dict[str, torch.Tensor]:
        for stage, lines in ((TRAIN, 1), (LEARN, len(self.anatomy.blocks))):
            if self.finished(stage) == lines:
                return read_block(self._learned(stage, index))
        return {}

    def record(self, stage: str, index: int, note: Any, activations: dict[str, Any] | None) -> None:
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
        if stage == SOLVE:
            event["record"] = self._record.model_dump(mode="json")
        self.workspace.append(event)

    def again(self, stage: str, why: str) -> None:
        self.workspace.rewind(self._events(stage)[0], why)

    def _sync_carried(self, carried: dict[str, Any] | None) -> None:
        """Make the files of activations durable that a journal line is to vouch for."""
        try:
            for state in (carried, (carried or {}).get("reference")):
                if state is not None:
                    sync(self.scratch / state["file"])
                    sync(self.scratch)
        except OSError as error:
            raise disk_error(self.scratch, error) from error

    def _learned(self, stage: str, index: int) -> Path:
        return self.folder / f"{stage}-{index:05d}.safetensors"

    def file(self, index: int) -> Path:
        return self.folder / f"block-{index:05d}.safetensors"

    def result(self, kept: list[int] | None) -> ModelState:
        """The model that leaves the step."""
        if kept is not None:
            return self.state.kept(kept)
        events = self._events(SOLVE)
        records = [BlockRecord.model_validate(e["record"]) for e in events]
        return self.state.changed(records, [self.file(e["block"]) for e in events])

    def _events(self, stage: str) -> list[dict[str, Any]]:
        return self.workspace.find(event="block", step=self.step, stage=stage)


class ReadingSink(JournalSink):
    """The sink of a process that takes part in a training of a run that another one carries out."""

    def store(self, index: int, block: nn.Module, anatomy: BlockAnatomy) -> None:
        """The other process stores the same block."""

    def keep(self, stage: str, index: int, tensors: dict[str, torch.Tensor]) -> None:
        """The other process keeps the same tensors."""

    def record(self, stage: str, index: int, note: Any, activations: dict[str, Any] | None) -> None:
        """The journal is the other process's."""

    def again(self, stage: str, why: str) -> None:
        """The journal is the other process's."""
