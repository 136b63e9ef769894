"""Load configuration, model and tokenizer from a folder, or say in one paragraph why not."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from compress.errors import CompressError, did_you_mean
from compress.linear.packed import packed_weights
from compress.models.config_limits import check_layers, check_numbers, check_one_stack
from compress.models.leftovers import unused_weights
from compress.models.sections import check_sections
from compress.models.side_files import VOCABULARIES
from compress.system.intake import read_json, reason
from compress.system.tensors import TensorIndex, check_finite
from compress.system.tensors_header import INDEX, SINGLE

# The end of an architecture's name gives the task; the first that matches is taken.
TASKS: tuple[tuple[str, type], ...] = (
    ("ForCausalLM", AutoModelForCausalLM),
    ("LMHeadModel", AutoModelForCausalLM),
    ("ForMaskedLM", AutoModelForMaskedLM),
    ("ForSequenceClassification", AutoModelForSequenceClassification),
    ("ForTokenClassification", AutoModelForTokenClassification),
    ("ForImageClassification", AutoModelForImageClassification),
    ("ForImageClassificationWithTeacher", AutoModelForImageClassification),
)

_ALLOW = "If you trust that code, allow it in the recipe: model: {source: ..., %s}"
_ALLOW %= "trust_remote_code: true"


def load_config(
    folder: str | os.PathLike[str], *, trust_remote_code: bool = False
) -> PreTrainedConfig:
    """Load the configuration of a model folder.

    Raises:
        CompressError: no config.json, one that does not parse, a model type that transformers does
            not know, or code of the checkpoint's own that the recipe does not allow.
    """
    folder = Path(folder)
    fields = read_config(folder)
    weights = fields.get("transformers_weights")
    if weights not in (None, SINGLE, INDEX):
        raise CompressError(
            f"weights in {SINGLE}, or in shards with {INDEX}", f"transformers_weights: {weights!r}",
            "Two readers of this folder would see two models: give the file that name and remove "
            "the field", where=str(folder / "config.json"),
        )  # fmt: skip
    kind = fields.get("model_type")
    if not isinstance(kind, str):
        raise CompressError(
            f"a model_type in {folder / 'config.json'}", "none",
            "Add the model's type (as in the config of the model it was made from)",
        )  # fmt: skip
    if kind not in CONFIG_MAPPING and not trust_remote_code:
        if "auto_map" in fields:
            raise CompressError(
                "a model of a type that transformers has",
                f"{kind!r}, which runs Python code that comes with the checkpoint ({folder})",
                _ALLOW,
            )
        raise CompressError(
            f"a model type that transformers knows in {folder / 'config.json'}", repr(kind),
            _closest_type(kind),
        )  # fmt: skip
    check_numbers(fields, str(folder / "config.json"))
    try:
        config = AutoConfig.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except Exception as error:  # configs validate themselves with errors of many types
        raise CompressError(
            f"a valid {kind} config in {folder}", reason(error),
            "Fetch config.json again, or correct the field",
        ) from error  # fmt: skip
    check_sections(fields, getattr(config, "num_hidden_layers", None), str(folder / "config.json"))
    return config


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder as a dict; a CompressError if there is none or it does not parse."""
    path = folder / "config.json"
    if not path.is_file():
        weights = any(folder.glob("*.safetensors"))
        raise CompressError(
            f"config.json in {folder}", "weights without it" if weights else "none",
            "Fetch the config that belongs to the weights"
            if weights else "Give the folder of a transformers checkpoint",
        )  # fmt: skip
    fields = read_json(path, f"JSON in {path}", "Fetch this file again")
    if not isinstance(fields, dict):
        raise CompressError(f"a JSON object in {path}", type(fields).__name__)
    return fields


def auto_class(config: PreTrainedConfig) -> type:
    """The Auto class for the task that ``config.architectures`` names.

    Raises:
        CompressError: no architecture, one of a task that the toolkit does not handle, or an
            encoder with a decoder.
    """
    named = getattr(config, "architectures", None) or []
    if not isinstance(named, list | tuple):
        raise CompressError("architectures in config.json to be a list of names", f"{named!r:.80}")
    for architecture in named:
        if not str(architecture).endswith(("ForCausalLM", "LMHeadModel")):  # decoders by themselves
            check_one_stack(config, str(architecture))
        for end, cls in TASKS:
            if isinstance(architecture, str) and architecture.endswith(end):
                return cls
    raise CompressError(
        "architectures in config.json to name a model of a known task ("
        + ", ".join(f"...{end}" for end, _ in TASKS) + ")",
        ", ".join(map(repr, named)) or "none",
        "A bare encoder has no output to compare: use the checkpoint with its head",
    )  # fmt: skip


