"""Which code an entry of the cache belongs to, and what is not kept."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
from pydantic import BaseModel

from compress.eval import cache
from compress.eval.cache import Figures, code_digest


class Figure(BaseModel):
    value: float
    rows: tuple[float, ...] = ()


@pytest.fixture
def figures(tmp_path) -> Figures:
    return Figures("checkpoint", tmp_path)


@pytest.mark.parametrize(
    ("file", "decides"),
    [
        ("quality/perplexity.py", True), ("parts.py", True), ("tasks/piqa.yaml", True),
        ("bench/rows.py", False), ("report/html.py", False),
    ],
)  # fmt: skip
def test_code_that_decides_a_figure_is_part_of_its_key(file, decides, tmp_path, monkeypatch):
    copy = tmp_path / Path(cache.__file__).parent.name
    shutil.copytree(Path(cache.__file__).parent, copy)
    monkeypatch.setattr(cache, "__file__", str(copy / "cache.py"))
    assert code_digest.__wrapped__() == code_digest()
    with (copy / file).open("a") as edited:
        edited.write("\n# another line\n")
    assert (code_digest.__wrapped__() != code_digest()) == decides


def test_figures_come_back_to_the_bit(figures):
    result = Figure(value=math.pi / 3, rows=(0.1 + 0.2, 5e-324, 1.7976931348623157e308))
    figures.keep("part", {"window": 1}, result, 0.1)
    assert figures.recall("part", {"window": 1}, Figure).result == result
    assert figures.recall("part", {"window": 2}, Figure) is None
    assert figures.recall("other", {"window": 1}, Figure) is None
    assert Figures("another", figures.cache).recall("part", {"window": 1}, Figure) is None
    imported = Figures("checkpoint", figures.cache, ["sha256 of a file"])
    assert imported.recall("part", {"window": 1}, Figure) is None


@pytest.mark.parametrize(
    "result", [Figure(value=math.nan), Figure(value=0.0, rows=(0.5,) * 400_000)], ids=["nan", "big"]
)
def test_what_is_not_kept(figures, result):
    figures.keep("part", {}, result, 0.1)
    assert figures.recall("part", {}, Figure) is None and not list(figures.cache.rglob("*.json"))


def test_the_folder_stays_small(figures, monkeypatch):
    monkeypatch.setattr(cache, "MOST_BYTES", 4000)
    for window in range(20):
        figures.keep("part", {"window": window}, Figure(value=1.0), 0.1)
    assert sum(path.stat().st_size for path in figures.folder.iterdir()) <= 4000
    assert figures.recall("part", {"window": 19}, Figure) is not None
