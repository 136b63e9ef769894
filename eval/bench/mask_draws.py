"""What share of a step of block-wise mask learning the drawing of masks takes.

A block of SmolLM2's shapes with random weights, batches of 2 x 512 tokens. Drawing is everything
between logits and masked weights, forwards and backwards; a step is that, the block's own products
and the optimiser.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from compress.linear.pattern import Pattern
from compress.methods.sparsity.maskllm.masks import (
    Draw,
    MaskedLinear,
    initial_logits,
    masked_linears,
    set_mode,
)
from compress.system.threads import threads
from compress.train.language import relative_error

_PATTERN = Pattern(2, 4)
_SEQUENCES, _LENGTH = 2, 512


def drawing_share(dtype: torch.dtype, workers: int, repeats: int = 20) -> float:
    """Time of drawing over time of a whole step, the best of ``repeats`` each.

    Args:
        dtype: of the block's products. workers: threads that torch computes with meanwhile.
    """
    with threads(workers):
        return _share(dtype, repeats)


def _share(dtype: torch.dtype, repeats: int) -> float:
    block, call = _block()
    linears = masked_linears(block)
    optimiser = torch.optim.AdamW(
        [m.logits for m in linears.values()], lr=3e-3, betas=(0.9, 0.95), fused=True
    )
    gradients = {n: torch.randn(m.dense.shape).to(dtype) for n, m in linears.items()}
    inputs = torch.randn(_SEQUENCES, 1, _LENGTH, 576)

    def draw(number: int) -> None:
        set_mode(linears, Draw(300.0, 2.0, seed=number))
        for linear in linears.values():
            linear.hold()

    def drawing(number: int) -> None:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            draw(number)
        for name, linear in linears.items():
            linear.held().backward(gradients[name])

    def step(number: int) -> None:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            draw(number)
            error = sum(relative_error(call(x), x) for x in inputs) / _SEQUENCES
        error.backward()
        optimiser.step()

    best = {drawing: float("inf"), step: float("inf")}
    for number in range(repeats):
        for part in best:
            optimiser.zero_grad(set_to_none=True)
            started = time.perf_counter()
            part(number)
            best[part] = min(best[part], time.perf_counter() - started)
    return best[drawing] / best[step]


def _block() -> tuple[nn.Module, Callable[[torch.Tensor], torch.Tensor]]:
    """A block whose linears have masked ones in their places, and how it is called."""
    config = LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=1, num_attention_heads=9,
        num_key_value_heads=3, attn_implementation="sdpa",
    )  # fmt: skip
    block = LlamaDecoderLayer(config, 0).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for stream, (path, inner) in enumerate(list(block.named_modules())):
        if isinstance(inner, nn.Linear):
            logits = initial_logits(
                _PATTERN, inner.weight.numel() // 4, prior=None, alpha=0.0, std=0.01,
                generator=generator,
            )  # fmt: skip
            parent, _, leaf = path.rpartition(".")
            masked = MaskedLinear(inner, _PATTERN, logits, stream)
            setattr(block.get_submodule(parent), leaf, masked)
    places = torch.arange(_LENGTH)[None]
    angles = LlamaRotaryEmbedding(config)(torch.zeros(1, _LENGTH, 576), places)
    return block, lambda x: block(x, position_embeddings=angles)
