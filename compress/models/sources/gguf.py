"""GGUF files (llama.cpp) as Hugging Face folders: dequantised to float32 safetensors, once.

transformers reads the format: it undoes llama.cpp's permutation of query and key rows, maps names
and metadata, and builds the tokenizer. What it returns refuses to be saved, since it counts as
quantised; the weights are plain float32 by then, so they are moved into a model of the same class
that carries no such mark.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch

from compress.errors import CompressError
from compress.system.tensors import check_finite

MAGIC = b"GGUF"
ROPE_PARAMETERS = "compress.rope_parameters"  # JSON, in files that `compress export` has written
_ROPE_FACTORS = "rope_freqs.weight"
# factor of llama3's rotary frequencies in Llama 3.1, in 3.2; the rest is the same in both.
_LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_LLAMA3_FACTORS = (8.0, 32.0)


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
    _set_rope(model.config, path)
    for name, parameter in model.named_parameters():
        check_finite(name, parameter.detach(), where=path.name)
    _unmarked(model).save_pretrained(target)
    tokenizer.save_pretrained(target)


def _set_rope(config: Any, path: Path) -> None:
    """Give a config the scaled rotary frequencies of the file, which transformers does not read.

    Raises:
        CompressError: frequencies that no known parameters make.
    """
    from gguf import GGUFReader

    reader = GGUFReader(path)
    theta = (getattr(config, "rope_parameters", None) or {}).get("rope_theta", 10_000.0)
    arch = reader.fields["general.architecture"].contents()
    found: dict[str, Any] | None = None
    if ROPE_PARAMETERS in reader.fields:
        found = json.loads(reader.fields[ROPE_PARAMETERS].contents())
    elif any(tensor.name == _ROPE_FACTORS for tensor in reader.tensors):
        found = _llama3(config, theta, reader)
    elif (kind := reader.fields.get(f"{arch}.rope.scaling.type")) and kind.contents() == "linear":
        factor = reader.fields[f"{arch}.rope.scaling.factor"].contents()
        found = {"rope_type": "linear", "factor": float(factor), "rope_theta": theta}
    if found is not None:
        config.rope_parameters = found


def _llama3(config: Any, theta: float, reader: Any) -> dict[str, Any]:
    """The parameters that make a file's factors on the frequencies."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    stored = next(t.data for t in reader.tensors if t.name == _ROPE_FACTORS)
    trial = copy.deepcopy(config)
    plain = 1.0 / theta ** (torch.arange(0, 2 * len(stored), 2).float() / (2 * len(stored)))
    for factor in _LLAMA3_FACTORS:
        made = {"rope_type": "llama3", "rope_theta": theta, "factor": factor, **_LLAMA3}
        trial.rope_parameters = made
        frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](trial, "cpu")
        if torch.allclose(plain / frequencies, torch.tensor(stored), rtol=1e-3):
            return made
    raise CompressError(
        "rotary frequencies of Llama 3.1 or 3.2, where a GGUF file has its own",
        f"others in {_ROPE_FACTORS}",
        "Use the checkpoint in safetensors that the file was made from",
    )


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
