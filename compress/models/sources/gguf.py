"""GGUF files (llama.cpp) as Hugging Face folders: dequantised to float32 safetensors, once.

transformers reads the format: it undoes llama.cpp's permutation of query and key rows, maps names
and metadata, and builds the tokenizer. What it returns refuses to be saved, since it counts as
quantised; the weights are plain float32 by then, so they are moved into a model of the same class
that carries no such mark.
"""

from __future__ import annotations

from pathlib import Path

import torch

from compress.errors import CompressError
from compress.system.tensors import check_finite

MAGIC = b"GGUF"


def is_gguf(path: Path) -> bool:
    """Whether the file starts as a GGUF does."""
    with path.open("rb") as file:
        return file.read(4) == MAGIC


def describe_gguf(path: Path) -> str:
    """What a GGUF file holds, in a clause: the type of most of its weights, and their mean size."""
    from gguf import GGUFReader

    weights: dict[str, int] = {}
    size = 0
    for tensor in GGUFReader(path).tensors:
        name = tensor.tensor_type.name
        weights[name] = weights.get(name, 0) + int(tensor.n_elements)
        size += int(tensor.n_bytes)
    if not weights:
        return "GGUF"
    bits = 8 * size / sum(weights.values())
    return f"GGUF, mostly {max(weights, key=weights.get)}, {bits:.2g} bits per weight"


def gguf_to_folder(path: Path, target: Path) -> None:
    """Write the model, its generation config and its tokenizer (chat template kept) to ``target``.

    The weights are those that the quantised file stands for; nothing of the rounding is undone.
    Peak memory is one float32 copy of the model plus one tensor.

    Raises:
        CompressError: no GGUF file, a truncated one, one that lacks weights, one whose architecture
            transformers cannot read, or one that holds no text model.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not is_gguf(path):
        raise CompressError(
            "a GGUF file", f"{path.name}, which does not start as one", "Fetch it again"
        )
    _require_reader()
    folder = str(path.parent)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=path.name, dtype=torch.float32, local_files_only=True,
            output_loading_info=True,
        )  # fmt: skip
        tokenizer = AutoTokenizer.from_pretrained(
            folder, gguf_file=path.name, local_files_only=True
        )
    except Exception as error:  # the reader lets out whatever its parsing runs into
        raise CompressError(
            f"a whole GGUF file of a language model that transformers can read in {path.name}",
            f"{type(error).__name__}: {error}",
            "Fetch it again, or use the checkpoint in safetensors that it was made from",
        ) from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise CompressError(
            f"every weight of a {type(model).__name__} in {path.name}",
            f"none for {len(missing)} of them, {missing[0]} first",
            "The file is incomplete, or of an architecture that transformers does not read whole: "
            "use the checkpoint in safetensors that it was made from",
        )
    for name, parameter in model.named_parameters():
        check_finite(name, parameter.detach(), where=path.name)
    _unmarked(model).save_pretrained(target)
    tokenizer.save_pretrained(target)


def _unmarked(model: torch.nn.Module) -> torch.nn.Module:
    """The same weights in a fresh model of the same class whose config has no quantisation."""
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):  # its own random weights would cost time and a second copy
        fresh = type(model)(config)
    fresh.load_state_dict(model.state_dict(), assign=True)
    fresh.tie_weights()
    fresh.generation_config = model.generation_config
    return fresh


def _require_reader() -> None:
    import importlib.util

    if importlib.util.find_spec("gguf") is None:
        raise CompressError(
            "the package gguf, which reads GGUF files", "a Python without it", "pip install gguf"
        )
