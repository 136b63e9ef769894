"""What a model will weigh: sizes without weights, which `plan` passes through the steps.

An outline is read from a meta model once; each method's ``predict`` returns a new one. Everything a
plan prints (parameters, bytes, effective bits, work, peak memory) is computed from outlines.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import nn
from transformers import PreTrainedModel

from compress.models.anatomy import Anatomy, BlockAnatomy


@dataclass(frozen=True)
class LinearOutline:
    """One weight matrix [out, in], or the low-rank pair that took its place.

    Attributes:
        bits: stored bits a weight, scales and zero points included.
        density: share of weights that are not zero.
        rank: rank of the pair, 0 for a plain matrix.
    """

    out_features: int
    in_features: int
    bias: bool
    bits: float
    density: float = 1.0
    rank: int = 0
    quantized: bool = False

    @property
    def weights(self) -> int:
        if self.rank:
            return self.rank * (self.out_features + self.in_features)
        return self.out_features * self.in_features

    @property
    def bytes(self) -> float:
        return self.weights * self.bits / 8


@dataclass(frozen=True)
class BlockOutline:
    """One block: its linears by path, its other parameters, its anatomy (for widths)."""

    linears: dict[str, LinearOutline]
    other_parameters: int
    anatomy: BlockAnatomy

    def with_linears(self, changed: dict[str, LinearOutline]) -> BlockOutline:
        return replace(self, linears={**self.linears, **changed})


@dataclass(frozen=True)
class Outline:
    """A whole model.

    Attributes:
        blocks: in order.
        outer_parameters: parameters outside blocks, tied ones once.
        head_weights: weights of the output head (used once a token, tied or not).
        value_bits: bits of an unquantised stored value (16 for bf16).
    """

    blocks: tuple[BlockOutline, ...]
    outer_parameters: int
    head_weights: int
    hidden_size: int
    value_bits: int
    vocab_size: int = 0
    notes: tuple[str, ...] = field(default=())

    @property
    def parameters(self) -> int:
        return self.outer_parameters + sum(
            b.other_parameters + sum(x.weights for x in b.linears.values()) for b in self.blocks
        )

    @property
    def nonzero(self) -> int:
        return self.outer_parameters + sum(
            b.other_parameters + round(sum(x.weights * x.density for x in b.linears.values()))
            for b in self.blocks
        )

    @property
    def bytes(self) -> int:
        value = self.value_bits / 8
        return round(
            self.outer_parameters * value
            + sum(
                b.other_parameters * value + sum(x.bytes for x in b.linears.values())
                for b in self.blocks
            )
        )

    @property
    def effective_bits(self) -> float:
        """Stored bits a weight over all block linears."""
        weights = sum(x.weights for b in self.blocks for x in b.linears.values())
        stored = sum(8 * x.bytes for b in self.blocks for x in b.linears.values())
        return stored / weights if weights else 0.0

    @property
    def macs_per_token(self) -> int:
        """Multiply-accumulates of linears and head for one token (attention not counted)."""
        linears = sum(x.weights for b in self.blocks for x in b.linears.values())
        return linears + self.head_weights

    def map_blocks(self, change) -> Outline:
        """Apply ``change(BlockOutline) -> BlockOutline`` to every block."""
        return replace(self, blocks=tuple(change(b) for b in self.blocks))


def outline_of(model: PreTrainedModel, anatomy: Anatomy, value_bits: int) -> Outline:
    """Read the outline of a (meta) model."""
    from compress.linear.modules import LowRankLinear, QuantizedLinear

    blocks = []
    for block_anatomy in anatomy.blocks:
        block = model.get_submodule(block_anatomy.path)
        linears: dict[str, LinearOutline] = {}
        counted = 0
        for name in block_anatomy.linears:
            module = block.get_submodule(name)
            rank = module.rank if isinstance(module, LowRankLinear) else 0
            out_features, in_features = _features(module)
            quantized = any(isinstance(m, QuantizedLinear) for m in module.modules())
            linears[name] = LinearOutline(
                out_features,
                in_features,
                _bias(module),
                float(value_bits),
                rank=rank,
                quantized=quantized,
            )
            counted += linears[name].weights
        total = sum(p.numel() for p in block.parameters())
        blocks.append(BlockOutline(linears, total - counted, block_anatomy))
    block_total = sum(
        b.other_parameters + sum(x.weights for x in b.linears.values()) for b in blocks
    )
    head = model.get_output_embeddings()
    vocab, hidden = head.weight.shape if head is not None else (0, model.config.hidden_size)
    return Outline(
        tuple(blocks),
        # parameters() yields a tied tensor once.
        sum(p.numel() for p in model.parameters()) - block_total,
        vocab * hidden,
        model.config.hidden_size,
        value_bits,
        vocab,
    )


def _features(module: nn.Module) -> tuple[int, int]:
    from compress.linear.matrix import features, is_linear

    return features(module) if is_linear(module) else (module.out_features, module.in_features)


def _bias(module: nn.Module) -> bool:
    module = getattr(module, "second", module)
    return module.bias is not None
