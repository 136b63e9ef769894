"""The scales and shifts of norms, folded exactly into the linears that read them."""

from __future__ import annotations

import torch
from torch import nn

from compress.errors import CompressError
from compress.linear.matrix import matrix
from compress.models.anatomy import QKV, UP, BlockAnatomy

_EXACT = 1e-4  # relative error of a norm taken apart, in float32
_UNIT = (1.0, 0.0)  # weights with which norms scale by one: most, and those that add one (Gemma)


def obstacle(anatomy: BlockAnatomy) -> str | None:
    """Why blocks of this build cannot be put side by side, None where they can.

    Side by side, blocks read one norm and add to one residual stream. So each norm must be read by
    the producers of attention and FFN alone, and must leave its scale and shift to them: that needs
    a norm in front of both, and a bias in each linear that is to take a shift. Any other parameter
    is in the way: a block has it once, and the parts of several blocks would have to share it.
    """
    if not anatomy.kv_heads or not anatomy.ffn:
        return "whose attention and FFN are not both of a known build"
    others, own = dict(anatomy.others), set[str]()
    for site in anatomy.sites:
        if site.kind not in (QKV, UP):
            continue
        norm = site.norm
        if norm is None:
            what = "attention" if site.kind == QKV else "FFN"
            return (
                f"whose {what} reads the residual stream behind a norm that the stream itself "
                "passes (post-norm), or no norm that is its own: the scale of that norm is part of "
                "the stream and no linear can take it"
            )
        own |= {f"{norm}.weight", f"{norm}.bias"}
        bare = [name for name in site.linears if f"{name}.bias" not in others]
        if f"{norm}.bias" in others and bare:
            return f"whose norm {norm} adds a shift that {bare[0]}, without a bias, cannot take"
    linears = tuple(f"{name}." for name in anatomy.linears)
    left = [name for name in others if name not in own and not name.startswith(linears)]
    if left:
        return (
            f"with {left[0]}, which stands between linears (a norm of queries and keys, or behind "
            "attention or FFN): several blocks have several, and one has room for one"
        )
    return None


def fold_norms(block: nn.Module, anatomy: BlockAnatomy) -> None:
    """Make a block whose norms only normalise compute what it did before.

    With n(x) the normalised input, y = W (s n(x) + t) + b is (W s) n(x) + (b + W t), the mean of a
    LayerNorm being taken off by n as before.

    Args:
        anatomy: with norms, of a block without an :func:`obstacle`.

    Raises:
        CompressError: a norm is of another form than s n(x) + t.
    """
    readers: dict[str, list[str]] = {}
    for site in anatomy.sites:
        if site.kind in (QKV, UP):
            readers.setdefault(site.norm, []).extend(site.linears)
    for norm, names in readers.items():
        where = f"{anatomy.path}.{norm}"
        scale, shift = take_affine(block.get_submodule(norm), anatomy.hidden, where)
        for name in names:
            linear = block.get_submodule(name)
            weight = matrix(linear)
            scale, shift = scale.to(weight.device), shift.to(weight.device)
            if linear.bias is not None:
                linear.bias.data += weight @ shift
            elif bool(shift.any()):
                raise CompressError("a bias to take the shift of a norm", f"none in {name}")
            weight *= scale


def take_affine(norm: nn.Module, width: int, where: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Take scale s and shift t, [width] each, out of a norm that computes s n(x) + t.

    Which weight means a scale of one is found by trying: most norms multiply by their weight,
    Gemma's by one more. The norm is afterwards n, and is shown to be.

    Args:
        where: path of the norm, for the message.

    Raises:
        CompressError: what the norm computes is not s n(x) + t; it is then as it was.
    """
    held = dict(norm.named_parameters())
    weight, bias = held.pop("weight", None), held.pop("bias", None)
    like = next(iter(p for p in (weight, bias) if p is not None), torch.zeros(()))
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(4, width, generator=generator, dtype=torch.float32).to(like.device)
    kept = [None if p is None else p.data.clone() for p in (weight, bias)]
    before = norm(probe)
    if bias is not None:
        bias.data.zero_()
    for unit in _UNIT if weight is not None else (1.0,):
        if weight is not None:
            weight.data.fill_(unit)
        plain = norm(probe)
        if abs(float(plain.square().mean()) - 1) > 0.01:
            continue
        scale = torch.ones_like(probe[0]) if kept[0] is None else kept[0] + (1 - unit)
        shift = torch.zeros_like(probe[0]) if kept[1] is None else kept[1]
        if (
            not held
            and (before - (scale * plain + shift)).abs().max() <= _EXACT * before.abs().max()
        ):
            return scale, shift
    for parameter, value in zip((weight, bias), kept, strict=True):
        if parameter is not None:
            parameter.data.copy_(value)
    raise CompressError(
        f"a norm that computes scale * normalised + shift in {where}", type(norm).__name__,
        "Use shortgpt or sleb, which leave blocks as they are",
    )  # fmt: skip
