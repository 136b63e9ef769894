"""What survives an interrupted training: parameters, optimiser, step; and the history of losses."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from compress.errors import CompressError
from compress.system.files import disk_error, write_atomically

_FACTS, _STATE, _HISTORY = "training.json", "checkpoint.safetensors", "history.jsonl"


class CheckpointFolder:
    """A folder of one training.

    ``training.json`` (what the training is: a folder serves one only), ``checkpoint.safetensors``
    (the last good state), ``history.jsonl`` (a line a step up to that state, some behind it).

    Args:
        folder: created where it does not exist.
        facts: everything that the result depends on, as plain data, at most two levels deep.
        writes: False in processes that only read.

    Raises:
        CompressError: the folder belongs to another training; the message names the difference.
    """

    def __init__(self, folder: Path, facts: dict[str, Any], writes: bool = True) -> None:
        self.folder, self.writes = folder, writes
        self._pending: list[str] = []
        path = folder / _FACTS
        facts = json.loads(json.dumps(facts))  # as it will be read: lists for tuples
        if path.exists():
            self._compare(_facts(folder), facts)
        elif writes:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise CompressError(
                    f"a folder for checkpoints ({folder})", error.strerror or str(error)
                ) from error
            write_atomically(path, json.dumps(facts, indent=1, sort_keys=True))

    def _compare(self, then: dict[str, Any], now: dict[str, Any]) -> None:
        before, after = _flat(then), _flat(now)
        changed = [n for n in sorted({*before, *after}) if before.get(n) != after.get(n)]
        if changed:
            told = "; ".join(
                f"{n}: {before.get(n, 'absent')} then, {after.get(n, 'absent')} now"
                for n in changed[:5]
            )
            more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
            raise CompressError(
                f"the training that {self.folder} was started with",
                f"another one ({told}{more})",
                "Undo the change, or remove the folder to train anew",
            )

    def save(self, step: int, tensors: dict[str, torch.Tensor]) -> None:
        """Make a state durable; until it is, the last one stays.

        Raises:
            CompressError: the disk is full or the folder cannot be written.
        """
        if not self.writes:
            return
        path = self.folder / _STATE
        temporary = path.with_name(path.name + ".partial")
        try:
            with open(self.folder / _HISTORY, "a") as file:
                file.write("".join(self._pending))
                file.flush()
                os.fsync(file.fileno())
            held = {n: t.detach().cpu().contiguous() for n, t in tensors.items()}
            about = {"step": str(step), "check": _digest(step, held)}
            save_file(held, temporary, metadata=about)
            _sync(temporary)
            os.replace(temporary, path)
            _sync(self.folder)
        except (OSError, SafetensorError) as error:
            temporary.unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise disk_error(self.folder, error) from error
            raise CompressError(f"to write in {self.folder}", str(error), "Make room") from error
        self._pending.clear()

    def load(self) -> tuple[int, dict[str, torch.Tensor]]:
        """The last state and the step that follows it; (0, {}) where there is none.

        Raises:
            CompressError: the file is damaged.
        """
        path = self.folder / _STATE
        if not path.exists():
            return 0, {}
        try:
            with safe_open(path, "pt") as file:
                tensors = {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118
                step, check = int(file.metadata()["step"]), file.metadata().get("check")
            if check is not None and check != _digest(step, tensors):  # old ones have none
                raise ValueError("values that are not those written")
            return step, tensors
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise CompressError(
                f"a whole checkpoint in {path}", str(error), "Remove the folder to train anew"
            ) from error

    def note(self, line: dict[str, Any]) -> None:
        """Add a line to the history; durable with the next state."""
        if self.writes:
            self._pending.append(json.dumps(line) + "\n")

    def history(self, step: int) -> list[dict[str, Any]]:
        """Lines of the steps before ``step``; those behind it, and a torn one, are dropped.

        Raises:
            CompressError: lines are missing, which were durable before the state was.
        """
        path = self.folder / _HISTORY
        kept: list[dict[str, Any]] = []
        if path.exists():
            for text in path.read_text().splitlines():
                try:
                    line = json.loads(text)
                except json.JSONDecodeError:
                    break  # half a line: the process ended while writing it
                if line["step"] < step:
                    kept.append(line)
        if len(kept) < step:
            raise CompressError(
                f"the history of {step} steps in {path}", f"a damaged one, of {len(kept)}",
                "Remove the folder to train anew",
            )  # fmt: skip
        if path.exists() and self.writes:
            write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept))
        return kept


def begun_precision(folder: Path | None) -> str | None:
    """The precision in which the training of a folder was begun; None where none was.

    Raises:
        CompressError: the folder's ``training.json`` is damaged.
    """
    if folder is None or not (Path(folder) / _FACTS).exists():
        return None
    return _flat(_facts(Path(folder))).get("options.precision")


def _facts(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / _FACTS).read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise CompressError(
            f"what the training in {folder} is", f"a damaged {_FACTS}",
            "Remove the folder to train anew",
        ) from error  # fmt: skip


def _digest(step: int, tensors: dict[str, torch.Tensor]) -> str:
    """blake2b of a state: a bit that flips on the disk must not become another model."""
    total = hashlib.blake2b(str(step).encode(), digest_size=16)
    for name in sorted(tensors):
        total.update(name.encode())
        total.update(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()


def _flat(facts: dict[str, Any]) -> dict[str, Any]:
    flat = {}
    for name, value in facts.items():
        if isinstance(value, dict):
            flat |= {f"{name}.{k}": v for k, v in value.items()}
        else:
            flat[name] = value
    return flat


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
