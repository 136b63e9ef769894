"""config.json for compressed models: records of all blocks into a config, and back.

What a stock config can say is said in its own fields. Widths that differ between layers, or that
the stock class cannot express, go to transformers' ``per_layer_config``, which a stock class
refuses; new modules go to a model type of our own, which stock transformers does not know. So a
checkpoint loads as what it is, or fails loudly.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedConfig

from compress.checkpoint.architectures import own_config_class
from compress.checkpoint.embeddings import read_embeddings
from compress.checkpoint.fewer_layers import cut_layers
from compress.checkpoint.records import BlockRecord, module_specs, needs_own_experts
from compress.checkpoint.stock import (
    OWN,
    SECTION_VERSION,
    as_class,
    global_widths,
    layer_widths,
    own_head_dim,
    skeleton,
    stock_config,
)  # fmt: skip
from compress.checkpoint.targets import group_by_value, parse_pattern, target_patterns
from compress.checkpoint.tensors_config import (
    quantization_section,
    read_quantization,
    unpacks_on_load,
)
from compress.errors import CompressError
from compress.linear.grid import QuantScheme
from compress.models.anatomy import anatomy_of, stock_type
from compress.models.families import FAMILIES, Family

# Fields of other names that some classes tie to the width of the residual stream.
_LIKE_HIDDEN = ("word_embed_proj_dim", "embedding_size")


def apply_records(
    config: PreTrainedConfig,
    family: Family,
    records: Sequence[BlockRecord],
    blocks_path: str,
    hidden: int = 0,
    embeddings: Mapping[str, QuantScheme] | None = None,
) -> PreTrainedConfig:
    """Return a copy of ``config`` that describes blocks as the records say.

    Args:
        config: of the model before or after earlier steps; what it says about compression is
            replaced, so the records must be those of all blocks as they are now.
        blocks_path: path of the block list in the model ("model.layers").
        hidden: width of the residual stream; 0 leaves it as the config has it.
        embeddings: path of an embedding or head on a grid -> its scheme; None leaves them as the
            config has them.

    Raises:
        CompressError: another number of blocks than the config has layers (see
            :func:`keep_layers`), or widths that no config can express.
    """
    layers = layer_count(config, family)
    if len(records) != layers:
        raise CompressError(f"records of {layers} blocks", str(len(records)))
    new = stock_config(config)
    own_heads = own_head_dim(config)
    rounded = read_embeddings(config) if embeddings is None else dict(embeddings)
    if hidden and hidden != new.hidden_size:
        own_heads = set_hidden(new, family, hidden)
    per_layer = _set_widths(new, family, [r.widths for r in records])
    modules = {
        f"{index}.{path}": spec.model_dump()
        for index, record in enumerate(records)
        for path, spec in record.modules.items()
    }
    if not needs_own_experts(records):
        modules = {}  # the checkpoint has its experts as the stock class does
    unpack = unpacks_on_load(records, new.model_type)
    if modules or own_heads or rounded or unpack is None:
        new = _own_config(new)
        new.compressed_modules = modules
    section: dict[str, Any] = {"version": SECTION_VERSION}
    if own_heads:
        section["head_dim"] = own_heads
    if rounded:
        section["embeddings"] = {p: s.model_dump() for p, s in sorted(rounded.items())}
    zeros = group_by_value([r.zeros for r in records])
    if zeros:
        section["zeros"] = {
            str(pattern): target_patterns(members, len(records), blocks_path)
            for pattern, members in zeros
        }
    quantization = quantization_section(records, blocks_path, bool(unpack))
    if quantization is not None:
        new.quantization_config = quantization
    if per_layer or modules or zeros or own_heads or rounded:
        new.compress = section
    if per_layer:
        # Last: from here on, reading a field that differs between layers raises.
        new.per_layer_config = per_layer
    return new


def read_records(
    config: PreTrainedConfig,
    family: Family,
    num_blocks: int,
    widths: Sequence[dict[str, int]] | None = None,
) -> list[BlockRecord]:
    """Return the records of all blocks: the inverse of :func:`apply_records`.

    Args:
        widths: of the blocks of the model that the config builds, where there is one; only the
            class knows what it makes of the config's fields. Found out if None.

    Raises:
        CompressError: the config's quantisation was written by another tool.
    """
    modules = module_specs(config, num_blocks)
    if widths is None:
        built = _built_widths(stock_config(config), family)
        widths = [layer_widths(config, family, i, layer) for i, layer in enumerate(built)]
    zeros: list[dict[str, str]] = [{} for _ in range(num_blocks)]
    for pattern, targets in (getattr(config, "compress", None) or {}).get("zeros", {}).items():
        for target in targets:
            for index, path in parse_pattern(target, num_blocks) or []:
                zeros[index][path] = pattern
    section = getattr(config, "quantization_config", None)
    if section is not None and not isinstance(section, dict):
        section = section.to_dict()
    quantization = read_quantization(section, num_blocks) if section else [{}] * num_blocks
    return [
        BlockRecord(
            widths=widths[index],
            modules=modules[index],
            quantization=quantization[index],
            zeros=zeros[index],
        )
        for index in range(num_blocks)
    ]


def keep_layers(
    config: PreTrainedConfig,
    family: Family,
    kept: Sequence[int],
    blocks_path: str,
    records: Sequence[BlockRecord] | None = None,
) -> PreTrainedConfig:
    """Return a copy of ``config`` for a model of only the given layers, renumbered from 0.

    Args:
        kept: indices of the layers that stay, ascending.
        records: of all layers, where they are at hand.

    Raises:
        CompressError: as :func:`cut_layers`.
    """
    new = cut_layers(config, family, kept)
    if records is None:
        records = read_records(config, family, getattr(config, family.layers))
    return apply_records(new, family, [records[i] for i in kept], blocks_path)


def layer_count(config: PreTrainedConfig, family: Family) -> int:
    """Return how many blocks with weights of their own the model has."""
    return 1 if family.shared_blocks else getattr(config, family.layers)


def _built_widths(config: PreTrainedConfig, family: Family) -> list[dict[str, int]]:
    """Return the widths of the blocks that the class builds from a stock config.

    Families of the table keep them in the fields that it names. Any other class may round them, or
    have other kinds of layers among its blocks, so its model is built, without weights.
    """
    if stock_type(config) in FAMILIES:
        return [global_widths(config, family)] * layer_count(config, family)
    return [block.widths for block in anatomy_of(skeleton(config)).blocks]


def _set_widths(
    config: PreTrainedConfig, family: Family, widths: Sequence[dict[str, int]]
) -> dict[int, dict[str, int]]:
    """Set plain fields where they can say it; return the per-layer fields for what they cannot.

    A record that says nothing of a width, or 0, leaves it alone.
    """
    built = _built_widths(config, family)
    before = global_widths(config, family)
    _set_experts(config, family, widths, built)
    per_layer: dict[int, dict[str, int]] = {}

    def changed(key: str) -> list[int]:
        indices = [
            i for i, layer in enumerate(widths) if layer.get(key) and layer[key] != built[i][key]
        ]
        for index in indices:
            if built[index][key] != before[key]:
                raise CompressError(
                    f"blocks as wide as {config.model_type}'s config.json says, to say another "
                    "width there",
                    f"{built[index][key]} ({key}) in block {index} for {before[key]}",
                    "Compress the depth, zeros, rank or precision of this family",
                )
        return indices

    def override(field: str, key: str) -> None:
        for index in changed(key):
            per_layer.setdefault(index, {})[field] = widths[index][key]

    ffn = {layer.get("ffn", 0) for layer in widths}
    if changed("ffn"):
        if len(ffn) == 1:
            setattr(config, family.ffn, ffn.pop())
        else:
            override(family.ffn, "ffn")
    heads = {(layer.get("heads", 0), layer.get("kv_heads", 0)) for layer in widths}
    if not changed("heads") and not changed("kv_heads"):
        return per_layer
    if family.shared_blocks:
        raise CompressError(
            "the number of heads that the config derives the head size from",
            f"fewer in {config.model_type}, whose layers are one and the same",
            "Compress its FFN width, rank or precision",
        )
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // before["heads"]
    if len(heads) == 1 and family.head_dim and _set_heads(config, family, *heads, head_dim):
        return per_layer
    # Rotary embeddings, outside the blocks, would otherwise compute it from the number of heads.
    config.head_dim = head_dim
    if family.kv_heads is None:
        override(family.heads, "heads")
        return per_layer
    # Only the key/value heads are written: some stock configs cannot even be read with a number
    # of heads that differs by layer. The heads follow, since a group is pruned as a unit.
    ratio = before["heads"] // before["kv_heads"]
    wrong = [h for h, kv in heads if h != kv * ratio and h]
    if wrong:
        raise CompressError(
            f"{ratio} heads for every key/value head, as in the original",
            f"a layer of {wrong[0]} heads",
            "Prune key/value heads together with all heads that use them",
        )
    override(family.kv_heads, "kv_heads")
    return per_layer


def _set_experts(
    config: PreTrainedConfig,
    family: Family,
    widths: Sequence[dict[str, int]],
    built: Sequence[dict[str, int]],
) -> None:
    """Set the number of experts that all mixtures of a model have."""
    found = [(w.get("experts", 0), b.get("experts", 0)) for w, b in zip(widths, built, strict=True)]
    counts = {experts for experts, _ in found if experts}
    if all(experts in (0, before) for experts, before in found):
        return
    if len(counts) != 1 or family.experts is None or not hasattr(config, family.experts):
        raise CompressError(
            "one number of experts in all layers, which a field of config.json holds",
            f"{', '.join(map(str, sorted(counts)))} in {config.model_type}",
            "Take as many experts from every layer; of a new family the recipe can name the field "
            "(model.family.experts)",
        )
    setattr(config, family.experts, counts.pop())


def _set_heads(
    config: PreTrainedConfig, family: Family, heads: tuple[int, int], head_dim: int
) -> bool:
    """Set the heads of all layers in plain fields; False where the class would refuse them."""
    trial = copy.copy(config)
    setattr(trial, family.heads, heads[0])
    try:
        trial.validate_architecture()
    except ValueError:
        # LlamaConfig insists that the heads divide the hidden size, even with head_dim given.
        return False
    setattr(config, family.head_dim, head_dim)
    setattr(config, family.heads, heads[0])
    if family.kv_heads is not None:
        setattr(config, family.kv_heads, heads[1])
    return True


def set_hidden(config: PreTrainedConfig, family: Family, hidden: int) -> int:
    """Give the residual stream another width, and heads the size that they have.

    Returns:
        That size where the class would derive another one from the new width (BERT, GPT-2), so that
        its blocks have to be built by ours; else 0.
    """
    before, heads = config.hidden_size, getattr(config, family.heads)
    head_dim = getattr(config, "head_dim", None) or before // heads
    if getattr(config, family.ffn, 0) is None:  # GPT-2's n_inner: four times the width
        setattr(config, family.ffn, 4 * before)
    own = not family.head_dim and heads * head_dim != hidden
    if family.head_dim:
        setattr(config, family.head_dim, head_dim)
    elif own:
        config.head_dim = head_dim
    for field in ("hidden_size", *_LIKE_HIDDEN):
        if getattr(config, field, None) == before:
            setattr(config, field, hidden)
    return head_dim if own else 0


def _own_config(config: PreTrainedConfig) -> PreTrainedConfig:
    new = as_class(own_config_class(config.model_type), config)
    new.architectures = [OWN + name for name in config.architectures or []]
    new._attn_implementation = config._attn_implementation
    return new