def load_model(
    source: Any,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
    packed: bool = True,
) -> PreTrainedModel:
    """Load a model in evaluation mode from a folder or a resolved source.

    Args:
        source: a folder, or anything with a ``folder``.
        dtype: the type of its floating-point weights.
        device: where to put it.
        trust_remote_code: allow code that comes with the checkpoint.
        packed: keep quantised weights packed and compute from them, where the device is a CPU
            (from which a model may be moved, see docs/runtime.md); else they are unpacked as
            transformers does it.

    Raises:
        CompressError: as :func:`load_config`, :func:`auto_class` and ``TensorIndex.open``; also
            weights that the checkpoint lacks (transformers would make them up at random), of
            another shape, not finite, or of a part of the model that the config does not have.
    """
    folder = Path(getattr(source, "folder", source))
    config = load_config(folder, trust_remote_code=trust_remote_code)
    cls = auto_class(config)
    check_layers(config, len(TensorIndex.open(folder)))
    try:
        with packed_weights(packed and torch.device(device).type == "cpu"):
            model, report = cls.from_pretrained(
                folder, config=config, dtype=dtype, trust_remote_code=trust_remote_code,
                use_safetensors=True, local_files_only=True, output_loading_info=True,
                # They come back in the report, by name, and are refused.
                ignore_mismatched_sizes=True,
            )  # fmt: skip
    except (CompressError, MemoryError):  # they say what is wrong themselves
        raise
    except Exception as error:  # models raise whatever they hit, those of a checkpoint's code too
        raise _not_loaded(folder, error, trust_remote_code and _has_code(config, cls)) from error
    _check_loaded(folder, sorted(report["missing_keys"]), report)
    unused = unused_weights(model, sorted(report["unexpected_keys"]))
    if unused:
        warnings.warn(
            f"{len(unused)} weights in {folder} belong to no part of a {type(model).__name__} and "
            f"are left out ({', '.join(unused[:3])})",
            stacklevel=2,
        )
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not parameter.is_meta:
            check_finite(name, parameter.detach(), where=str(folder))
    return model.to(device).eval()


def _has_code(config: PreTrainedConfig, cls: type) -> bool:
    """Whether the model's class, or that of its config, is code that comes with the checkpoint."""
    named = getattr(config, "auto_map", None) or {}
    return cls.__name__ in named or type(config).__module__.startswith("transformers_modules")


def _not_loaded(folder: Path, error: Exception, own_code: bool) -> CompressError:
    if not own_code:
        return CompressError(
            f"a checkpoint that loads from {folder}", reason(error),
            "The config and the weights may be of two different models",
        )  # fmt: skip
    return CompressError(
        f"a checkpoint that loads from {folder} by the Python code that comes with it",
        reason(error),
        "The code may be for another version of transformers, or the config and the weights of "
        "two different models",
    )


def _check_loaded(folder: Path, missing: list[str], report: dict[str, Any]) -> None:
    mismatched = sorted(str(item[0]) for item in report["mismatched_keys"])
    if missing or mismatched:
        names = missing or mismatched
        raise CompressError(
            f"every weight of the model in {folder}",
            f"{len(names)} {'missing' if missing else 'of another shape'}: "
            + ", ".join(names[:3]) + (" ..." if len(names) > 3 else ""),
            "The config and the weights are of two different models, or the head was not saved",
        )  # fmt: skip


def load_tokenizer(
    folder: str | os.PathLike[str], *, trust_remote_code: bool = False
) -> tuple[PreTrainedTokenizerBase | None, str]:
    """Load the tokenizer of a folder: (tokenizer, ""), or (None, why there is none)."""
    folder = Path(folder)
    # Without a vocabulary, AutoTokenizer may invent a tokenizer of five tokens.
    if not any(path.is_file() for pattern in VOCABULARIES for path in folder.glob(pattern)):
        return None, f"{folder} holds no tokenizer ({', '.join(VOCABULARIES[:4])}, ...)"
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except Exception as error:  # tokenizers raise bare Exceptions from their native code
        return None, f"the tokenizer in {folder} does not load ({reason(error)})"
    return tokenizer, ""


def _closest_type(kind: str) -> str:
    import importlib.metadata

    close = did_you_mean(kind, list(CONFIG_MAPPING))
    version = importlib.metadata.version("transformers")
    help_ = f"transformers {version} has no such type: a newer one may"
    return f"{close} {help_}" if close.startswith("Did") else help_
