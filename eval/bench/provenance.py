"""Which code and which machine a figure comes from, and whether that code has changed since.

Two versions of a file are the same code where their syntax trees are (comments, docstrings and
formatting aside), or, for a recipe, where it asks for the same; only real changes mark a figure.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

import yaml

from compress.system.machine import processor_name

ROOT = Path(__file__).resolve().parents[2]

# What `compress run` executes, as git pathspecs: all but what only reads arguments, shows text and
# hears signals.
# A benchmark with a constant CODE names other ones; its own module always counts.
RUN = (
    "compress", ":!compress/cli", ":!compress/conformance", ":!compress/planning/inspection.py",
    ":!compress/planning/reference.py", ":!compress/errors.py",
    ":!compress/system/progress.py", ":!compress/system/signals.py", ":!compress/system/tables.py",
    "eval/quality", "eval/cost", "eval/tasks", "eval/evaluator.py", "eval/parts.py",
    "eval/cache.py",
)  # fmt: skip

# What a plan predicts moves no figure but those that hold a run against its plan.
DEFAULT = (*RUN, ":!compress/planning/forecast.py", ":!compress/planning/workload.py")

# For benchmarks of models that exist and of steps that use no gradients.
NO_TRAINING = (
    ":!compress/train", ":!compress/generators", ":!compress/methods/sparsity/maskllm",
    ":!compress/methods/width/vib",
    ":!compress/system/processes.py", ":!compress/engine/follower.py",
    ":!compress/checkpoint/apply_mask.py",
)  # fmt: skip

# For those that factorise nothing into a dictionary and coefficients.
NO_DICTIONARY = (
    ":!compress/linear/atoms.py", ":!compress/linear/dictionary.py",
    ":!compress/linear/sparse_coding.py", ":!compress/methods/factorize/dense_sparse*",
    ":!compress/methods/factorize/stf*",
)  # fmt: skip

_FLAGS = re.compile(r"^(avx2|avx512f|\w*_bf16|\w*_vnni|amx_\w+|asimd|sve|bf16|i8mm)$")
_MODULE = re.compile(r"-m compress\.eval\.bench\.(?P<name>[\w.]+)(?:.*--only (?P<part>\w+))?")
_WORDS = ("name", "description", "expected")  # of a recipe; they change nothing that is measured


@functools.cache
def commit() -> str | None:
    """The commit of this checkout, short; None outside a checkout.

    Where code differs from the commit (also by new files), ``-dirty-`` and its
    :func:`code_key` follow. Read once a process: what is edited later was not measured.
    """
    head = _git("rev-parse", "--short=10", "HEAD")
    if head is None:
        return None
    changed = _git("status", "--porcelain", "--", "compress", "eval", "recipes",
                   ":!eval/results", ":!*.md")  # fmt: skip
    return f"{head.strip()}-dirty-{code_key()}" if changed else head.strip()


@functools.cache
def code_digest() -> str:
    """sha256 (hex) of everything that ``compress run`` may execute, benchmarks left out."""
    found = hashlib.sha256()
    for folder in (ROOT / "compress", ROOT / "eval"):
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(ROOT).as_posix()
            if name.startswith(("eval/bench/", "eval/results/")):
                continue
            if path.suffix in (".py", ".yaml") and path.is_file():
                found.update(f"{name}\0{_meaning(name, path.read_bytes())}\0".encode())
    return found.hexdigest()


def code_key() -> str:
    """Eight characters that name the present code, for folders of what it has measured so far."""
    return code_digest()[:8]


def machine_key() -> str:
    """Eight characters that name the machine and its threads, for times measured so far."""
    return hashlib.sha256(processor().encode()).hexdigest()[:8]


def recipe_key(recipe_text: str, data_root: Path | None = None) -> str:
    """Eight characters that name what a recipe asks for, and where its data come from."""
    asked = _meaning("recipe.yaml", recipe_text.encode())
    where = "" if data_root is None else str(Path(data_root).resolve())
    return hashlib.sha256(f"{asked}\0{where}".encode()).hexdigest()[:8]


@functools.cache
def processor() -> str:
    """The processor's name, those of its instructions that decide speed, its cores, threads."""
    flags: list[str] = []
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(errors="replace").splitlines():
            if line.lower().startswith(("flags", "features")):
                flags = sorted(f for f in line.partition(":")[2].split() if _FLAGS.match(f))
                break
    import torch

    cores, threads = os.cpu_count() or 1, torch.get_num_threads()
    parts = [processor_name(), " ".join(flags), f"{cores} core{'s' * (cores > 1)}",
             f"{threads} thread{'s' * (threads > 1)}"]  # fmt: skip
    return ", ".join(part for part in parts if part)


