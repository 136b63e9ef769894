"""The bars on SST-2, from the rows that the other parts have written."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from compress.eval.bench.options import results
from compress.eval.bench.rows import Row, read_rows
from compress.eval.bench.vib import SST2, command, figure
from compress.eval.bench.vib.outcomes import ACCURACY, LOST, REMOVED, SIZE, TIME, equal_accuracy
from compress.eval.bench.vib.sst2 import LABEL, SHARES, WIDTH_SHARES, label

CODE = SST2
_MODES = ("full", "fast", "faster")
_BASELINES = {"magnitude": WIDTH_SHARES, "width": WIDTH_SHARES, "torch_pruning": SHARES}


def measure(work: Path, arguments: Namespace) -> list[Row]:
    known = {line.figure: line.value for line in read_rows(results(arguments, work, "vib"))}
    first, rows = SHARES[0], []

    def found(part: str, share: float, what: str) -> float | None:
        return known.get(f"{label(part, share)}: {what}")

    sizes = [found(part, share, SIZE) for part in _MODES for share in SHARES]
    if off := [abs(value - 1) for value in sizes if value is not None]:
        rows.append(figure("ratios", f"{LABEL}, most of what was measured: size off the target",
                           100 * max(off), unit="%", bar=0.5))  # fmt: skip
    slow, quick = (found(part, first, TIME) for part in ("full", "faster"))
    least, most = (found(part, first, LOST) for part in ("full", "faster"))
    if None not in (slow, quick, least, most):
        words = f"{LABEL}, -{round(100 * first)} %"
        rows += [
            figure("ratios", f"{words}: time of full / of faster", slow / quick, op=">=", bar=10.0),
            figure("ratios", f"{words}: {ACCURACY} that faster loses against full", most - least,
                   unit="points", bar=2.0),
        ]  # fmt: skip
    dense = known.get(f"{LABEL}, dense: {ACCURACY}")
    curves = {}
    for part, shares in {"full": SHARES, **_BASELINES}.items():
        points = [(found(part, s, REMOVED), found(part, s, ACCURACY)) for s in shares]
        curves[part] = [point for point in points if None not in point]
    compared = [] if dense is None else equal_accuracy(command("ratios"), LABEL, dense, curves)
    return rows + compared
