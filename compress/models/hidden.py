"""Narrowing the residual stream: of a block, and of what lies outside the blocks.

The stream's channels are columns of what reads it, rows of what writes it, and values of the norms
over it. Whether a class computes with fewer of them what its config then says is another question,
see :func:`compress.planning.rehearsal.rehearse`.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from compress.errors import CompressError
from compress.linear.matrix import features, is_linear, slice_linear
from compress.models.anatomy import ATTENTION_OUT, DOWN, QKV, UP, Anatomy, BlockAnatomy
from compress.models.heads import answering_layer
from compress.models.units import narrow_columns, narrow_rows


def narrow_block(block: nn.Module, anatomy: BlockAnatomy, kept: torch.Tensor) -> None:
    """Make a block read and write only some channels of the residual stream.

    Args:
        anatomy: of the block before that.
        kept: int64 indices of the channels that stay, ascending.

    Raises:
        CompressError: a block whose linears do not show how wide the stream is.
    """
    hidden = anatomy.hidden
    if not hidden:
        raise CompressError(
            "a block whose linears all read and write the residual stream or what is inside it",
            f"{anatomy.path}, where the width of the stream does not show",
            "Compress another width, the depth, zeros, rank or precision of this family",
        )
    for site in anatomy.sites:
        for name in site.linears:
            linear = block.get_submodule(name)
            if site.kind in (QKV, UP):
                narrow_columns(linear, kept)
            elif site.kind in (ATTENTION_OUT, DOWN):
                narrow_rows(linear, kept)
    linears = tuple(f"{name}." for site in anatomy.sites for name in site.linears)
    bound = {name for site in anatomy.sites for name in site.bound}
    for name, module in block.named_modules():
        # A norm over all heads may be as wide as the stream, and is none of it.
        if not f"{name}.".startswith(linears) and name not in bound:
            _narrow_values(module, hidden, kept)


def narrow_outer(model: PreTrainedModel, anatomy: Anatomy, kept: torch.Tensor) -> None:
    """The same of embeddings, norms and heads; tied weights stay tied.

    What stock classes make as wide as the stream (poolers, the dense layer in front of a head) is
    narrowed on both sides: of its outputs those stay that have the channels' numbers.

    Args:
        anatomy: of the model before its blocks were narrowed.
    """
    hidden = anatomy.blocks[0].hidden
    head, done = model.get_output_embeddings(), dict[int, nn.Parameter]()
    heads = (head, answering_layer(model))  # whose outputs are no channels, however many they are
    for name, module in model.named_modules():
        if not anatomy.is_outer(f"{name}."):
            continue
        before = getattr(module, "weight", None)
        if before is not None and id(before) in done:
            module.weight = done[id(before)]
        elif isinstance(module, nn.Embedding):
            if module.embedding_dim == hidden:
                module.weight = _chosen(module.weight, kept, dim=1)
                module.embedding_dim = len(kept)
        elif is_linear(module):
            rows, columns = features(module)
            slice_linear(
                module,
                rows=kept.to(module.weight.device)
                if rows == hidden and not any(module is h for h in heads)
                else None,
                columns=kept.to(module.weight.device) if columns == hidden else None,
            )
        else:
            _narrow_values(module, hidden, kept)
        if before is not None:
            done[id(before)] = module.weight


def _narrow_values(module: nn.Module, hidden: int, kept: torch.Tensor) -> None:
    """Narrow the vectors of a module that has no others inside it: a norm, a scale of channels."""
    if any(True for _ in module.children()):
        return
    for name, parameter in list(module.named_parameters(recurse=False)):
        if parameter.shape == (hidden,):
            setattr(module, name, _chosen(parameter, kept, dim=0))
    for name, buffer in list(module.named_buffers(recurse=False)):
        if buffer.shape == (hidden,):
            module._buffers[name] = buffer.index_select(0, kept.to(buffer.device))
    if getattr(module, "normalized_shape", None) == (hidden,):
        module.normalized_shape = (len(kept),)


def _chosen(parameter: nn.Parameter, kept: torch.Tensor, dim: int) -> nn.Parameter:
    values = parameter.data.index_select(dim, kept.to(parameter.device))
    return nn.Parameter(values, requires_grad=parameter.requires_grad)
