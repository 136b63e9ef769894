"""What the contracts promise to methods of other kinds than ours, each tried by one in few lines.

Blocks merge into a wider one; learned gates narrow heads, neurons and the residual stream; blocks
are averaged round after round, taught by the original; norms take over what activations spread.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from pydantic import Field
from torch import nn

import compress
from compress.conformance import check
from compress.errors import CompressError
from compress.linear.matrix import matrix, set_matrix
from compress.linear.statistics import RANGES
from compress.methods.base import DEPTH, HEADS, HIDDEN, NEURONS, VALUES, WIDTH, Method
from compress.methods.passes import Learn, Rounds, Sites, Stream, Survey, TrainModel, Whole
from compress.methods.work import GroupWork, OuterWork
from compress.models.anatomy import ATTENTION_OUT, DOWN, QKV, UP, anatomy_of
from compress.models.hidden import narrow_block, narrow_outer
from compress.models.units import narrow_columns, narrow_rows, unit_columns, units_of_rows
from compress.models.widths import set_width_attributes
from compress.train.options import TrainingOptions
from compress.train.reconstruction import learn_outputs
from compress.train.whole import learn_language


class Merge(Method):
    """The first two blocks, side by side in one of twice the width."""

    name: ClassVar[str] = "merge"
    summary: ClassVar[str] = "two blocks side by side"
    source: ClassVar[str] = "the flattening of FlattenGPT, arXiv 2602.08858"
    writes: ClassVar[frozenset[str]] = frozenset({VALUES, DEPTH, WIDTH})
    needs: ClassVar[str] = "nothing"

    def predict(self, outline):
        first, second, *rest = outline.blocks
        wide = first.with_linears(
            {
                n: x.narrowed(*_doubled(first.anatomy, n, (x.out_features, x.in_features)))
                for n, x in first.linears.items()
            }
        )
        return replace(outline, blocks=(wide, *rest))

    def passes(self):
        return (Stream((), False, groups=self.groups, merge=self.merge, most=2),)

    def groups(self, _decision, anatomy):
        return [[0, 1], *([i] for i in range(2, len(anatomy.blocks)))]

    def merge(self, work: GroupWork) -> nn.Module:
        (first, second), anatomy = work.blocks, work.anatomies[0]
        for site in anatomy.sites:
            for name in site.linears:
                weights = [matrix(b.get_submodule(name)) for b in (first, second)]
                dim = 0 if site.kind in (QKV, UP) else 1
                if dim == 0:  # both read what the first block's norm returns
                    norms = [b.get_submodule(site.norm).weight for b in (first, second)]
                    weights[1] = weights[1] * (norms[1] / norms[0])
                set_matrix(first.get_submodule(name), torch.cat(weights, dim))
        set_width_attributes(first, anatomy, {k: 2 * v for k, v in anatomy.widths.items()})
        return first


def _doubled(anatomy, name: str, shape: tuple[int, int]) -> tuple[int, int]:
    (site,) = [s for s in anatomy.sites if name in s.linears]
    return (2 * shape[0], 0) if site.kind in (QKV, UP) else (0, 2 * shape[1])


def _gates(training_steps: int = 2) -> TrainingOptions:
    return TrainingOptions(steps=training_steps, batch=2, learning_rate=0.05)


class Gates(Method):
    """A gate learned for each neuron, head and channel; the lower half of each kind goes."""

    name: ClassVar[str] = "gates"
    summary: ClassVar[str] = "learned gates on all widths"
    source: ClassVar[str] = "the gates of VTrans, arXiv 2406.05276"
    writes: ClassVar[frozenset[str]] = frozenset({VALUES, WIDTH})
    narrows: ClassVar[frozenset[str]] = frozenset({HEADS, NEURONS, HIDDEN})

    training: TrainingOptions = Field(default_factory=_gates, description="of the gates")

    def predict(self, outline):
        half = outline.hidden_size // 2

        def narrow(block):
            a = block.anatomy
            heads = (a.heads // 2 * a.head_dim, a.kv_heads // 2 * a.head_dim)
            rows = {QKV: heads, UP: (a.ffn // 2, a.ffn // 2)}
            columns = {ATTENTION_OUT: heads[0], DOWN: a.ffn // 2}
            return replace(block, other_parameters=block.other_parameters - a.hidden).with_linears(
                {
                    n: block.linears[n].narrowed(
                        rows[s.kind][min(i, 1)] if s.kind in rows else half,
                        half if s.kind in rows else columns[s.kind],
                    )
                    for s in a.sites
                    for i, n in enumerate(s.linears)
                }
            )

        return replace(
            outline.map_blocks(narrow),
            outer_parameters=outline.outer_parameters // 2, hidden_size=half,
            head_weights=outline.head_weights // 2,
        )  # fmt: skip

    def passes(self):
        return (
            TrainModel(
                None, self.learn, self.take, ((self.training, 1.0),), lambda _shapes: 0,
                keep_outer=self.take,
            ),
            Stream((Sites(self.first, self.narrow),), False, outer=self.outside),
        )  # fmt: skip

    def learn(self, work):
        """One scale a site's inputs, by hooks; the gates of a channel are those of all norms."""
        gates, hooks = {}, []
        for block in work.anatomy.blocks:
            for site in block.sites:
                if site.kind in (ATTENTION_OUT, DOWN):
                    module = work.model.get_submodule(f"{block.path}.{site.linears[0]}")
                    gate = nn.Parameter(torch.ones(matrix(module).shape[1]))
                    module.register_parameter("gate", gate)
                    gates[block.index, site.kind] = gate
                    hooks.append(
                        module.register_forward_pre_hook(lambda _m, a, g=gate: (a[0] * g,))
                    )
        learn_language(
            work, list(gates.values()), self.training, None, name="gates",
            prepare=lambda _moment: 0.0,
        )  # fmt: skip
        for hook in hooks:
            hook.remove()
        for index, kind in gates:
            (name,) = work.anatomy.blocks[index].site(kind).linears
            del work.model.get_submodule(f"{work.anatomy.blocks[index].path}.{name}").gate
        embedding = work.model.get_input_embeddings().weight
        channels = _upper_half(embedding.detach().square().sum(0))
        for block in work.anatomy.blocks:
            score = gates[block.index, ATTENTION_OUT].detach().square()
            heads = score[unit_columns(block, ATTENTION_OUT)].sum(1)
            work.model.get_submodule(block.path).kept = {
                HEADS: _upper_half(heads), HIDDEN: channels,
                NEURONS: _upper_half(gates[block.index, DOWN].detach().square()),
            }  # fmt: skip
        work.model.kept = {HIDDEN: channels}

    def take(self, module):
        kept = module.kept
        del module.kept
        return kept

    def first(self, _block, site):
        return site.linears if site.kind == QKV else ()

    def narrow(self, work):
        block, anatomy, kept = work.block, work.anatomy, work.learned
        for kind, units in ((ATTENTION_OUT, kept[HEADS]), (DOWN, kept[NEURONS])):
            for name, owners in units_of_rows(anatomy, kind).items():
                rows = torch.isin(owners, units).nonzero().flatten()
                narrow_rows(block.get_submodule(name), rows)
            columns = unit_columns(anatomy, kind)[units].reshape(-1)
            narrow_columns(block.get_submodule(anatomy.site(kind).linears[0]), columns)
        narrow_block(block, anatomy, kept[HIDDEN])
        widths = {"heads": anatomy.heads // 2, "kv_heads": anatomy.kv_heads // 2}
        set_width_attributes(block, anatomy, {**widths, "ffn": anatomy.ffn // 2})

    def outside(self, work: OuterWork):
        narrow_outer(work.model, work.anatomy, work.learned[HIDDEN])


def _upper_half(score: torch.Tensor) -> torch.Tensor:
    return score.argsort(stable=True)[len(score) // 2 :].sort().values


class Average(Method):
    """Round after round the block with the smallest weights is fused into the one before it, which
    then learns what the original returned there."""

    name: ClassVar[str] = "average"
    summary: ClassVar[str] = "mean of two blocks, round after round"
    source: ClassVar[str] = "the rounds of FuseGPT, arXiv 2411.14507"
    writes: ClassVar[frozenset[str]] = frozenset({VALUES, DEPTH})

    training: TrainingOptions = Field(
        default_factory=lambda: TrainingOptions(steps=2, batch=1, learning_rate=1e-3, clip=None),
        description="of a fused block",
    )

    def predict(self, outline):
        return replace(outline, blocks=outline.blocks[:1])

    def passes(self):
        whole = Whole(self.decide, forwards=lambda _o: 0.0, heads=lambda _o: 0.0)
        learn = Learn(self.learn, self.training, lambda shapes: 16 * sum(a * b for a, b in shapes))
        stream = Stream(
            (learn,), targets="original", groups=self.groups, merge=self.merge, most=2,
            only=lambda decision, _anatomy: [decision - 1], settle=lambda _block: None,
        )  # fmt: skip
        return (Rounds((whole, stream), lambda blocks: blocks - 1),)

    def decide(self, model, anatomy, _batches):
        sizes = [
            sum(float(p.detach().double().square().sum()) for p in block.parameters())
            for block in (model.get_submodule(b.path) for b in anatomy.blocks[1:])
        ]
        return 1 + sizes.index(min(sizes))

    def groups(self, decision, anatomy):
        alone = [[i] for i in range(len(anatomy.blocks)) if i not in (decision - 1, decision)]
        return sorted([*alone, [decision - 1, decision]])

    def merge(self, work: GroupWork) -> nn.Module:
        assert work.inputs is not None and len(work.calls) == 2
        for mine, other in zip(*(b.parameters() for b in work.blocks), strict=True):
            mine.lerp_(other, 0.5)
        work.metrics["fused"] = float(len(work.blocks))
        return work.blocks[0]

    def learn(self, work):
        weights = [work.block.get_submodule(n).weight for n in work.anatomy.linears]
        for weight in weights:
            weight.requires_grad_(True)
        best = learn_outputs(
            work, weights, self.training, prepare=lambda _moment: 0.0, settle=lambda: None
        )
        work.metrics |= best.metrics("fuse")


class Smooth(Method):
    """Scales of channels move from the activations into the weights, which are then rounded."""

    name: ClassVar[str] = "smooth"
    summary: ClassVar[str] = "norms take over the ranges of activations"
    source: ClassVar[str] = "the reparameterisation of RepQuant, arXiv 2402.05628"
    writes: ClassVar[frozenset[str]] = frozenset({VALUES})

    step: float = Field(0.1, description="of the grid of weights; 0 leaves them alone")

    def predict(self, outline):
        return outline

    def passes(self):
        survey = Survey(self.observe, self.decide, self.statistic)
        return survey, Stream((Sites(self.targets, self.solve),), inputs=False)

    def statistic(self, site):
        return RANGES if site.norm else "nothing"

    def targets(self, _block, site):
        return site.linears if site.norm else ()

    def observe(self, survey):
        found = {}
        for site in survey.anatomy.sites:
            if site.norm:
                ranges = survey.statistics[site.linears[0]]
                scale = torch.maximum(ranges.largest, -ranges.least)
                scale = (scale / scale.mean()).sqrt().clamp(0.5, 2)
                found.setdefault(site.norm, scale.tolist())  # one norm may serve two sites
        return found

    def decide(self, notes, _anatomy):
        return notes

    def solve(self, work):
        scale = torch.tensor(work.decision[work.anatomy.index][work.site.norm])
        sites = [s for s in work.anatomy.sites if s.norm == work.site.norm]
        if work.site is sites[0]:
            norm = work.block.get_submodule(work.site.norm)
            for parameter in norm.parameters():
                parameter.div_(scale)
        for name in work.names:
            weight = work.weight(name)
            weight.mul_(scale)
            if self.step:
                weight.copy_(((weight / self.step).floor() + 0.5) * self.step)


def test_blocks_merge_into_wider_ones():
    check(Merge, families=("llama", "mistral"))


def test_gates_narrow_everything():
    check(Gates, families=("llama", "qwen3"))


def test_a_stream_that_cannot_be_narrower_is_refused(tiny, tokens):
    """Gemma scales its embeddings by the width that the config states."""
    with pytest.raises(CompressError, match="residual stream"):
        compress.apply(tiny("gemma2"), [Gates()], tokens)


def test_blocks_are_averaged_round_after_round():
    check(Average, families=("llama", "bert", "gpt2"))


def test_norms_take_over_ranges():
    check(Smooth, {"step": 0.1}, ("llama", "gpt2"), idle={"step": 0.0}, tolerance=1e-5)


def test_what_blocks_stand_for_is_known_across_steps(tiny, tokens):
    """The teacher of a later step is the original, behind the last block that was fused."""
    model = tiny("llama")
    expected = [(0, 3)]
    seen = []

    class Looks(Average):
        name: ClassVar[str] = "looks"
        writes: ClassVar[frozenset[str]] = frozenset({VALUES})

        def predict(self, outline):
            return outline

        def passes(self):
            take = lambda _module: {}  # noqa: E731
            return (
                TrainModel(None, self.see, take, (), lambda _shapes: 0, teacher=True),
                Stream((), False, settle=lambda _block: None),
            )

        def see(self, work):
            seen.append((work.origins, len(anatomy_of(work.teacher()).blocks)))

    compress.apply(model, [Average(), Looks()], tokens)
    assert seen == [(expected, 3)]


def test_a_failure_after_the_outer_tensors_changed_is_undone(tiny):
    model = tiny("llama").to(torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    class Fails(Merge):
        name: ClassVar[str] = "fails"

        def passes(self):
            return (Stream((Sites(lambda _b, s: s.linears, self.fail),), False, outer=self.zero),)

        def zero(self, work):
            work.model.get_input_embeddings().weight.zero_()

        def fail(self, work):
            raise CompressError("luck", "none")

    with pytest.raises(CompressError, match="luck"):
        compress.apply(model, [Fails()], atomic=True)
    after = model.state_dict()
    assert all(torch.equal(after[n], t) and after[n].dtype == t.dtype for n, t in before.items())


def test_what_changed_outside_the_blocks_of_a_16_bit_model_stays(tiny):
    model = tiny("llama").to(torch.bfloat16)

    class Doubles(Merge):
        name: ClassVar[str] = "doubles"

        def passes(self):
            return (Stream((), False, outer=lambda w: w.model.lm_head.weight.mul_(2)),)

    head = model.lm_head.weight.clone()
    compress.apply(model, [Doubles()])
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert torch.equal(model.lm_head.weight, 2 * head)


@pytest.mark.parametrize(
    "groups",
    [[[0, 1], [1, 2]], [[0, 2]], [[1], [0]], [[0, 1, 2]], [], [[0], []], [[0], [7]]],
    ids=str,
)
def test_groups_that_are_none_are_refused(groups, tiny):
    class Wrong(Merge):
        name: ClassVar[str] = "wrong"

        def groups(self, _decision: Any, _anatomy: Any) -> list[list[int]]:
            return groups

    model = tiny("llama")
    with pytest.raises(CompressError, match="blocks"):
        compress.apply(model, [Wrong()])
    assert len(anatomy_of(model).blocks) == 3