def changed_since(measured_by: str | None, command: str) -> bool:
    """Whether what ``command`` executes has changed since the commit that a row names.

    A row that names none, or one that this checkout does not have, counts as changed. Outside a
    checkout nothing can be said, and nothing is changed.
    """
    if _git("rev-parse", "HEAD") is None:
        return False
    if measured_by is None:
        return True
    head, dirty, digest = measured_by.partition("-dirty-")
    if dirty:  # the commit does not hold that code, but its digest tells whether it is this one
        return not code_digest().startswith(digest)
    return _differs(head, code_of(command))


def code_of(command: str) -> tuple[str, ...]:
    """Pathspecs of the code that may move the figures of a command."""
    match = _MODULE.search(command)
    name = match["name"] if match else "quickstart" if command == "make quickstart" else None
    if name is None:
        return DEFAULT
    if match and match["part"] and (ROOT / "eval" / "bench" / name).is_dir():
        name = f"{name}.{match['part']}"  # a module a part
    own = f"eval/bench/{name.replace('.', '/')}.py"
    try:
        module = importlib.import_module(f"compress.eval.bench.{name}")
    except ModuleNotFoundError:
        return (*DEFAULT, own)
    return (*getattr(module, "CODE", DEFAULT), own)


@functools.cache
def _differs(head: str, paths: Sequence[str]) -> bool:
    names = _git("diff", "--name-only", "--no-renames", head, "--", *paths)
    if names is None:
        return True
    for name in names.split():
        old, path = _git("show", f"{head}:{name}"), ROOT / name
        if old is None or not path.is_file():  # new or removed
            return True
        if _meaning(name, old.encode()) != _meaning(name, path.read_bytes()):
            return True
    return False


def _meaning(name: str, content: bytes) -> str:
    """What of a file decides what it does, as text that can be compared."""
    text = content.decode("utf-8", errors="replace")
    try:
        if name.endswith(".py"):
            return ast.dump(_bare(ast.parse(text)))
        if name.endswith(".yaml"):
            data = yaml.safe_load(text)
            if isinstance(data, dict):
                data = {key: data[key] for key in data if key not in _WORDS}
            return repr(data)
    except (SyntaxError, yaml.YAMLError):
        pass  # compared as it stands
    return text


def _bare(tree: ast.Module) -> ast.Module:
    """Without docstrings, and without a benchmark's CODE and what it takes of this module: what
    decides which rows are marked decides none of them."""
    tree.body = [part for part in tree.body if not _marks(part)]
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if not isinstance(body, list):
            continue
        node.body = [
            part for part in body
            if not (isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant)
                    and isinstance(part.value.value, str))
        ]  # fmt: skip
    return tree


def _marks(part: ast.stmt) -> bool:
    if isinstance(part, ast.ImportFrom):
        return part.module == __name__
    return isinstance(part, ast.Assign) and [ast.unparse(t) for t in part.targets] == ["CODE"]


def _git(*arguments: str) -> str | None:
    """What git prints, or None where it fails or is not there."""
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, check=True
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.decode("utf-8", errors="replace")
