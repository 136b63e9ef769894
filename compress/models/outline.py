"""What a model will weigh: sizes without weights, which `plan` passes through the steps.

An outline is read from a meta model once; each method's ``predict`` returns a new one. Everything a
plan prints (parameters, bytes, effective bits, work, peak memory) is computed from outlines.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import nn
from transformers import PreTrainedModel

from compress.linear.layer import features_of, is_layer
from compress.linear.quantized import quantized_parts
from compress.models.anatomy import Anatomy, BlockAnatomy
from compress.models.experts import routed_share, unfused_in
from compress.models.heads import head_of
from compress.models.widths import linear_sizes


@dataclass(frozen=True)
class LinearOutline:
    """One weight matrix [out, in], or the layer that took its place.

    Attributes:
        bits: stored bits a weight, scales and zero points included.
        density: share of weights that are not zero.
        layer: kind of the layer, "" for a plain matrix.
        parts: shapes [out, in] of the linears that a layer is made of; none where it is not.
        stored: weights of a layer that is not made of linears.
        work: multiply-accumulates a token of a layer, where they are not its weights.
        tables: shapes [out, in] of the linears that hold the numbers of a layer without parts.
        extra_bytes: stored beside the weights, whatever these are rounded to.
        share: of the tokens that pass it; below 1 for experts of a mixture.
    """

    out_features: int
    in_features: int
    bias: bool
    bits: float
    density: float = 1.0
    quantized: bool = False
    layer: str = ""
    parts: tuple[tuple[int, int], ...] = ()
    stored: int | None = None
    work: int | None = None
    tables: tuple[tuple[int, int], ...] = ()
    extra_bytes: int = 0
    share: float = 1.0

    @property
    def matrices(self) -> tuple[tuple[int, int], ...]:
        """Shapes [out, in] of the plain linears here; none in a layer that is not made of them."""
        if self.layer:
            return self.parts
        return ((self.out_features, self.in_features),)

    @property
    def roundable(self) -> tuple[tuple[int, int], ...]:
        """Shapes [out, in] of what a precision step rounds."""
        return self.matrices or self.tables

    @property
    def weights(self) -> int:
        if self.layer and not self.parts:
            return self.stored or 0
        return sum(rows * columns for rows, columns in self.matrices)

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one token, on average."""
        return round(self.share * (self.weights if self.work is None else self.work))

    def factorised(self, rank: int) -> LinearOutline:
        """A low-rank pair in the place of a plain matrix; the matrix itself for rank 0."""
        if not rank:
            return self
        parts = ((rank, self.in_features), (self.out_features, rank))
        return replace(self, layer="low_rank", parts=parts)

    def replaced(
        self, layer: str, tables: tuple[tuple[int, int], ...], extra_bytes: int
    ) -> LinearOutline:
        """A layer whose numbers are in ``tables`` in the place of a plain matrix."""
        stored = sum(rows * columns for rows, columns in tables)
        return replace(self, layer=layer, tables=tables, stored=stored, extra_bytes=extra_bytes)

    def narrowed(self, rows: int, columns: int) -> LinearOutline:
        """The same with other numbers of outputs and inputs; 0 leaves one as it is."""
        rows, columns = rows or self.out_features, columns or self.in_features
        parts = list(self.parts)
        if parts:
            parts[0] = (parts[0][0], columns)
            parts[-1] = (rows, parts[-1][1])
        return replace(self, out_features=rows, in_features=columns, parts=tuple(parts))

    @property
    def bytes(self) -> float:
        return self.weights * self.bits / 8 + self.extra_bytes


@dataclass(frozen=True)
class BlockOutline:
    """One block: its linears by path, its other parameters, its anatomy (for widths)."""

    linears: dict[str, LinearOutline]
    other_parameters: int
    anatomy: BlockAnatomy

    def with_linears(self, changed: dict[str, LinearOutline]) -> BlockOutline:
        return replace(self, linears={**self.linears, **changed})

    def with_widths(self, widths: dict[str, int]) -> BlockOutline:
        """The same block with other widths, {"heads", "kv_heads", "ffn"}."""
        changed, biases = {}, 0
        for name, (rows, columns) in linear_sizes(self.anatomy, widths).items():
            old = self.linears[name]
            new = old.narrowed(rows, columns)
            biases += (old.out_features - new.out_features) * old.bias
            changed[name] = new
        shapes = {f"{name}.bias": (linear.out_features,) for name, linear in changed.items()}
        others = tuple((name, shapes.get(name, shape)) for name, shape in self.anatomy.others)
        return replace(
            self.with_linears(changed),
            other_parameters=self.other_parameters - biases,
            anatomy=replace(self.anatomy, **widths, others=others),
        )

    def with_experts(self, count: int) -> BlockOutline:
        """The same block with the first ``count`` of its experts; what one holds, each holds."""
        anatomy, mixture = self.anatomy, self.anatomy.mixture
        if mixture is None or count >= anatomy.experts:
            return self
        gone = tuple(f"{mixture.experts}.{n}." for n in range(count, anatomy.experts))
        router, ratio = (mixture.router, f"{mixture.router}."), anatomy.experts / count
        linears, others = {}, self.other_parameters
        for name, linear in self.linears.items():
            if name.startswith(gone):
                others -= linear.out_features * linear.bias
            elif name.startswith(f"{mixture.experts}."):
                linears[name] = replace(linear, share=min(1.0, linear.share * ratio))
            elif name in router or name.startswith(router[1]):
                linears[name] = linear.narrowed(count, 0)
                others -= (anatomy.experts - count) * linear.bias
            else:
                linears[name] = linear
        sites = tuple(
            replace(site, linears=tuple(n for n in site.linears if n in linears))
            for site in anatomy.sites
        )
        return replace(
            self,
            linears=linears,
            other_parameters=others - (anatomy.experts - count) * mixture.row,
            anatomy=replace(anatomy, sites=sites, experts=count),
        )


