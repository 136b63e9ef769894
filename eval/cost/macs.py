"""Multiply-accumulates per token, counted while the model runs."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from compress.linear.layer import features_of
from compress.models.anatomy import find_blocks
from compress.models.heads import head_of
from compress.models.images import random_image, reads_images
from compress.models.positions import positions_of


class Macs(BaseModel):
    """Multiply-accumulates (half of the floating-point operations) of one token."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    per_token: int = Field(description="linear + context * attention products, head included")
    head: int = Field(description="of these, the output projection")
    per_token_and_position: int = Field(
        description="both attention products, per token and per position attended to"
    )
    context: int = Field(description="positions that the token attends to")
    per_sequence: int = Field(
        default=0,
        description="beside those of tokens: of a head that answers once a sequence (its pooler "
        "and labels), which per_token leaves out",
    )

    def forward(self, tokens: int, logits: int, causal: bool) -> int:
        """Multiply-accumulates of one forward.

        Args:
            tokens: of its one sequence.
            logits: positions whose logits are computed: 1 for the prefill of a server.
            causal: a token attends to those up to itself, which is all that fused kernels compute.
        """
        linear = self.per_token - self.per_token_and_position * self.context - self.head
        visible = tokens * (tokens + 1) // 2 if causal else tokens**2
        once = logits * self.head + self.per_sequence
        return tokens * linear + once + self.per_token_and_position * visible


@torch.no_grad()
def macs_per_token(model: nn.Module, context: int = 1024) -> Macs:
    """Count the multiply-accumulates of one token that attends to ``context`` positions.

    Every matrix product of two short forwards (8 and 16 tokens, or what the model has positions
    for) is counted from the shapes that really run, so narrowed, factorised and shared layers
    count as what they are. A forward of T tokens costs ``a T + b T^2``: two lengths give both, and
    a token at a context of C costs ``a + b C``. A head of labels adds a constant, which a third
    length shows. Zeros count as work, because no dense kernel skips
    them. Attention is counted as full: a sliding window shorter than the context would do less.

    A model that reads images makes as many tokens of each: one forward tells what its blocks do
    for them, attention apart, and the rest (patches, pooler and labels) is a constant.

    Args:
        model: any ``PreTrainedModel`` that takes ``input_ids`` or ``pixel_values``.
        context: tokens; of a model that reads images, those of an image.
    """
    if reads_images(model.config):
        return _of_image(model)
    more = min(16, positions_of(model.config) or 16)
    few = more // 2
    short, long = _count(model, few), _count(model, more)
    once = 0
    if head_of(model) is not None:
        between = (few + more) // 2
        middle = _count(model, between)
        once = _constant((few, short), (between, middle), (more, long))
        short, long = short - once, long - once
    # Solve a T + b T^2 at two lengths; both sides are integers when the model is what it says.
    quadratic = (long / more - short / few) / (more - few)
    linear = short / few - quadratic * few
    head = model.get_output_embeddings()
    rows, columns = (0, 0) if head is None else features_of(head)
    return Macs(
        per_token=round(linear + quadratic * context),
        head=rows * columns,
        per_token_and_position=round(quadratic),
        context=context,
        per_sequence=once,
    )


def _constant(*points: tuple[int, int]) -> int:
    """The value at 0 of the parabola through three points (Lagrange)."""
    total = 0.0
    for x, y in points:
        weight = 1.0
        for other, _ in points:
            if other != x:
                weight *= other / (other - x)
        total += weight * y
    return round(total)


def _of_image(model: nn.Module) -> Macs:
    tokens: list[int] = []
    path, blocks = find_blocks(model)
    hook = blocks[0].register_forward_pre_hook(
        lambda _module, args: tokens.append(args[0].shape[1])
    )
    try:
        counter = _counted(model, random_image(model.config))
    finally:
        hook.remove()
    inside: dict[Any, int] = {}
    for name, counts in counter.get_flop_counts().items():
        place, _, number = name.rpartition(".")
        if number.isdigit() and (place == path or place.endswith(f".{path}")):
            for operation, count in counts.items():
                inside[operation] = inside.get(operation, 0) + count // 2
    attention = sum(count for operation, count in inside.items() if operation in _ATTENTION)
    linear, context = sum(inside.values()) - attention, tokens[0]
    return Macs(
        per_token=round(linear / context + attention / context),
        head=0,
        per_token_and_position=round(attention / context**2),
        context=context,
        per_sequence=counter.get_total_flops() // 2 - linear - attention,
    )


def _count(model: nn.Module, tokens: int) -> int:
    ids = torch.zeros(1, tokens, dtype=torch.long)
    return _counted(model, {"input_ids": ids}).get_total_flops() // 2


def _counted(model: nn.Module, inputs: dict[str, torch.Tensor]) -> FlopCounterMode:
    training = model.training
    model.eval()
    counter = FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION)
    try:
        with counter:
            model(**{name: value.to(model.device) for name, value in inputs.items()})
    finally:
        model.train(training)
    return counter


def _attention_flops(query, key, value, *_, out_shape=None, **__) -> int:  # noqa: ANN001
    """Both products of scaled dot-product attention from shapes [batch, heads, tokens, width]."""
    batch, heads, tokens, width = query
    return 2 * batch * heads * tokens * key[-2] * (width + value[-1])


# PyTorch registers formulas for the CUDA kernels; the fused CPU kernel has the same products.
_CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
}
# Products of activations with each other: fused kernels, and batched products of eager attention.
_ATTENTION = {
    *_CPU_ATTENTION, torch.ops.aten.bmm, torch.ops.aten.baddbmm,
    torch.ops.aten._scaled_dot_product_efficient_attention,
    torch.ops.aten._scaled_dot_product_flash_attention,
    torch.ops.aten._scaled_dot_product_cudnn_attention,
}  # fmt: skip
