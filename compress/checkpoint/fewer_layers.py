"""config.json of a model of which some layers are left: what tells layers by number follows them,
and what cannot is refused."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedConfig

from compress.checkpoint.stock import skeleton, stock_config, stock_sizes
from compress.errors import CompressError
from compress.models.anatomy import find_blocks, per_layer_lists, stock_type
from compress.models.families import FAMILIES, Family

# Fields that tell layers of another build by their number: how many there are at the start, the
# number of the last one of a build, a list of numbers.
LEADING = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")
_LAST = ("moe_layer_end_index",)
NUMBERED = ("mlp_only_layers", "moe_layers")


def cut_layers(config: PreTrainedConfig, family: Family, kept: Sequence[int]) -> PreTrainedConfig:
    """Return a copy of ``config`` with the given layers, without any record of them.

    Args:
        kept: indices of the layers that stay, ascending.

    Raises:
        CompressError: layers that share their weights, or whose function depends on their number,
            or that the class would not build at their new place as it did at the old one.
    """
    if family.shared_blocks:
        raise CompressError(
            "a model whose layers have weights of their own",
            f"{config.model_type}, which applies one layer many times",
            "Compress its width or precision",
        )
    if getattr(config, "scale_attn_by_inverse_layer_idx", False):
        raise CompressError(
            "layers whose function does not depend on their number",
            "scale_attn_by_inverse_layer_idx in config.json",
            "Compress the width or precision of this model",
        )
    new = stock_sizes(config)
    told_by_number = _renumbered(new, kept)
    for key, value in per_layer_lists(new, getattr(config, family.layers)).items():
        setattr(new, key, [value[i] for i in kept])
    for key, value in told_by_number.items():
        setattr(new, key, value)
    setattr(new, family.layers, len(kept))
    if stock_type(config) not in FAMILIES:
        _check_builds(stock_config(config), stock_config(new), kept)
    return new


def _renumbered(config: PreTrainedConfig, kept: Sequence[int]) -> dict[str, int | list[int]]:
    """What fields that tell layers by their number say of the layers that stay."""
    fields, found = vars(config), {}
    for key in LEADING + _LAST:
        value = fields.get(key)
        if isinstance(value, int):
            last = key in _LAST
            found[key] = sum(i < value + last for i in kept) - last
    for key in NUMBERED:
        value = fields.get(key)
        if isinstance(value, (list, tuple)):
            found[key] = [new for new, old in enumerate(kept) if old in value]
    return found


def _check_builds(before: PreTrainedConfig, after: PreTrainedConfig, kept: Sequence[int]) -> None:
    """Refuse layers that the class builds of other modules at their new place.

    Args:
        before: stock config of all layers.
        after: of those that stay.
        kept: their indices in ``before``.

    Raises:
        CompressError: naming the first one.
    """
    old, fix = _builds(before), "Leave the blocks at the start in (protect_first), or drop others"
    try:
        new = _builds(type(after).from_dict(after.to_dict()))  # as a reader would
    except Exception as error:  # a class may want a number of layers that something divides
        raise CompressError(
            f"a number of layers that {before.model_type} can have", f"{len(kept)}: {error}", fix
        ) from error
    if len(new) != len(kept) or len(old) <= kept[-1]:
        return  # another list of modules is longer, and was taken for the blocks
    for place, index in enumerate(kept):
        if new[place] != old[index]:
            raise CompressError(
                "blocks whose build config.json can still tell when others are gone",
                f"block {index} of {before.model_type}, which would be block {place}, and is built "
                "of other modules there",
                fix,
            )


def _builds(config: PreTrainedConfig) -> list[list[tuple[str, str]]]:
    """Of each block that the class builds from a stock config: path and class of every module, path
    of every tensor."""
    blocks = find_blocks(skeleton(config))[1]
    return [
        [(name, type(module).__name__) for name, module in block.named_modules()]
        + [(name, "") for name in block.state_dict()]
        for block in blocks
    ]
