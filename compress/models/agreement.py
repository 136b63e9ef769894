"""What a config promises against what the headers of its checkpoint say."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from compress.errors import CompressError
from compress.linear.quantized import scheme_of
from compress.system.tensors import TensorIndex


def check_shapes(index: TensorIndex, stored: Mapping[str, str], model: nn.Module) -> None:
    """Compare shapes and kinds of numbers, before anything is read.

    Args:
        stored: the model's names -> the checkpoint's.
        model: as the config builds it (meta).

    Raises:
        CompressError: naming the first tensor that differs.
    """
    quantised = {n for n, m in model.named_modules() if scheme_of(m) is not None}
    for name, promised in model.state_dict().items():
        found = stored.get(name)
        # Codes and grids have shapes of their own, which unpacking checks.
        if found is None or name.rpartition(".")[0] in quantised:
            continue
        shape, dtype = index.shape(found), index.dtype(found)
        if promised.is_floating_point() and not dtype.is_floating_point:
            raise CompressError(
                f"{found} as floating-point numbers", f"{dtype} in {index.file(found)}",
                "A quantised checkpoint says so in config.json (quantization_config): fetch its "
                "config again, or use the unquantised checkpoint",
            )  # fmt: skip
        if tuple(promised.shape) != shape:
            raise CompressError(
                f"{found} of shape {list(promised.shape)}, as config.json promises",
                f"{list(shape)} in {index.file(found)}",
                "The config and the weights belong to different models",
            )


def check_ties(index: TensorIndex, stored: Mapping[str, str], tied: Mapping[str, str]) -> None:
    """Refuse tied tensors that are stored twice and differ: readers would see two models.

    Args:
        stored: the model's names -> the checkpoint's.
        tied: name -> the name that it is tied to.

    Raises:
        CompressError: naming both.
    """
    for name, source in tied.items():
        one, other = stored.get(name), stored.get(source)
        if one and other and not index.same(one, other):
            raise CompressError(
                f"{one} to be {other}, as config.json ties them", "two different tensors",
                "Set tie_word_embeddings: false in config.json if the model was trained with two, "
                "or remove one from the file",
            )  # fmt: skip
