"""Modules that a recipe names, run before its steps are read: methods in them register themselves.

This runs code. Nothing of it happens before the rest of the recipe is known to be well formed, and
a run records what was run.
"""

from __future__ import annotations

import hashlib
import importlib
import re
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

from compress.errors import CompressError
from compress.system.intake import read_limited, reason, user_path

_LARGEST = 16 * 2**20  # bytes of a source file
_MODULE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")
_digests: dict[str, str] = {}  # by resolved name, of what was run last


def run_imports(names: tuple[str, ...], folder: Path, where: str) -> tuple[str, ...]:
    """Import what a recipe names, each once a process (a file again when it has changed).

    Args:
        names: dotted names of modules, or paths of ``.py`` files.
        folder: of the recipe; relative paths start there.
        where: the recipe, for messages.

    Returns:
        The names, paths absolute, so that they mean the same elsewhere.

    Raises:
        CompressError: no such module or file, neither of the two, or the code raises an error.
    """
    return tuple(
        _run(name, folder, f"{where}, imports.{number}") for number, name in enumerate(names)
    )


def import_digests(names: tuple[str, ...]) -> dict[str, str]:
    """sha256 of the files that were imported, by resolved name; of a package, of its
    ``__init__.py``. Modules that they import in their turn are not looked at.

    Args:
        names: what :func:`run_imports` returned; what has not been imported is imported now.
    """
    for name in names:
        if name not in _digests:
            _run(name, Path(), "imports")
    return {name: _digests[name] for name in names}


def imported() -> dict[str, str]:
    """sha256 of all that was imported into this process, by resolved name."""
    return dict(_digests)


def is_file(name: str) -> bool:
    """Whether an import is a path (else it is a module's name)."""
    return name.endswith(".py") or "/" in name


def _run(name: str, folder: Path, where: str) -> str:
    try:
        if is_file(name):
            return _run_file(folder / user_path(name, "a path of a .py file"))
        if not _MODULE.fullmatch(name):
            raise CompressError("a module's name or the path of a .py file", repr(name))
        module = importlib.import_module(name)
    except CompressError as error:
        raise error.within(where) from error
    except (Exception, SystemExit) as error:  # foreign code may raise anything
        raise CompressError(
            f"{name} to be importable", reason(error),
            "Correct it; --traceback shows the place" if is_file(name)
            else "Install the package that holds it, or give the path of a .py file",
            where=where,
        ) from error  # fmt: skip
    _digests[name] = _digest_of_module(module)
    return name


def _run_file(path: Path) -> str:
    path = path.resolve()
    source = read_limited(path, "a .py file to import", _LARGEST)
    digest = hashlib.sha256(source).hexdigest()
    if _digests.get(str(path)) == digest:
        return str(path)
    # A name of its own: files called like a library must not take its place.
    name = f"{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    module = module_from_spec(spec_from_file_location(name, path))
    earlier = sys.modules.get(name)
    sys.modules[name] = module  # where pydantic looks up what annotations mean
    try:
        # Not through the loader: what runs must be the bytes whose digest is recorded.
        exec(compile(source, str(path), "exec"), vars(module))
    except BaseException:
        if earlier is None:
            del sys.modules[name]
        else:
            sys.modules[name] = earlier
        raise
    _digests[str(path)] = digest
    return str(path)


def _digest_of_module(module: ModuleType) -> str:
    file = getattr(module, "__file__", None)
    return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else ""
