"""What makes stock classes raise where they would fill replaced linears with random numbers.

A factorised linear is stored as two matrices under new names. ``AutoModel…`` refuses such a
checkpoint by its model type; a concrete class (``LlamaForCausalLM.from_pretrained``) does not look
at the type: it would miss ``up_proj.weight``, note that in a log, and go on with a random matrix.
So each replaced linear leaves a *guard*, a tensor of no elements under the name that the stock
class looks for. Its shape fits no linear, and transformers raises on a weight of the wrong size.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from transformers import PreTrainedConfig

from compress.checkpoint.packing import PACKED, storage_format
from compress.checkpoint.records import BlockRecord
from compress.linear.layer import CONVERTED, Experts

SHAPE = (0,)


def guards(record: BlockRecord) -> dict[str, torch.Tensor]:
    """Return the guards of a block, names relative to it.

    A ``Conv1D`` that became a linear leaves its old name free only where it is packed; elsewhere
    the weight itself lies there, transposed.
    """
    found = {}
    # Sorted: a record that was read back from the journal lists its paths in another order.
    for path, spec in sorted(record.modules.items()):
        if isinstance(spec, Experts):
            found |= {f"{path}.{name}": torch.empty(SHAPE) for name in spec.tensors}
            continue
        scheme = record.quantization.get(path)
        packed = scheme is not None and storage_format(scheme) == PACKED
        if spec.kind != CONVERTED or packed:
            found[f"{path}.weight"] = torch.empty(SHAPE)
    return found


def is_guard(name: str, shape: Sequence[int]) -> bool:
    """Whether a stored tensor is a guard, which holds nothing and belongs to no module."""
    return tuple(shape) == SHAPE and name.endswith((".weight", "_proj"))


def guarded(config: PreTrainedConfig) -> set[str]:
    """Return regular expressions of the names that guards of a checkpoint may have.

    They end in the block's number and the path inside it, or the name of an embedding: what comes
    before differs between a model with a head and its backbone.
    """
    names = [*(getattr(config, "compressed_modules", None) or {})]
    names += (getattr(config, "compress", None) or {}).get("embeddings", {})
    return {rf"(^|\.){re.escape(name)}\.(weight|\w+_proj)$" for name in names}
