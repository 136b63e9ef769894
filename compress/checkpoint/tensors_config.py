"""The ``quantization_config`` of config.json: block records to compressed-tensors and back."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from compress.checkpoint.packing import PACKED, storage_format
from compress.checkpoint.records import BlockRecord
from compress.checkpoint.targets import group_by_value, parse_pattern, target_patterns
from compress.errors import CompressError
from compress.linear.grid import QuantScheme

_MIXED = "mixed-precision"

# Model types whose stock class, when it loads, touches ``weight`` of linears that hold packed ones.
_INITIALISES_CHILDREN = frozenset({"modernbert"})


def quantization_section(
    records: Sequence[BlockRecord], blocks_path: str, dense_on_load: bool = False
) -> dict[str, Any] | None:
    """Return the section for the records of all blocks, or None where nothing is quantised.

    One config group a scheme. Linears that are quantised in some blocks only are listed under
    ``ignore`` for the others, for readers that want every linear accounted for.

    Args:
        blocks_path: path of the block list in the model.
        dense_on_load: let transformers unpack the weights while it loads (see
            :func:`unpacks_on_load`).
    """
    groups = group_by_value([r.quantization for r in records])
    if not groups:
        return None
    count = len(records)
    config_groups: dict[str, Any] = {}
    formats = []
    for number, (scheme, members) in enumerate(groups):
        formats.append(storage_format(scheme))
        config_groups[f"group_{number}"] = {
            "targets": target_patterns(members, count, blocks_path),
            "format": formats[-1],
            **_scheme_to_args(scheme),
        }
    paths = {path for record in records for path in record.quantization}
    left_out = [
        (index, path)
        for index, record in enumerate(records)
        for path in sorted(paths - set(record.quantization))
    ]
    section = {
        "quant_method": "compressed-tensors",
        "format": formats[0] if len(set(formats)) == 1 else _MIXED,
        "quantization_status": "compressed",
        "config_groups": config_groups,
        "ignore": ["lm_head", *target_patterns(left_out, count, blocks_path)],
        "kv_cache_scheme": None,
    }
    if dense_on_load:
        section["dequantize"] = True
    return section


def unpacks_on_load(records: Sequence[BlockRecord], model_type: str) -> bool | None:
    """Say whether stock transformers must unpack the weights while it loads them.

    By default it loads packed weights as they are and unpacks at the first forward, which fails
    where zero points are packed (compressed-tensors 0.20 expects them unpacked in the empty model)
    and in classes that initialise weights which packed linears lack. Its other way, ``dequantize``,
    reads one scheme a checkpoint, weights only.

    Returns:
        False: the default way works. True: the other way is needed, and works. None: neither works
        in the stock class, and only in a class of our own does the default way.

    Raises:
        CompressError: as :func:`check_schemes`.
    """
    schemes = {s for record in records for s in record.quantization.values()}
    check_schemes(schemes)
    packed = {s for s in schemes if storage_format(s) == PACKED}
    asymmetric = any(not s.symmetric for s in packed)
    if not asymmetric and (not packed or model_type not in _INITIALISES_CHILDREN):
        return False
    if len(schemes) == 1 and packed.pop().activation_bits is None:
        return True
    return None


def check_schemes(schemes: Collection[QuantScheme]) -> None:
    """Refuse schemes that no one checkpoint can have, whatever linears they are of.

    Raises:
        CompressError: asymmetric weights among several schemes (see :func:`unpacks_on_load`).
    """
    different = set(schemes)
    if len(different) > 1 and any(not s.symmetric for s in different):
        raise CompressError(
            "one scheme for all quantised linears where weights have zero points",
            f"{len(different)} schemes ({'; '.join(sorted(map(_in_words, different)))})",
            "Use symmetric weights, which any mixture of schemes may have",
        )


def _in_words(scheme: QuantScheme) -> str:
    options = scheme.model_dump(exclude_none=True, exclude={"bits"}).items()
    return ", ".join((f"{scheme.bits} bits", *(f"{k} {v}".lower() for k, v in options)))


def read_quantization(section: dict[str, Any], num_blocks: int) -> list[dict[str, QuantScheme]]:
    """Return {path: scheme} for every block: the inverse of :func:`quantization_section`.

    Raises:
        CompressError: the section was written by another tool, whose targets or number formats
            this toolkit does not follow.
    """
    blocks: list[dict[str, QuantScheme]] = [{} for _ in range(num_blocks)]
    if section.get("quant_method") != "compressed-tensors":
        raise _foreign(f"quant_method {section.get('quant_method')!r}")
    for group in section.get("config_groups", {}).values():
        scheme = _args_to_scheme(group)
        for target in group["targets"]:
            members = parse_pattern(target, num_blocks)
            if members is None or any(index >= num_blocks for index, _ in members):
                raise _foreign(f"the target {target!r}")
            for index, path in members:
                blocks[index][path] = scheme
    return blocks


def _scheme_to_args(scheme: QuantScheme) -> dict[str, Any]:
    weights = {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "channel" if scheme.group_size is None else "group",
        "group_size": scheme.group_size,
        "actorder": "weight" if scheme.actorder else None,
        "dynamic": False,
    }
    activations = None
    if scheme.activation_bits is not None:
        activations = {
            "num_bits": scheme.activation_bits,
            "type": "int",
            "symmetric": True,
            "strategy": "token",
            "dynamic": True,
        }
    return {"weights": weights, "input_activations": activations, "output_activations": None}


def _args_to_scheme(group: dict[str, Any]) -> QuantScheme:
    weights, activations = group.get("weights") or {}, group.get("input_activations")
    known = (
        weights.get("type") == "int"
        and weights.get("strategy") in ("group", "channel")
        and (activations is None or activations.get("strategy") == "token")
    )
    if not known:
        raise _foreign(f"weights {weights} with activations {activations}")
    return QuantScheme(
        bits=weights["num_bits"],
        group_size=weights.get("group_size") if weights["strategy"] == "group" else None,
        symmetric=weights.get("symmetric", True),
        actorder=weights.get("actorder") is not None,
        activation_bits=activations["num_bits"] if activations else None,
    )


def _foreign(got: str) -> CompressError:
    return CompressError(
        "a quantised checkpoint that this toolkit wrote",
        got,
        "Start from the unquantised model",
    )
