"""The one error type that users see."""

from __future__ import annotations

_LISTED = 100  # names that a message may list


class CompressError(Exception):
    """A mistake in the input or a limit of the machine, told so that it can be mended.

    Every message answers three questions: what was expected, what came instead, and what to do.
    Code deep in the toolkit raises it with the facts it has; callers that know more (the step, the
    block, the file) wrap it once with :meth:`within`.

    Args:
        expected: what the toolkit needed, as a clause ("a sparsity between 0 and 1").
        got: what it found instead ("1.5").
        fix: what the user can do about it, as a sentence.
    """

    def __init__(self, expected: str, got: str = "", fix: str = "", *, where: str = "") -> None:
        self.expected = expected.rstrip(".")
        self.got = got.rstrip(".")
        self.fix = fix.rstrip(".")
        self.where = where
        super().__init__(str(self))

    def within(self, where: str) -> CompressError:
        """Return the same error with an outer place put before the one it names."""
        place = f"{where}, {self.where}" if self.where else where
        return type(self)(self.expected, self.got, self.fix, where=place)

    def __str__(self) -> str:
        head = f"{self.where}: " if self.where else ""
        parts = [f"{head}expected {self.expected}"]
        if self.got:
            parts[0] += f", got {self.got}"
        if self.fix:
            parts.append(self.fix)
        return ". ".join(parts) + "."


def did_you_mean(name: str, known: list[str]) -> str:
    """Return "Did you mean 'x'?" for the closest names, or all names where none is close; of more
    than a screen can show, the three nearest."""
    import difflib

    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return "Did you mean " + " or ".join(repr(c) for c in close) + "?"
    if len(known) > _LISTED:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.0)
        return f"The nearest of {len(known):,}: " + ", ".join(repr(c) for c in near)
    return "Known: " + ", ".join(sorted(known))
