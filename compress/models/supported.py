"""Which models the toolkit takes at all: one check for live models and for what recipes name."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from compress.errors import CompressError
from compress.linear.quantized import quantized_parts
from compress.models.config_limits import check_one_stack
from compress.models.families import FAMILIES
from compress.models.loading import TASKS


def check_kind(model: PreTrainedModel) -> None:
    """Refuse a kind of model that steps cannot work on; looks at classes and names only.

    Raises:
        CompressError: an encoder with a decoder, or a decoder without the head of a known task.
    """
    kind = model.config.model_type
    check_one_stack(model.config, type(model).__name__)
    ends = tuple(end for end, _ in TASKS)
    adapted = kind in FAMILIES and FAMILIES[kind].blocks is not None
    # An encoder's hidden states are what it is used for (embeddings); a decoder's are half a model.
    decoder = kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    encoder = not decoder or kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    headed = any(cls.__name__.endswith(ends) for cls in type(model).__mro__)
    if not (adapted or encoder or headed):
        raise CompressError(
            "a model with the head of a task (" + ", ".join(f"...{end}" for end in ends) + ")",
            type(model).__name__,
            "A bare decoder predicts nothing: use the class with its head",
        )


def check_not_packed(model: nn.Module) -> None:
    """Refuse a model whose linears hold weights in a packed form that transformers has read.

    Their values are codes; what is changed or saved of them without the table that explains them is
    another model. The toolkit's own live quantised linears carry that table.

    Raises:
        CompressError: naming what to do instead.
    """
    packed = getattr(model.config, "quantization_config", None) is not None
    ours = quantized_parts(model)
    if packed and not ours or getattr(model, "hf_quantizer", None) is not None:
        raise CompressError(
            "a model in floating point, or one that this process has quantised",
            f"a {type(model).__name__} loaded from a quantised checkpoint",
            "Start from the model before its quantisation; to copy the checkpoint, copy its folder "
            "or call model.save_pretrained",
        )


def check_own_weights(model: nn.Module, prefix: str) -> None:
    """Refuse blocks that share weights (Zamba's): blocks are read, changed and written one by one,
    and a file holds one copy of what is shared.

    Args:
        prefix: of the names of everything in blocks ("model.layers.").

    Raises:
        CompressError: naming the weight.
    """

    def holder(name: str) -> str:
        if not name.startswith(prefix):
            return ""
        return f"layer {name.removeprefix(prefix).partition('.')[0]}"

    owners: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = owners.setdefault(id(parameter), name)
        if holder(first) != holder(name):
            raise CompressError(
                "layers with weights of their own",
                f"{name}, which {holder(first) or first} holds too",
                "Give each layer its own: copy.deepcopy the shared one",
            )
