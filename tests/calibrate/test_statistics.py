"""Ranges of a site's inputs: right, in the memory that was planned, refused where unknown."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import compress
from compress.conformance.tiny import TinyFamily
from compress.linear import gram
from compress.linear.mkl import add_product, sums_bfloat16
from compress.linear.statistics import (
    GRAM,
    MAGNITUDES,
    MOMENTS,
    NOTHING,
    RANGES,
    InputStatistics,
    statistics_bytes,
)
from compress.methods.passes import Survey
from compress.models.anatomy import ATTENTION_OUT, anatomy_of


@pytest.fixture
def seen(register_observer) -> SimpleNamespace:
    """What a method "observe" is told: ``solved`` of each linear, ``surveyed`` of each block."""
    seen = SimpleNamespace(solved={}, surveyed=[])

    def see(work) -> None:
        for name in work.names:
            told = work.statistics[name]
            seen.solved[work.anatomy.index, name] = told.least, told.largest, told.span

    survey = Survey(
        lambda survey: {name: s.largest.tolist() for name, s in survey.statistics.items()},
        lambda notes, _anatomy: seen.surveyed.extend(notes),
        lambda site: RANGES if site.kind == ATTENTION_OUT else NOTHING,
    )
    register_observer(survey, RANGES, see)
    return seen


def plain_inputs(model, batches) -> dict[tuple[int, str], torch.Tensor]:
    """Inputs [tokens, width] of every linear in ordinary forwards, without padding."""
    found: dict[tuple[int, str], list[torch.Tensor]] = {}
    real = None

    def hook(key):
        return lambda _module, args: found.setdefault(key, []).append(args[0][real])

    for block in anatomy_of(model).blocks:
        for name in block.linears:
            module = model.get_submodule(f"{block.path}.{name}")
            module.register_forward_pre_hook(hook((block.index, name)))
    with torch.no_grad():
        for batch in batches:
            ids = batch["input_ids"]
            real = batch.get("attention_mask", torch.ones_like(ids)) != 0
            model(**{k: v for k, v in batch.items() if k != "labels"})
    return {key: torch.cat(values) for key, values in found.items()}


def check(
    seen: SimpleNamespace, expected: dict[tuple[int, str], torch.Tensor], compute: str
) -> None:
    exact = compute == "float32"
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if exact else {"rtol": 0.05, "atol": 0.05}
    assert seen.solved.keys() == expected.keys()
    for key, inputs in expected.items():
        least, largest, span = seen.solved[key]
        torch.testing.assert_close(least, inputs.amin(0), **tolerance)
        torch.testing.assert_close(largest, inputs.amax(0), **tolerance)
        assert span == (float(least.min()), float(largest.max()))
        if not exact:
            assert torch.equal(largest, largest.bfloat16().float())  # what the product has read
    for index, note in enumerate(seen.surveyed):
        ((name, values),) = note.items()
        torch.testing.assert_close(torch.tensor(values), seen.solved[index, name][1])


@pytest.fixture(scope="module", params=["llama", "bert"])
def family(request, tmp_path_factory):
    return TinyFamily(request.param, tmp_path_factory.mktemp("ranges") / request.param)


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("how", ["streamed", "live"])
def test_ranges_are_those_of_a_plain_forward(how, compute, family, seen, tmp_path):
    steps = [{"method": "observe"}]
    if how == "streamed":
        compress.run({**family.recipe(steps), "compute": compute}, tmp_path / "run")
    else:
        compress.apply(family.model(), steps, family.batches, compute=compute)
    check(seen, plain_inputs(family.model(), family.batches), compute)


def test_padding_has_no_range(tiny, tokens, seen):
    ids = torch.zeros(2, 40, dtype=torch.long)
    ids[0, :24], ids[1, :9] = tokens[0], tokens[1, :9]
    mask = torch.zeros_like(ids)
    mask[0, :24], mask[1, :9] = 1, 1
    batches = [{"input_ids": ids, "attention_mask": mask}]
    compress.apply(tiny("llama"), [{"method": "observe"}], batches, compute="float32")
    check(seen, plain_inputs(tiny("llama"), batches), "float32")


def test_layers_whose_inner_ranges_nobody_knows_are_refused_by_the_plan(family, seen):
    steps = [{"method": "svd", "ratio": 0.5}, {"method": "observe"}]
    with pytest.raises(compress.CompressError, match=r"ranges.*low_rank"):
        compress.plan(family.recipe(steps))
    for kind in (RANGES, MAGNITUDES):
        with pytest.raises(compress.CompressError, match=f"{kind}.*sums of features"):
            InputStatistics(4, kind).through(torch.eye(4))


def test_statistics_say_what_they_were_collected_without():
    x = torch.randn(7, 4, generator=torch.Generator().manual_seed(0))
    found = {kind: InputStatistics(4, kind) for kind in (MOMENTS, MAGNITUDES, GRAM, RANGES)}
    for statistics in found.values():
        statistics.update(x[:3].bfloat16())
        statistics.update(x[3:].bfloat16()[None])
        statistics.update(x[:0])
        statistics.keep(torch.tensor([3, 1]))
    kept = x.bfloat16().float()[:, [3, 1]]
    assert torch.equal(found[RANGES].least, kept.amin(0))
    assert torch.equal(found[RANGES].largest, kept.amax(0))
    torch.testing.assert_close(found[MOMENTS].norm, kept.square().mean(0).sqrt())
    torch.testing.assert_close(found[GRAM].norm, found[MOMENTS].norm)
    torch.testing.assert_close(found[MAGNITUDES].mean_absolute, kept.abs().mean(0))
    for kind, missing in ((RANGES, "norm"), (RANGES, "gram"), (MOMENTS, "least"),
                          (MOMENTS, "gram"), (MOMENTS, "mean_absolute"), (MAGNITUDES, "norm"),
                          (GRAM, "mean_absolute"), (GRAM, "span")):  # fmt: skip
        with pytest.raises(ValueError, match="collected without"):
            getattr(found[kind], missing)
    with pytest.raises(ValueError, match="'range'"):
        InputStatistics(4, "range")


def test_moments_of_parts_can_be_derived():
    """Where a site has layers, the Gram matrix stands for the moments and for those of parts."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(9, 4, generator=generator), torch.randn(3, 4, generator=generator)
    statistics = InputStatistics(4, MOMENTS, derivable=True)
    statistics.update(x)
    torch.testing.assert_close(statistics.norm, x.square().mean(0).sqrt())
    torch.testing.assert_close(
        statistics.through(weight).norm, (x @ weight.t()).square().mean(0).sqrt()
    )


