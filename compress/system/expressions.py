"""Regular expressions of a recipe, searched in names without the risk of never ending.

Python's engine tries alternatives one after the other: ``(a+)+!`` on thirty letters takes longer
than a life, and nothing in the process can stop it. So expressions in which that can happen are
searched by a process of their own, which can be ended.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence

from compress.errors import CompressError

_SECONDS = 10.0  # names of a whole model take milliseconds
_LONGEST = 1000  # characters of an expression
_SEARCH = """
import json, re, sys
pattern, names = json.load(sys.stdin)
json.dump([bool(re.search(pattern, name)) for name in names], sys.stdout)
"""

_found: dict[tuple[str, str], bool] = {}


def check_expression(pattern: str) -> None:
    """Refuse what is no regular expression.

    Raises:
        ValueError: saying why.
    """
    if len(pattern) > _LONGEST:
        raise ValueError(f"a regular expression of {len(pattern)} characters, over {_LONGEST}")
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"no regular expression: {pattern[:60]!r} ({error})") from None


def search(pattern: str, names: Sequence[str]) -> list[bool]:
    """Whether ``re.search`` finds the expression in each name; remembered.

    Raises:
        CompressError: an expression that does not end.
    """
    new = [name for name in dict.fromkeys(names) if (pattern, name) not in _found]
    if new:
        answers = _guarded(pattern, new) if _may_explode(pattern) else _direct(pattern, new)
        _found.update(zip([(pattern, name) for name in new], answers, strict=True))
    return [_found[pattern, name] for name in names]


def _may_explode(pattern: str) -> bool:
    """Whether there is more than one place to try again: with one, the work is the square of the
    length of a name."""
    return sum(pattern.count(c) for c in "*+?{|") > 1


def _direct(pattern: str, names: list[str]) -> list[bool]:
    return [bool(re.search(pattern, name)) for name in names]


def _guarded(pattern: str, names: list[str]) -> list[bool]:
    command = [sys.executable, "-I", "-S", "-c", _SEARCH]
    try:
        done = subprocess.run(
            command, input=json.dumps([pattern, names]), capture_output=True, text=True,
            timeout=_SECONDS, check=True,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise CompressError(
            f"a regular expression that is searched in {len(names)} names within {_SECONDS:.0f} s",
            f"'re:{pattern}', which was not",
            "Repetitions inside repetitions explode: write it without, or give the names with *",
        ) from None
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or ["no further detail"])[-1]
        raise CompressError("a regular expression that can be searched", last) from None
    return json.loads(done.stdout)