@dataclass(frozen=True)
class Outline:
    """A whole model.

    Attributes:
        blocks: in order.
        outer_parameters: parameters outside blocks, tied ones once.
        head_weights: weights of the output head (used once a token, tied or not).
        value_bits: bits of an unquantised stored value (16 for bf16).
        tables: shapes of the embedding of tokens and the head, a tied one once.
        table_bits: stored bits of a value there; None where they are values like others.
        labels: answers that a head of labels chooses from, or 1 for a number; 0 without one.
        scored: attention computes its scores as a tensor of their own, for want of a fused kernel.
    """

    blocks: tuple[BlockOutline, ...]
    outer_parameters: int
    head_weights: int
    hidden_size: int
    value_bits: int
    vocab_size: int = 0
    labels: int = 0
    notes: tuple[str, ...] = field(default=())
    tables: tuple[tuple[int, int], ...] = ()
    table_bits: float | None = None
    scored: bool = False

    @property
    def predicts(self) -> bool:
        """Whether the model has a head with a loss of its own."""
        return bool(self.vocab_size or self.labels)

    @property
    def parameters(self) -> int:
        return self.outer_parameters + sum(
            b.other_parameters + sum(x.weights for x in b.linears.values()) for b in self.blocks
        )

    @property
    def active_parameters(self) -> int:
        """Parameters that one token passes: of a mixture those of the experts that it is sent to,
        of any other model all."""
        idle = sum(x.weights * (1 - x.share) for b in self.blocks for x in b.linears.values())
        return self.parameters - round(idle)

    @property
    def nonzero(self) -> int:
        return self.outer_parameters + sum(
            b.other_parameters + round(sum(x.weights * x.density for x in b.linears.values()))
            for b in self.blocks
        )

    @property
    def bytes(self) -> int:
        value = self.value_bits / 8
        held = sum(rows * columns for rows, columns in self.tables)
        saved = 0.0 if self.table_bits is None else held * (value - self.table_bits / 8)
        return round(
            self.outer_parameters * value
            - saved
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
        linears = sum(x.macs for b in self.blocks for x in b.linears.values())
        return linears + self.head_weights

    def map_blocks(self, change) -> Outline:
        """Apply ``change(BlockOutline) -> BlockOutline`` to every block."""
        return replace(self, blocks=tuple(change(b) for b in self.blocks))


def outline_of(model: PreTrainedModel, anatomy: Anatomy, value_bits: int) -> Outline:
    """Read the outline of a (meta) model."""
    blocks = []
    for block_anatomy in anatomy.blocks:
        block = model.get_submodule(block_anatomy.path)
        linears: dict[str, LinearOutline] = {}
        routed = {f"{p}.": routed_share(model.config, m) for p, m in unfused_in(block)}
        counted = 0
        for name in block_anatomy.linears:
            module = block.get_submodule(name)
            share = next((s for path, s in routed.items() if name.startswith(path)), 1.0)
            linears[name] = replace(linear_outline(module, float(value_bits)), share=share)
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
        0 if (labelled := head_of(model)) is None else labelled.outputs,
        tables=tuple(tuple(table.weight.shape) for table in token_tables(model)),
        scored=model.config._attn_implementation == "eager",
    )


def token_tables(model: PreTrainedModel) -> list[nn.Module]:
    """The embedding of tokens, and the head where it has a weight of its own."""
    words, head = model.get_input_embeddings(), model.get_output_embeddings()
    found = [words] if isinstance(words, nn.Embedding) else []
    if isinstance(head, nn.Linear) and all(head.weight is not table.weight for table in found):
        found.append(head)
    return found


def linear_outline(module: nn.Module, bits: float) -> LinearOutline:
    """The outline of a linear or a layer (real or meta), zeros left out of account."""
    rows, columns = features_of(module)
    plain = LinearOutline(
        rows, columns, module.bias is not None, bits, quantized=quantized_parts(module)
    )
    if not is_layer(module):
        return plain
    size = module.size()
    parts = tuple(features_of(module.get_submodule(part)) for part in module.parts())
    stored = None if parts else size.weights
    tables = () if parts else tuple(features_of(module.get_submodule(t)) for t in module.tables())
    plain = replace(
        plain, layer=module.kind, parts=parts, stored=stored, tables=tables,
        extra_bytes=size.extra_bytes,
    )  # fmt: skip
    return plain if size.macs == plain.weights else replace(plain, work=size.macs)
