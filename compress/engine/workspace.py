"""A run's folder: one process at a time, a journal that survives any crash, one recipe for life."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from compress.engine.journal import Journal
from compress.engine.mended import begun, changed_parts, resolved
from compress.errors import CompressError
from compress.system.files import sync, write_atomically

_RECIPE, _LOCKED, _EVENTS, _HELD = "recipe.yaml", "lock.json", "journal.jsonl", ".lock"
_TRAINED = ("work/base", "base")
_ATTEMPTS = 20  # at taking a folder that other processes leave, and remove, meanwhile


class Workspace:
    """The folder of one run.

    ``recipe.yaml`` (resolved), ``lock.json`` (what the run depends on), ``journal.jsonl`` (what is
    done), ``work/`` (blocks and activations, gone at the end), ``model/`` and the report.

    Use as a context manager: it holds a lock on the folder meanwhile. What it made on entering is
    removed on leaving where no recipe has been started in it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._journal = Journal(folder / _EVENTS)
        self._lock: int | None = None
        self._locked_first = False  # this object has made the lock file
        self._made: list[Path] = []  # folders that this object has made, outermost first
        self._chosen: dict[str, Any] = {}  # kept values of a run that has not claimed its folder

    @property
    def work(self) -> Path:
        return self.folder / "work"

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def recipe(self) -> Path:
        return self.folder / _RECIPE

    @property
    def journal(self) -> Path:
        return self._journal.path

    @property
    def events(self) -> list[dict[str, Any]]:
        """What is done, oldest first."""
        return self._journal.events

    @property
    def notes(self) -> list[str]:
        """Why something was done again, as sentences."""
        return self._journal.notes

    @property
    def claimed(self) -> bool:
        """True where a recipe has been started here."""
        return self.recipe.exists()

    @property
    def resumed(self) -> bool:
        return bool(self.events)

    def __enter__(self) -> Workspace:
        """Make the folder where there is none, and hold it.

        Raises:
            CompressError: the folder holds other files, cannot be written, or another run holds it.
        """
        try:
            self._refuse_foreign()
            self._lock = self._hold()
            self._journal.open(mend=True)
        except BaseException as error:
            self._leave()
            if not isinstance(error, OSError):
                raise
            raise CompressError(
                f"an output folder that can be written ({self.folder})",
                error.strerror or str(error),
                "Choose another folder with --out",
            ) from error
        return self

    def __exit__(self, *_exc: object) -> None:
        self._leave()

    def _hold(self) -> int:
        """Lock the folder; returns the descriptor that holds the lock."""
        for attempt in range(_ATTEMPTS):
            try:
                self._make_folder()
                descriptor, new = _opened(self.folder / _HELD)
            except FileNotFoundError:
                if attempt == _ATTEMPTS - 1:
                    raise
                continue  # a run that was refused has just removed the folder
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_at(descriptor, self.folder / _HELD):
                    self._locked_first = new
                    return descriptor
            except BaseException as error:
                os.close(descriptor)
                if not isinstance(error, OSError):
                    raise
                break
            # Removed between open and flock: another process may hold the file now in its place.
            os.close(descriptor)
        raise CompressError(
            f"{self.folder} to itself",
            "another run that is working in it",
            "Wait for it, stop it, or choose another folder with --out",
        ) from None

    def _make_folder(self) -> None:
        folder = self.folder.absolute()  # the working directory may be another one on leaving
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        for path in reversed(missing):
            try:
                path.mkdir()
            except FileExistsError:
                if not path.is_dir():
                    raise
                continue
            if path not in self._made:  # made, removed by another process, and made again
                self._made.append(path)
        if missing:
            sync(folder.parent)

    def _leave(self) -> None:
        """Release the lock; what was made for a run that never began goes first, under the lock."""
        try:
            if not self.claimed:
                held = self.folder / _HELD
                if self._lock is not None and self._locked_first and _is_at(self._lock, held):
                    held.unlink()
                for path in reversed(self._made):
                    path.rmdir()  # refuses a folder that holds anything
        except OSError:
            pass  # it stays: another process may be at work in it
        finally:
            self._made, self._locked_first = [], False
            if self._lock is not None:
                os.close(self._lock)  # releases the lock
                self._lock = None

    def _refuse_foreign(self) -> None:
        """Refuse a folder with files that are not a run's.

        A run's folder is known by two of its recipe, its lock and its journal: one of them may have
        been lost. Earlier versions had the recipe alone until the model was trained that a run
        starts from, with the training's record beside it. A file called .lock is anybody's.
        """
        if not self.folder.exists():
            return
        if not self.folder.is_dir():
            raise CompressError("a folder for the output", f"the file {self.folder}")
        if sum((self.folder / name).is_file() for name in (_RECIPE, _LOCKED, _EVENTS)) >= 2:
            return
        trained = any((self.folder / of / "training.json").is_file() for of in _TRAINED)
        if self.claimed and trained:
            return
        for path in self.folder.rglob("*"):
            fresh = path == self.journal and not path.stat().st_size  # claimed a moment ago
            partial = path.name in (_RECIPE + ".partial", _LOCKED + ".partial")
            if not (path.name == _HELD or fresh or partial or path.is_dir()) or path.is_symlink():
                raise CompressError(
                    "an output folder that is new, empty or from an earlier run",
                    f"{self.folder} with other files in it ({path.relative_to(self.folder)})",
                    "Choose another folder with --out",
                )

    def claim(self, recipe_text: str) -> list[str]:
        """Write the resolved recipe, or check that it is the one that the folder was started with.

        Parts that decide nothing of what has been done may have changed since.

        Returns:
            Names of the parts that have changed.

        Raises:
            CompressError: the folder belongs to another recipe; the message shows the difference.
        """
        path = self.folder / _RECIPE
        if not path.exists():
            self._check_known(recipe_text)
            self.journal.touch()  # a folder is a run's by both
            write_atomically(path, recipe_text)
            if self._chosen:
                self._settle()
            return []
        earlier = resolved(path)
        try:
            changed = changed_parts(earlier, recipe_text, self.events)
        except CompressError as error:
            raise error.within(str(self.folder)) from None
        if not changed or self._lock is None:
            return changed
        if begun(self.events) or self.find(event="written"):
            self._forget_evaluation()
            write_atomically(path, recipe_text)
            self.append({"event": "mended", "parts": changed, "recipe": _sha(recipe_text)})
        else:
            if self.events:
                self._journal.rewind(0, "the recipe was changed before any block was done")
            (self.folder / _LOCKED).unlink(missing_ok=True)
            write_atomically(path, recipe_text)
        return changed

    def start(self, at: str) -> None:
        """Note the run's first start, with what lock.json holds."""
        if not self.find(event="started"):
            locked = self._locked()
            must = {k: v for k, v in locked["must"].items() if not k.startswith("evaluation")}
            recipe = _sha((self.folder / _RECIPE).read_text(encoding="utf-8"))
            self.append({"event": "started", "at": at, "recipe": recipe,
                         "lock": {**locked, "must": must}})  # fmt: skip

    def keep(self, name: str, choose: Callable[[], Any], *, begun: Any = None) -> Any:
        """A value that is chosen at a run's first start and taken over by all later ones.

        For what ``auto`` resolves to: a run that goes on on another kind of machine must not
        change its mind half way. Recorded in lock.json (``kept``) as soon as the folder belongs to
        the recipe; a recipe that is refused before leaves nothing behind.

        Args:
            name: of the value, unique in a run.
            choose: called where none is recorded; returns something JSON-able.
            begun: the value of runs that an earlier version began, which recorded none; None where
                there is no such value.

        Returns:
            The recorded value, as JSON gives it back.
        """
        locked = self._locked()
        kept = {**locked.get("kept", {}), **self._chosen}
        if name not in kept:
            old = begun is not None and bool(self.find(event="block"))
            value = begun if old else choose()
            self._chosen[name] = kept[name] = json.loads(json.dumps(value))
            if self.claimed:
                self._settle()
        return kept[name]

    def kept(self, name: str) -> Any:
        """What :meth:`keep` has recorded under a name; None where it has recorded nothing."""
        return self._locked().get("kept", {}).get(name)

    def pin(self, facts: dict[str, Any]) -> dict[str, Any]:
        """Write what the run depends on to lock.json, or check it on resuming.

        Args:
            facts: ``must`` (digests: a difference is an error) and ``may`` (versions: noted only).
                Names that lock.json does not know are added to it.

        Returns:
            Differences in ``may``, {name: [then, now]}.

        Raises:
            CompressError: something has changed, or lock.json is damaged.
        """
        earlier = self._locked()
        must = earlier.get("must", {})
        for name, value in facts["must"].items():
            if name in must and must[name] != value:
                raise CompressError(
                    f"the same {name} as when {self.folder} was started",
                    f"{value!r} instead of {must[name]!r}",
                    "The model or a text has changed since; start in a new folder",
                )
        if not must.keys() >= facts["must"].keys() or not (self.folder / _LOCKED).exists():
            may = earlier.get("may", facts["may"])
            self._settle({**facts, "must": {**must, **facts["must"]}, "may": may})
        old, new = earlier.get("may", facts["may"]), facts["may"]
        return {k: [old.get(k), v] for k, v in new.items() if old.get(k) != v}

    def locked(self, name: str) -> Any:
        """A fact that is pinned; None where there is none of that name."""
        return self._locked().get("must", {}).get(name)

    def read(self) -> None:
        """Take over what the process that holds the lock has put into the journal."""
        self._journal.open(mend=False)

    def append(self, event: dict[str, Any]) -> None:
        """Add an event to the journal and make it durable."""
        self._journal.append(event)

    def rewind(self, event: dict[str, Any], why: str) -> None:
        """Take back an event and all behind it: it is to be done again.

        Args:
            event: one of :attr:`events`.
            why: what was lost, as a sentence.
        """
        self._journal.rewind(self.events.index(event), why)

    def find(self, **fields: Any) -> list[dict[str, Any]]:
        """Events whose fields have these values, oldest first."""
        return [e for e in self.events if all(e.get(k) == v for k, v in fields.items())]

    def clean(self) -> None:
        """Remove the working files of a run that is complete."""
        shutil.rmtree(self.work, ignore_errors=True)

    def _locked(self) -> dict[str, Any]:
        """What lock.json says; nothing where the folder is no recipe's yet."""
        path = self.folder / _LOCKED
        started = self.find(event="started")
        if not self.claimed and not started:
            return {}
        if not path.exists():
            return dict(started[0].get("lock", {})) if started else {}
        try:
            locked = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(locked, dict) or not isinstance(locked.get("must", {}), dict):
                raise ValueError(f"{locked!r:.100}")
        except (ValueError, OSError) as error:
            raise CompressError(
                f"what the run depends on in {path}",
                f"a damaged file ({error})",
                "Remove it: the journal holds a copy of it"
                if started and "lock" in started[0] else "Start in a new folder",
            ) from error  # fmt: skip
        return locked

    def _settle(self, facts: dict[str, Any] | None = None) -> None:
        """Write lock.json anew with the facts and the values chosen so far."""
        if self._lock is None:
            return  # a process that only follows reads what the one that holds the folder writes
        locked = {**self._locked(), **(facts or {})}
        if kept := {**locked.get("kept", {}), **self._chosen}:
            locked["kept"] = kept
        write_atomically(self.folder / _LOCKED, json.dumps(locked, indent=2, sort_keys=True))
        self._chosen = {}

    def _forget_evaluation(self) -> None:
        """Unpin what only decides how the model is measured."""
        locked = self._locked()
        must = {k: v for k, v in locked.get("must", {}).items() if not k.startswith("evaluation")}
        self._settle({"must": must})

    def _check_known(self, recipe_text: str) -> None:
        """Where recipe.yaml is gone but a run has begun: it must have been this recipe."""
        known = [e["recipe"] for e in self.events if "recipe" in e]
        if self.find(event="block") and known and known[-1] != _sha(recipe_text):
            raise CompressError(
                f"the recipe that {self.folder} was started with",
                "another one, and no recipe.yaml in the folder to compare it with",
                "Choose another folder with --out, or undo the change",
            )


def _opened(path: Path) -> tuple[int, bool]:
    """A file open to read and write, and whether it had to be made."""
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644), True
    except FileExistsError:
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o644), False


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is still the one that a path names."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