@pytest.mark.parametrize("derivable", [False, True])
@pytest.mark.parametrize("kind", [MOMENTS, MAGNITUDES, GRAM, RANGES])
def test_bytes_are_those_held(kind, derivable):
    statistics = InputStatistics(64, kind, derivable=derivable)
    held = [v for v in vars(statistics).values() if isinstance(v, torch.Tensor)]
    held = sum(v.nbytes for v in held)
    # The mean squares are on the Gram matrix's diagonal.
    assert statistics_bytes(kind, 64, derivable) == held


@pytest.mark.parametrize("library", ["MKL", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [100, 200, 800])
def test_a_gram_matrix_is_summed_in_float32(width, dtype, library, monkeypatch):
    """Whatever multiplies it: of bfloat16 inputs, too, beside which 16 bits would show."""
    if library == "torch":
        monkeypatch.setattr(gram, "sums_bfloat16", lambda: False)
    elif not sums_bfloat16():
        pytest.skip("this build of torch holds no such product")
    torch.manual_seed(0)
    x = torch.randn(2, 300, width).to(dtype)
    statistics = InputStatistics(width, GRAM)
    before = torch.get_float32_matmul_precision()
    for part in x:
        statistics.update(part)
    rows = x.double().flatten(0, 1)
    torch.testing.assert_close(statistics.gram.double(), rows.t() @ rows, rtol=1e-5, atol=1e-3)
    assert torch.get_float32_matmul_precision() == before
    kept = torch.arange(0, width, 3)
    statistics.keep(kept)
    statistics.update(x[0][:, kept])
    more = torch.cat((rows, rows[:300]))[:, kept]
    torch.testing.assert_close(statistics.gram.double(), more.t() @ more, rtol=1e-5, atol=1e-3)


@pytest.mark.skipif(not sums_bfloat16(), reason="this build of torch holds no such product")
def test_products_are_added_to_parts_of_matrices():
    """Of any shape; what is no such matrix is refused before memory is touched."""
    left, right = (torch.randn(40, width).bfloat16() for width in (7, 12))
    total = torch.ones(9, 20)
    add_product(total[1:6, 3:12], left[:, 2:], right[:, :9])
    whole = torch.zeros(9, 20)
    whole[1:6, 3:12] = left[:, 2:].float().t() @ right[:, :9].float()
    torch.testing.assert_close(total, 1 + whole)
    add_product(total[:7, :12], left[:0], right[:0])
    torch.testing.assert_close(total, 1 + whole)
    part = total[:7, :12]
    wrong = ((total, left, right), (part, left.float(), right), (part.double(), left, right),
             (part, left.t(), right))  # fmt: skip
    for matrices in wrong:
        with pytest.raises(ValueError):
            add_product(*matrices)
