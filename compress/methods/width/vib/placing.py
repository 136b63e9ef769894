"""Gates in a live model, by hooks: on what units compute, and in the norms over the stream.

Where the stream loses channels a norm must be over those that stay: zeros alone would change its
mean and variance. So norms over the stream compute with the channels that count while gates are in
place, which is what the narrow model's own norms will do.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from compress.errors import CompressError
from compress.linear.matrix import features, is_linear
from compress.methods.base import HEADS, HIDDEN, NEURONS
from compress.methods.width.vib.gates import ATTENTION, FFN, Gates
from compress.models.anatomy import ATTENTION_OUT, DOWN, Anatomy, BlockAnatomy
from compress.models.hidden import narrow_block
from compress.models.norms import is_norm

_NAME = "vib_gates"  # under which a model owns its gates while they learn
_SITES = ((ATTENTION_OUT, HEADS, ATTENTION), (DOWN, NEURONS, FFN))


@contextmanager
def placed(model: nn.Module, anatomy: Anatomy, gates: Gates) -> Iterator[None]:
    """Let a model compute through gates meanwhile; it owns them, so they can be trained.

    Raises:
        CompressError: a norm over the stream that cannot be told to use some channels only.
    """
    handles: list[Any] = []
    norms: list[nn.Module] = []
    model.add_module(_NAME, gates)
    try:
        for block in anatomy.blocks:
            handles += _on_units(model.get_submodule(block.path), block, gates)
        if HIDDEN in gates:
            handles += _on_stream(model, anatomy, gates)
            norms = stream_norms(model, anatomy)
            centred = {type(n): _centres(n, anatomy.blocks[0].hidden) for n in norms}
            for norm in norms:
                norm.forward = _over_kept(norm, gates, centred[type(norm)])
        yield
    finally:
        for handle in handles:
            handle.remove()
        for norm in norms:
            vars(norm).pop("forward", None)
        delattr(model, _NAME)


def _on_units(block: nn.Module, anatomy: BlockAnatomy, gates: Gates) -> list[Any]:
    handles = []
    for site, units, whole in _SITES:
        found = anatomy.site(site)
        if found is None:
            continue
        output = block.get_submodule(found.linears[0])
        if units in gates:
            size = anatomy.heads * anatomy.head_dim // anatomy.kv_heads if units == HEADS else 1
            handles.append(output.register_forward_pre_hook(_entering(gates, units, anatomy, size)))
        if whole in gates:
            handles.append(output.register_forward_hook(_whole(gates, whole, anatomy.index)))
        if HIDDEN in gates:
            handles.append(output.register_forward_hook(_written(gates)))
    return handles


def _entering(gates: Gates, kind: str, anatomy: BlockAnatomy, size: int):
    index = anatomy.index
    return lambda _module, args: (gates.gated(args[0], kind, index, size), *args[1:])


def _whole(gates: Gates, kind: str, index: int):
    return lambda _module, _args, output: gates.sublayer(output, kind, index)


def _written(gates: Gates):
    return lambda _module, _args, output: gates.gated(output, HIDDEN, 0)


def _on_stream(model: nn.Module, anatomy: Anatomy, gates: Gates) -> list[Any]:
    """Gates on what writes to the stream outside the blocks, and on what a tied head reads.

    What is folded into an embedding is folded into a head that is tied to it.
    """
    handles = [m.register_forward_hook(_written(gates)) for m in outer_writers(model, anatomy)]
    if head_is_tied(model):
        handles.append(
            model.get_output_embeddings().register_forward_pre_hook(
                lambda _module, args: (_scaled(args[0], gates), *args[1:])
            )
        )
    return handles


def _scaled(values: torch.Tensor, gates: Gates) -> torch.Tensor:
    if gates.channels() is None:
        return values
    return (values.float() * gates.means()).to(values.dtype)


def outer_writers(model: nn.Module, anatomy: Anatomy) -> list[nn.Module]:
    """Embeddings and linears outside the blocks whose outputs are as wide as the stream."""
    hidden, head = anatomy.blocks[0].hidden, model.get_output_embeddings()
    return [
        module
        for name, module in model.named_modules()
        if anatomy.is_outer(f"{name}.")
        and module is not head
        and (
            (isinstance(module, nn.Embedding) and module.embedding_dim == hidden)
            or (is_linear(module) and features(module)[0] == hidden)
        )
    ]


def head_is_tied(model: nn.Module) -> bool:
    """Whether the head's matrix is that of the word embeddings."""
    head, words = model.get_output_embeddings(), model.get_input_embeddings()
    return head is not None and head.weight is words.weight


def stream_norms(model: nn.Module, anatomy: Anatomy) -> list[nn.Module]:
    """The norms over the residual stream, inside the blocks and outside."""
    hidden = anatomy.blocks[0].hidden
    bound = {f"{b.path}.{name}" for b in anatomy.blocks for s in b.sites for name in s.bound}
    return [
        module
        for name, module in model.named_modules()
        if name not in bound
        and is_norm(module)
        and (
            getattr(module, "normalized_shape", None) == (hidden,)
            or any(p.shape == (hidden,) for p in module.parameters(recurse=False))
        )
    ]


def _over_kept(norm: nn.Module, gates: Gates, centred: bool):
    """A norm's forward over the channels that count; the others leave it as zeros."""
    stock = norm.forward

    def forward(values: torch.Tensor) -> torch.Tensor:
        share = gates.channels()
        if share is None:
            return stock(values)
        return _normed(stock, norm, values, share, centred)

    return forward


def _normed(
    stock: Any, norm: nn.Module, values: torch.Tensor, share: torch.Tensor, centred: bool
) -> torch.Tensor:
    """The norm over K of d channels by way of the class's own over d.

    What is zero adds nothing to a sum of squares, so with inputs larger by sqrt(d / K) the mean
    over d is that over K, and all outputs are too large by the same factor.
    """
    count = share.sum()
    scale = (len(share) / count).sqrt()
    kept = values.float() * share
    if centred:
        kept = kept - share * (kept.sum(-1, keepdim=True) / count)
    shift = getattr(norm, "bias", None)
    made = stock((kept * scale).to(values.dtype)).float()
    if shift is not None:
        made = made - shift
    made = made / scale
    if shift is not None:
        made = made + shift
    return (made * share).to(values.dtype)


def _centres(norm: nn.Module, hidden: int) -> bool:
    """Whether a norm subtracts the mean, found by trying: with half of its channels it must return
    what a copy of it that has only these returns.

    Raises:
        CompressError: neither reading is right.
    """
    weight = next(iter(norm.parameters()), torch.zeros(1))
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(4, hidden, generator=generator).to(weight.device)
    share = (torch.arange(hidden) % 2 == 0).float().to(weight.device)
    kept = share.nonzero().flatten()
    narrow = nn.ModuleDict({"norm": copy.deepcopy(norm)})
    narrow_block(narrow, BlockAnatomy("", 0, (), 0, 0, 0, 0, None, hidden), kept)
    with torch.no_grad():
        wanted = narrow["norm"](values[:, kept])
        for centred in (False, True):
            found = _normed(norm.forward, norm, values, share, centred)[:, kept]
            if torch.allclose(found, wanted, rtol=1e-4, atol=1e-5):
                return centred
    raise CompressError(
        "norms over the residual stream that scale by a mean square or a variance",
        type(norm).__name__, "Leave hidden out of units",
    )  # fmt: skip
