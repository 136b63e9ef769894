"""A run's folder: one process at a time, a journal that survives any crash, one recipe for life."""

from __future__ import annotations

import difflib
import fcntl
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from compress.errors import CompressError
from compress.files import disk_error, write_atomically

_OURS = ("recipe.yaml", "journal.jsonl", "lock.json", ".lock")


class Workspace:
    """The folder of one run.

    ``recipe.yaml`` (resolved), ``lock.json`` (what the run depends on), ``journal.jsonl`` (what is
    done), ``work/`` (blocks and activations, gone at the end), ``model/`` and the report.

    Use as a context manager: it holds a lock on the folder meanwhile.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.events: list[dict[str, Any]] = []
        self._lock: int | None = None
        self._chosen: dict[str, Any] = {}  # kept values of a run that has not claimed its folder

    @property
    def work(self) -> Path:
        return self.folder / "work"

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def journal(self) -> Path:
        return self.folder / "journal.jsonl"

    @property
    def claimed(self) -> bool:
        """True where a recipe has been started here."""
        return (self.folder / "recipe.yaml").exists()

    @property
    def resumed(self) -> bool:
        return bool(self.events)

    def __enter__(self) -> Workspace:
        existing = self.folder.exists()
        if existing and not self.folder.is_dir():
            raise CompressError("a folder for the output", f"the file {self.folder}")
        if existing and any(self.folder.iterdir()) and not (self.folder / ".lock").exists():
            raise CompressError(
                "an output folder that is new, empty or from an earlier run",
                f"{self.folder} with other files in it",
                "Choose another folder with --out",
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise CompressError(
                f"an output folder that can be written ({self.folder})",
                error.strerror or str(error),
                "Choose another folder with --out",
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            self._lock = None
            raise CompressError(
                f"{self.folder} to itself",
                "another run that is working in it",
                "Wait for it, stop it, or choose another folder with --out",
            ) from None
        self.events = self._read_journal()
        return self

    def __exit__(self, *_exc: object) -> None:
        if self._lock is not None:
            os.close(self._lock)  # releases the lock
            self._lock = None

    def claim(self, recipe_text: str) -> None:
        """Write the resolved recipe, or check that the folder is of the same one.

        Raises:
            CompressError: the folder belongs to another recipe; the message shows the difference.
        """
        path = self.folder / "recipe.yaml"
        if not path.exists():
            write_atomically(path, recipe_text)
            if self._chosen:
                self._settle()
            return
        earlier = path.read_text()
        if earlier != recipe_text:
            difference = "\n".join(
                line
                for line in difflib.unified_diff(
                    earlier.splitlines(),
                    recipe_text.splitlines(),
                    "earlier",
                    "now",
                    n=0,
                    lineterm="",
                )
                if not line.startswith("@@")
            )
            raise CompressError(
                f"the recipe that {self.folder} was started with",
                f"another one:\n{difference}\n",
                "Choose another folder with --out, or undo the change",
            )

    def keep(self, name: str, choose: Callable[[], Any]) -> Any:
        """A value that is chosen at a run's first start and taken over by all later ones.

        For what ``auto`` resolves to: a run that goes on on another kind of machine must not
        change its mind half way. Recorded in lock.json (``kept``) as soon as the folder belongs to
        the recipe; a recipe that is refused before leaves nothing behind.

        Args:
            name: of the value, unique in a run.
            choose: called where none is recorded; returns something JSON-able.

        Returns:
            The recorded value, as JSON gives it back.
        """
        kept = {**self._locked().get("kept", {}), **self._chosen}
        if name not in kept:
            self._chosen[name] = kept[name] = json.loads(json.dumps(choose()))
            if self.claimed:
                self._settle()
        return kept[name]

    def pin(self, facts: dict[str, Any]) -> dict[str, Any]:
        """Write what the run depends on to lock.json, or check it on resuming.

        Args:
            facts: ``must`` (digests: a difference is an error) and ``may`` (versions: noted only).

        Returns:
            Differences in ``may``, {name: [then, now]}.
        """
        earlier = self._locked()
        if "must" not in earlier:
            self._settle(facts)
            return {}
        for name, value in facts["must"].items():
            if earlier["must"].get(name) != value:
                raise CompressError(
                    f"the same {name} as when {self.folder} was started",
                    f"{value!r} instead of {earlier['must'].get(name)!r}",
                    "The model or a text has changed since; start in a new folder",
                )
        old, new = earlier.get("may", {}), facts["may"]
        return {k: [old.get(k), v] for k, v in new.items() if old.get(k) != v}

    def _locked(self) -> dict[str, Any]:
        """What lock.json says; nothing where the folder is no recipe's yet."""
        path = self.folder / "lock.json"
        if not self.claimed or not path.exists():
            return {}
        return json.loads(path.read_text())

    def _settle(self, facts: dict[str, Any] | None = None) -> None:
        """Write lock.json anew with the facts and the values chosen so far."""
        if self._lock is None:
            return  # a process that only follows reads what the one that holds the folder writes
        locked = {**self._locked(), **(facts or {})}
        if kept := {**locked.get("kept", {}), **self._chosen}:
            locked["kept"] = kept
        write_atomically(self.folder / "lock.json", json.dumps(locked, indent=2, sort_keys=True))
        self._chosen = {}

    def read(self) -> None:
        """Take over what the process that holds the lock has put into the journal."""
        self.events = self._read_journal()

    def append(self, event: dict[str, Any]) -> None:
        """Add an event to the journal and make it durable."""
        line = json.dumps(event, sort_keys=True) + "\n"
        try:
            with open(self.journal, "a") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise disk_error(self.folder, error) from error
        self.events.append(event)

    def find(self, **fields: Any) -> list[dict[str, Any]]:
        """Events whose fields have these values, oldest first."""
        return [e for e in self.events if all(e.get(k) == v for k, v in fields.items())]

    def clean(self) -> None:
        """Remove the working files of a run that is complete."""
        shutil.rmtree(self.work, ignore_errors=True)

    def _read_journal(self) -> list[dict[str, Any]]:
        if not self.journal.exists():
            return []
        data = self.journal.read_bytes()
        whole, newline, torn = data.rpartition(b"\n")
        if torn:
            # A crash in the middle of a write leaves half a line: it was never acknowledged.
            write_atomically(self.journal, (whole + newline).decode())
        return [json.loads(line) for line in whole.splitlines() if line.strip()]
