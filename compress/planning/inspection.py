"""`compress inspect`: what a model is made of and what each method could do with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from compress.checkpoint.state import ModelState
from compress.errors import CompressError
from compress.methods.catalog import METHODS
from compress.models.anatomy import ATTENTION_OUT, DOWN, stock_type
from compress.models.described import attach, described_family
from compress.models.experts import fuse_all, unfuse_all
from compress.models.families import FAMILIES
from compress.models.outline import BlockOutline, Outline, outline_of
from compress.models.sources.source import load_config, resolve
from compress.models.stream import StreamedModel
from compress.models.supported import check_kind
from compress.planning.step_check import check_step, left_alone
from compress.system.tensors import TensorIndex

_SUBLAYERS = {"attention": ATTENTION_OUT, "ffn": DOWN}


def inspect_model(
    source: str | Path | PreTrainedModel,
    *,
    cache_dir: str | Path | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Describe a model without reading its weights.

    Returns:
        Plain data: origin, family, blocks (widths, sites with shapes), parameters, bytes, methods
        (name -> "yes" or why not).

    Raises:
        CompressError: no transformer blocks, or a source that cannot be used.
    """
    if isinstance(source, PreTrainedModel):
        unfuse_all(source)  # experts are linears to steps
        try:
            bits = 8 * source.dtype.itemsize
            return _described(StreamedModel(source), type(source).__name__, bits)
        finally:
            fuse_all(source)
    found = resolve(source, cache_dir=cache_dir, trust_remote_code=trust_remote_code)
    config = load_config(found.folder, trust_remote_code=trust_remote_code)
    attach(config, stock_type(config))
    state = ModelState.of_checkpoint(TensorIndex.open(found.folder), config, trust_remote_code)
    bits = 8 * state.source.storage_dtype.itemsize
    return _described(state.streamed(), found.origin, bits)


def _described(streamed: StreamedModel, origin: str, bits: int) -> dict[str, Any]:
    outline = outline_of(streamed.model, streamed.anatomy, bits)
    anatomy = streamed.anatomy
    return {
        "origin": origin,
        "class": type(streamed.model).__name__,
        "model_type": anatomy.model_type,
        "family": _family(streamed.model.config, anatomy.model_type),
        "blocks_path": anatomy.blocks_path,
        "blocks": [_block(b) for b in outline.blocks],
        "active_parameters": outline.active_parameters,
        "hidden_size": outline.hidden_size,
        "vocabulary": outline.vocab_size,
        "labels": outline.labels,
        "parameters": outline.parameters,
        "outer_parameters": outline.outer_parameters,
        "bytes": outline.bytes,
        "macs_per_token": outline.macs_per_token,
        "methods": {name: _verdict(name, streamed, outline) for name in METHODS},
    }


def _is_absent(block: BlockOutline, kind: str) -> bool:
    """Whether a sub-layer was removed as a whole."""
    site = block.anatomy.site(kind)
    return site is not None and all(block.linears[n].layer == "absent" for n in site.linears)


def _family(config: Any, kind: str) -> str:
    """Where what is known of the family is from."""
    if kind in FAMILIES:
        return "table"
    return "inferred" if described_family(config, kind) is None else "described"


def _block(block: BlockOutline) -> dict[str, Any]:
    return {
        "path": block.anatomy.path,
        **block.anatomy.widths,
        "head_dim": block.anatomy.head_dim,
        "absent": [name for name, kind in _SUBLAYERS.items() if _is_absent(block, kind)],
        "sites": {
            site.kind: {
                n: [block.linears[n].out_features, block.linears[n].in_features]
                for n in site.linears
            }
            for site in block.anatomy.sites
        },
        "other_parameters": block.other_parameters,
    }


def _verdict(name: str, streamed: StreamedModel, outline: Outline) -> str:
    """Whether a method takes this model: with its default options, or those of its example."""
    try:
        cls = METHODS.get(name)
    except CompressError as error:  # a package that is broken, or that clashes with another
        return f"not usable: {error}"
    method = cls(**cls.example)
    options = ", ".join(f"{key}: {value}" for key, value in cls.example.items())
    try:
        check_kind(streamed.model)
        check_step(method, streamed, outline)
    except CompressError as error:
        return f"not with {options or 'default options'}: {error}"
    found = f"yes, given {options} for example" if options else "yes"
    note = left_alone(method, outline)
    return f"{found}; {note.partition(': ')[2]}" if note else found
