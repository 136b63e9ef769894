"""VTrans: gates with noise learn which channels, heads, neurons and sub-layers a model needs."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import nn

from compress.errors import CompressError
from compress.methods.base import HEADS, HIDDEN, MODULES, NEURONS, VALUES, WIDTH
from compress.methods.passes import Pass, Shapes, Sites, Stream, TrainModel
from compress.methods.width.vib.checking import check_model
from compress.methods.width.vib.choosing import Chooser
from compress.methods.width.vib.options import VIBOptions
from compress.methods.width.vib.predicting import thinned
from compress.methods.width.vib.pruning import narrow, narrow_outside
from compress.methods.width.vib.sizes import Sizes, sizes_of
from compress.methods.width.vib.training import learn_gates, learn_weights, target_of
from compress.methods.work import OuterWork, SiteWork
from compress.models.anatomy import Anatomy, BlockAnatomy, Site, anatomy_of
from compress.models.outline import Outline
from compress.train.whole import ModelWork

_NOISY = 1.5  # noise of each token and what it multiplies, beside what the model stores
_WEIGHT = "weight:"  # in front of the name of a parameter that has learned


class VIB(VIBOptions):
    """Learn what may go from the model's own loss, then take it out.

    Every unit's output is multiplied by a gate z = mu + sigma * noise (:mod:`.gates`); a price on
    the information that passes and a constraint on the expected size drive the gates of units that
    the loss does not need to nothing but noise. What stays is decided by one threshold on
    sigma^2 / mu^2 over all units of all kinds, moved from 1 until the size is the one asked for;
    mu is folded into the weights, and the model that is left computes what the gated one did.

    The paper's text and tables could not be read. From its abstract: the kinds of units, one mask
    of channels for all layers, the three modes, 3 % of the data, a target in parameters or FLOPs.
    From the code of the authors' later TVA-Prune: gates and their beginning, noise for each token,
    KL, the constraint and how it climbs, the order of magnitude of rates. Not stated in what could
    be read, and decided here:

    - scalar gates of sub-layers multiply what a sub-layer adds to the stream, bias included (as in
      CoFi), and a sub-layer without any unit left is gone;
    - a unit's KL weighs as much as the unit (TVA-Prune: 256 for a head, 1 for a neuron, 30 for the
      embedding), and sizes count exactly: biases, norms, embeddings where ``of`` says so;
    - gates start at the optimum that the curvature of the loss predicts (:mod:`.importance`);
      ``start: fresh`` is TVA-Prune's start, which needs some thousand steps;
    - the final threshold meets the size exactly, rather than the best of several near it;
    - means go on learning once everything else is gone (``tuning``);
    - what stays can be fitted in closed form to what the whole model computed (``correction``,
      :mod:`.correcting`), before weights learn;
    - hidden states are compared channel by channel, without CoFi's learned projection; by default
      only predictions are compared.
    """

    name: ClassVar[str] = "vib"
    summary: ClassVar[str] = "learn by noisy gates which channels, heads, neurons and layers go"
    source: ClassVar[str] = (
        "Dutta, Gupta, Agarwal 2024, VTrans, arXiv 2406.05276; gates: Dai et al. 2018, "
        "arXiv 1802.10399"
    )
    writes: ClassVar[frozenset[str]] = frozenset({VALUES, WIDTH, MODULES})
    narrows: ClassVar[frozenset[str]] = frozenset({HEADS, NEURONS, HIDDEN})
    example: ClassVar[dict[str, Any]] = {"share": 0.2}
    approximate: ClassVar[float] = 0.01

    def check(self, anatomy: Anatomy, outline: Outline) -> None:
        check_model(self, anatomy, outline)
        sizes = self._sizes(outline)
        plain = self._chooser(sizes, anatomy)
        target = target_of(self, sizes)
        if target > sizes.whole():
            raise CompressError(
                f"a size below the {sizes.whole():,.0f} that the model has",
                f"{target:,.0f}",
                "Lower size",
            )
        least = plain.smallest()
        if target < least:
            raise CompressError(
                f"a size of at least {least:,.0f}, one unit or step of each kind a block",
                f"{target:,.0f}", "Remove less, or take more kinds into units",
            )  # fmt: skip

    def predict(self, outline: Outline) -> Outline:
        sizes = self._sizes(outline)
        anatomies = [block.anatomy for block in outline.blocks]
        plain = self._chooser(sizes, anatomies[0])
        after = thinned(outline, sizes, target_of(self, sizes), plain)
        note = (
            f"{self.name}: what goes is decided while it runs; the plan thins out all kinds alike"
        )
        return replace(after, notes=(*after.notes, note))

    def _sizes(self, outline: Outline) -> Sizes:
        return sizes_of(outline, self.of, outline.value_bits / 8)

    def _chooser(self, sizes: Sizes, anatomy: Anatomy | BlockAnatomy) -> Chooser:
        block = anatomy.blocks[0] if isinstance(anatomy, Anatomy) else anatomy
        scores = {
            kind: [torch.zeros(int(n), dtype=torch.float64) for n in sizes.full[kind]]
            for kind in self.kinds
        }
        queries = block.heads // max(1, block.kv_heads)
        return Chooser(scores, sizes, math.inf, self.multiples, self.uniform, queries)

    def passes(self) -> tuple[Pass, ...]:
        # A model that is its own teacher runs forwards once more; another one likewise.
        share = 1 if self.distillation is None else 4 / 3
        outer, taught = self.narrows_outer, self.distillation is not None
        found: tuple[Pass, ...] = (
            TrainModel(
                None, self.learn, self.keep, tuple((o, share) for o in self.gated),
                self._gated_bytes, keep_outer=self.keep_outer if outer else None,
                teacher=self.trains_weights and taught, outputs=self._output_bytes,
                graph=_NOISY if self.training else 1.0, by_batch=self.start == "importance",
                stepped=self._tuned_bytes if self.trains_weights else _nothing,
            ),
            Stream(
                (Sites(self._first, self.narrow),), inputs=False,
                outer=self.change_outer if outer else None,
            ),
        )  # fmt: skip
        if self.fine_tune is None:
            return found
        return (
            *found,
            TrainModel(
                None, self.learn_weights, self.keep_weights, ((self.fine_tune, share),),
                self._tuned_bytes, keep_outer=self.keep_outer_weights, teacher=taught,
            ),
            Stream(
                (Sites(self._first, self.take_weights),), inputs=False,
                outer=self.take_outer_weights,
            ),
        )  # fmt: skip

    def learn(self, work: ModelWork) -> None:
        learn_gates(work, self)

    def keep(self, block: nn.Module) -> dict[str, torch.Tensor]:
        """What was decided of a block, and its weights if they learned beside the gates."""
        learned = vars(block).pop("vib_learned")
        return learned | (_weights(block) if self.changes_weights else {})

    def keep_outer(self, model: nn.Module) -> dict[str, torch.Tensor]:
        learned = vars(model).pop("vib_learned")
        return learned | (_outer_weights(model) if self.trains_weights else {})

    def _first(self, anatomy: BlockAnatomy, site: Site) -> tuple[str, ...]:
        return site.linears if site is anatomy.sites[0] else ()

    def narrow(self, work: SiteWork) -> None:
        """Narrow the whole block, at its first site."""
        _restore(work.block, work.learned)
        work.metrics |= narrow(work.block, work.anatomy, work.learned)

    def change_outer(self, work: OuterWork) -> None:
        _restore(work.model, work.learned)
        if HIDDEN in self.units:
            narrow_outside(work.model, work.anatomy, work.learned)

    def learn_weights(self, work: ModelWork) -> None:
        learn_weights(work, self)

    def keep_weights(self, block: nn.Module) -> dict[str, torch.Tensor]:
        return _weights(block)

    def keep_outer_weights(self, model: nn.Module) -> dict[str, torch.Tensor]:
        return _outer_weights(model)

    def take_weights(self, work: SiteWork) -> None:
        """Put what has learned into a block, at its first site."""
        _restore(work.block, work.learned)

    def take_outer_weights(self, work: OuterWork) -> None:
        _restore(work.model, work.learned)

    def told(self, notes: list[Any]) -> tuple[str, ...]:
        said = [note["told"] for note in notes if isinstance(note, dict) and "told" in note]
        return tuple(sentence for sentences in said for sentence in sentences)

    def _gated_bytes(self, shapes: Shapes) -> int:
        # Values and gradients of all gates are thousands; of weights there are three more copies.
        units = sum(max(shape) for shape in shapes)
        learning = self._tuned_bytes(shapes) if self.trains_weights else 0
        # Gram matrices in float64 and copies that solvers make of them.
        fits = 32 * max(width for _, width in shapes) ** 2 if self.correction else 0
        copies = 4 * sum(out * width for out, width in shapes) if self.remembers else 0
        return 40 * units + max(learning, fits + copies)

    def _output_bytes(self, outline: Outline, batches: int, tokens: int) -> int:
        """What all linears of a block have returned for the batches that they are fitted on, and
        what has entered and left the block."""
        if not self.correction:
            return 0
        seen = min(self.correction_batches, math.ceil(self.data * batches)) * tokens
        outputs = [sum(x.out_features for x in b.linears.values()) for b in outline.blocks]
        return 4 * seen * (max(outputs) + 4 * outline.hidden_size)

    def _tuned_bytes(self, shapes: Shapes) -> int:
        return 12 * sum(out * width for out, width in shapes)


def _nothing(_shapes: Shapes) -> int:
    """Bytes of gates and their averages, which are thousands."""
    return 0


def _weights(module: nn.Module) -> dict[str, torch.Tensor]:
    return {
        _WEIGHT + name: p.detach().cpu()
        for name, p in module.named_parameters()
        if p.is_floating_point()
    }


def _outer_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    anatomy = anatomy_of(model)
    found = _weights(model)
    return {n: t for n, t in found.items() if anatomy.is_outer(n.removeprefix(_WEIGHT))}


def _restore(module: nn.Module, learned: dict[str, torch.Tensor]) -> None:
    there = dict(module.named_parameters())
    for name, value in learned.items():
        if name.startswith(_WEIGHT):
            there[name.removeprefix(_WEIGHT)].data.copy_(value)
