"""Methods of a package that the project knows nothing of, and what the check says of bad ones."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from pydantic import ConfigDict, Field

import compress
from compress.conformance import check
from compress.errors import CompressError
from compress.methods.base import LinearMethod
from compress.methods.catalog import METHODS

PACKAGE = '''
"""Four methods, one of each kind."""

from typing import Any, ClassVar

import torch
from pydantic import Field

from compress.methods.depth.base import SurveyDepthMethod
from compress.methods.factorize.base import FactorizeMethod
from compress.methods.sparsity.base import SparsityMethod
from compress.methods.width.base import WidthMethod
from compress.models.anatomy import DOWN


class Dice(SparsityMethod):
    """Zero weights that a seed chooses."""

    name: ClassVar[str] = "dice"
    summary: ClassVar[str] = "zero weights at random"
    source: ClassVar[str] = "the baseline of every paper"
    needs: ClassVar[str] = "nothing"

    seed: int = Field(0, description="Seed of the choice.")

    def solve(self, work):
        generator = torch.Generator().manual_seed(self.seed + work.anatomy.index)
        for names, _ in work.groups():
            for name in names:
                score = torch.rand(work.weight(name).shape, generator=generator)
                self.apply_mask(work, name, self.mask(score))


class Axes(FactorizeMethod):
    """Keep the outputs with the largest weights: factors whose second one holds zeros and ones."""

    name: ClassVar[str] = "axes"
    summary: ClassVar[str] = "low-rank factors along the axes of the outputs"
    source: ClassVar[str] = "nobody"
    needs: ClassVar[str] = "nothing"

    def directions(self, weight, rank, statistics, label):
        energy = weight.double().square().sum(1)
        kept = energy.argsort(descending=True, stable=True)[:rank]
        basis = torch.eye(len(weight), dtype=torch.float64)[:, kept]
        return basis, float(1 - energy[kept].sum() / energy.sum())


class Light(SurveyDepthMethod):
    """Remove the blocks whose weights have the least energy."""

    name: ClassVar[str] = "light"
    summary: ClassVar[str] = "remove the blocks with the smallest weights"
    source: ClassVar[str] = "nobody"

    def observe(self, survey):
        return sum(float(p.detach().double().square().sum()) for p in survey.block.parameters())

    def decide(self, notes, anatomy):
        ascending = sorted(self.candidates(len(notes), anatomy.family), key=notes.__getitem__)
        return {"removed": sorted(ascending[: self.count(len(notes))])}


class Thin(WidthMethod):
    """Remove FFN neurons with small weights and refit nothing."""

    name: ClassVar[str] = "thin"
    summary: ClassVar[str] = "remove FFN neurons with small weights"
    source: ClassVar[str] = "nobody"
    kind: ClassVar[str] = DOWN
    unit: ClassVar[str] = "neurons"

    importance: str = Field("magnitude", description="Measure of a neuron.")
    correction: bool = Field(False, description="Refit of the down projection.")
'''
METHODS_OF_IT = {"dice": "Dice", "axes": "Axes", "light": "Light", "thin": "Thin"}
ENTRIES = "\n".join(f"{name} = four_kinds:{cls}" for name, cls in METHODS_OF_IT.items())
# method -> options, options with nothing to do, families
TRIED: dict[str, tuple[dict[str, Any], dict[str, Any] | None, tuple[str, ...]]] = {
    "dice": ({"sparsity": 0.5}, {"sparsity": 0.0}, ("llama", "gpt2")),
    "axes": ({"rank": 8}, None, ("llama",)),
    "light": ({"remove": 1}, {"remove": 0}, ("bert",)),
    "thin": ({"share": 0.25}, {"share": 0.0}, ("llama",)),
}


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """What pip leaves of a package: its module and what it declares."""
    site = tmp_path_factory.mktemp("site")
    (site / "four_kinds.py").write_text(PACKAGE)
    info = site / "four_kinds-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: four-kinds\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text(f"[compress.methods]\n{ENTRIES}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(site))
        yield site
    sys.modules.pop("four_kinds", None)


def test_they_are_listed_with_the_others(installed):
    listed = compress.list_methods()
    assert listed["dice"] == "zero weights at random"
    assert {METHODS.origin(name) for name in METHODS_OF_IT} == {"the package four-kinds 0.1"}


@pytest.mark.parametrize("name", METHODS_OF_IT)
def test_a_method_of_each_kind_passes(name, installed):
    options, idle, families = TRIED[name]
    check(METHODS.get(name), options, families, idle=idle)


def test_they_work_with_methods_of_ours(installed, tiny, tokens):
    steps = [{"method": "light", "remove": 1}, {"method": "dice", "pattern": "2:4"},
             {"method": "rtn", "bits": 4, "group_size": 16}]  # fmt: skip
    assert len(compress.apply(tiny("llama"), steps, tokens).model.layers) == 2
    with pytest.raises(CompressError, match="Put axes before dice"):
        compress.apply(tiny("llama"), ["dice", {"method": "axes", "rank": 8}], tokens)


# methods that break a promise --------------------------------------------------------------------


class Halve(LinearMethod):
    """A method that keeps its promises; those below break one each."""

    name: ClassVar[str] = "halve"
    summary: ClassVar[str] = "divide all weights"
    source: ClassVar[str] = "nobody"
    writes: ClassVar[frozenset[str]] = frozenset({"values"})
    needs: ClassVar[str] = "nothing"

    by: float = Field(2.0, gt=0, description="Divisor.")

    def predict(self, outline):
        return outline

    def solve(self, work):
        for name in work.names:
            work.weight(name).div_(self.by)


class Undocumented(Halve):
    by: float = 2.0


class Lenient(Halve):
    model_config = ConfigDict(extra="ignore")


class Lossy(Halve):
    factors: Any = Field((2.0,), description="Divisors.")  # a list after a recipe was read


class Secretive(Halve):
    def solve(self, work):
        for name in work.names:
            work.weight(name)[:, ::2] = 0


class Boastful(Halve):
    writes: ClassVar[frozenset[str]] = frozenset({"values", "zeros"})


class Optimist(Halve):
    def predict(self, outline):
        return outline.map_blocks(lambda block: block.with_linears({
            name: type(linear)(linear.out_features, linear.in_features, linear.bias, 8.0)
            for name, linear in block.linears.items()
        }))  # fmt: skip


class Counting(Halve):
    calls: ClassVar[Any] = itertools.count(2)

    def solve(self, work):
        for name in work.names:
            work.weight(name).div_(1 + next(self.calls) / 7)


class Remembering(Halve):
    """What it does to a block depends on how many it has seen since the first one."""

    seen: ClassVar[list[int]] = []

    def solve(self, work):
        if work.anatomy.index == 0:
            self.seen.clear()
        self.seen.append(work.anatomy.index)
        for name in work.names:
            work.weight(name).div_(1.0 + len(self.seen) / 7)


class Restless(Halve):
    def solve(self, work):
        for name in work.names:
            work.weight(name).add_(0.1)


class Failing(Halve):
    def solve(self, work):
        raise ZeroDivisionError("by nothing")


@pytest.mark.parametrize(
    ("cls", "words"),
    [
        (Undocumented, "a description of the option by"),
        (Lenient, "unknown options to be refused"),
        (Lossy, "after a recipe has been written"),
        (Secretive, "changed values, zeros|changed zeros"),
        (Boastful, "a change of values, zeros"),
        (Optimist, "bytes, as `predict` says"),
        (Counting, "keep no state"),
        (Remembering, "the same bytes from a run that was interrupted"),
        (Restless, "with nothing to do it does nothing"),
        (int, "a class derived from"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_broken_promise_is_told(cls, words):
    """And the check leaves the generators alone."""
    options = {"factors": (1.0,)} if cls is Lossy else {}
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    with pytest.raises(CompressError, match=words):
        check(cls, options, ("llama",), idle={"by": 1.0})
    assert torch.equal(torch.random.get_rng_state(), before)


def test_options_with_which_nothing_happens_are_told():
    with pytest.raises(CompressError, match="halve on bert, it changes what the model computes"):
        check(Halve, {"by": 1.0}, ("bert",))
    with pytest.raises(CompressError, match="valid options"):
        check(Halve, {"by": -1.0})
    with pytest.raises(CompressError, match="valid options"):
        check(Halve, idle={"bye": 1.0})
    with pytest.raises(CompressError, match="Did you mean 'llama'"):
        check(Halve, {}, ("lama",))


def test_an_error_of_the_method_says_where_it_happened():
    with pytest.raises(ZeroDivisionError) as caught:
        check(Failing, {}, ("llama",))
    assert any("halve on llama" in note for note in caught.value.__notes__)
