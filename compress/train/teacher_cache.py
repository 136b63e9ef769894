"""A teacher's predictions on disk, so that a training that sees its windows again asks once.

Kept of each position are the k likeliest tokens with their shares, and what all others have
together: 8 k bytes (512 for k = 64), where the logits of a vocabulary of 49,152 take 196,608.
A file a window; each says what it was made from and what it holds, so one that an interruption or a
disk has left in another state is made again.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from compress.errors import CompressError
from compress.models.halves import tail_logits, trunk_hidden
from compress.system import processes
from compress.system.files import disk_error, sync
from compress.train.divergence import top_shares
from compress.train.source import TokenSource
from compress.train.teacher import SHARES, TOKENS, Batch, ModelTeacher, model_inputs

_LOGIT_BYTES = 64 * 2**20  # of one stretch of positions in float32


def cache_bytes(windows: int, length: int, count: int) -> int:
    """Room on the disk for the predictions of windows of so many tokens."""
    return windows * length * (8 * count + 4)


class CachedWindows:
    """Windows of tokens with what a teacher predicts for them, as a source of a training.

    Args:
        windows: what the teacher reads; ``labels`` and ``attention_mask`` among it where needed.
        folder: of the cache; all processes of a training see it.
        count: tokens that are told apart at each position.
        heat: temperature of the predictions.
    """

    def __init__(self, windows: TokenSource, folder: Path, count: int, heat: float) -> None:
        self.windows, self.folder, self.count, self.heat = windows, folder, count, heat

    def __len__(self) -> int:
        return len(self.windows)

    def get(self, indices: torch.Tensor) -> Batch:
        """As :meth:`compress.train.source.TokenSource.get`, with what the teacher predicts.

        Raises:
            CompressError: a file is gone or damaged.
        """
        held = []
        for index in indices.tolist():
            found = self._read(index)
            if found is None:
                raise CompressError(
                    "the teacher's predictions as they were written",
                    f"others in {self._at(index)}",
                    "Something has removed or changed it; the same command makes it again",
                )  # fmt: skip
            held.append(found)
        stacked = {name: torch.stack([h[name] for h in held]) for name in (TOKENS, SHARES)}
        return self.windows.get(indices) | stacked

    def fill(
        self,
        load: Callable[[], ModelTeacher],
        device: torch.device,
        dtype: torch.dtype,
        guard: Callable[[], None] = lambda: None,
        told: Callable[[int, int], None] = lambda _done, _count: None,
    ) -> None:
        """Ask the teacher about all windows that it has not been asked about.

        Several processes share the work.

        Args:
            load: brings the teacher into memory; called where something is missing.
            device: where the teacher is. dtype: of its matrix products.
            guard: called before each window; raises when a limit is exceeded.
            told: called after each with how many are done, of how many.

        Raises:
            CompressError: the disk is full or the folder cannot be written.
        """
        world = processes.world()
        mine = range(world.rank, len(self), world.size)
        missing = [index for index in mine if self._read(index) is None]
        if missing:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise disk_error(self.folder.parent, error) from error
            teacher = load()
            for done, index in enumerate(missing, 1):
                guard()
                batch = self.windows.get(torch.tensor([index]))
                batch = {name: tensor.to(device) for name, tensor in batch.items()}
                with torch.no_grad(), torch.autocast(device.type, dtype, dtype != torch.float32):
                    self._write(index, *self._predictions(teacher, batch))
                told(done, len(missing))
        if world.size > 1:
            processes.wait_for_all()

    def _predictions(
        self, teacher: ModelTeacher, batch: Batch
    ) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = model_inputs(batch)
        last, _ = trunk_hidden(teacher.model, teacher.anatomy, inputs)
        vocabulary = teacher.model.get_output_embeddings().weight.shape[0]
        span = max(1, _LOGIT_BYTES // (4 * vocabulary))
        parts = []
        for positions in _stretches(last.shape[1], span):
            cut = {k: v[:, positions] if v.shape[:2] == last.shape[:2] else v
                   for k, v in inputs.items()}  # fmt: skip
            logits = tail_logits(teacher.model, teacher.anatomy, cut, last[:, positions])
            parts.append(top_shares(logits.float(), self.count, self.heat))
        tokens, shares = (torch.cat(pieces, 1)[0].cpu() for pieces in zip(*parts, strict=True))
        return tokens, shares

    def _at(self, index: int) -> Path:
        return self.folder / f"window-{index:06d}.safetensors"

    def _about(self, index: int) -> str:
        """What a window's predictions follow from, the teacher left out: a folder has one."""
        batch = self.windows.get(torch.tensor([index]))
        return _digest(f"{self.count} {self.heat!r}", {k: v for k, v in batch.items()})

    def _read(self, index: int) -> Batch | None:
        """A window's predictions; None where they are not there or not what was written."""
        try:
            with safe_open(self._at(index), "pt") as file:
                held = {name: file.get_tensor(name) for name in (TOKENS, SHARES)}
                facts = file.metadata() or {}
        except (SafetensorError, OSError):
            return None
        about = self._about(index)
        whole = facts.get("about") == about and facts.get("check") == _digest(about, held)
        return held if whole else None

    def _write(self, index: int, tokens: torch.Tensor, shares: torch.Tensor) -> None:
        path, about = self._at(index), self._about(index)
        temporary = path.with_suffix(".partial")
        held = {TOKENS: tokens.contiguous(), SHARES: shares.contiguous()}
        try:
            save_file(held, temporary, {"about": about, "check": _digest(about, held)})
            os.replace(temporary, path)
            sync(self.folder)
        except (OSError, SafetensorError) as error:
            temporary.unlink(missing_ok=True)
            if not isinstance(error, OSError):
                error = OSError(0, str(error))
            raise disk_error(self.folder, error) from error


def _stretches(length: int, span: int) -> Iterator[slice]:
    return (slice(start, min(length, start + span)) for start in range(0, length, span))


def _digest(words: str, tensors: Batch) -> str:
    total = hashlib.blake2b(words.encode(), digest_size=16)
    for name in sorted(tensors):
        total.update(name.encode())
        total.update(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()
