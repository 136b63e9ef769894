"""From the fields in a recipe to a model of random weights, with the mistakes found by name."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
)

from compress.errors import CompressError, did_you_mean
from compress.models.config_limits import check_layers, check_numbers
from compress.models.heads import Head, Task
from compress.models.images import reads_images
from compress.models.loading import load_config
from compress.models.positions import positions_of
from compress.system.intake import reason
from compress.train.create.spec import SPECIAL, TrainSpec

_POOLER = re.compile(r"\.pooler\.")  # of BERT and its kin: no part of a masked language model
_TRAINED = 16  # bytes a parameter: float32 weight, gradient and two moments of Adam

# Fields that follow from the tokenizer or the codebook and the objective.
# What a model of each objective is built as, and the config classes that there is such a model of.
_BUILT = {
    "causal": (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING),
    "masked": (AutoModelForMaskedLM, MODEL_FOR_MASKED_LM_MAPPING),
    "labels": (AutoModelForSequenceClassification, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING),
}
# The same of the heads that a checkpoint's model can be given.
_HEADED: dict[Task, tuple[Any, Any]] = {
    "sequence": (AutoModelForSequenceClassification, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING),
    "token": (AutoModelForTokenClassification, MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING),
    "image": (AutoModelForImageClassification, MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING),
}
_NAMES = {
    "causal": "causal language model", "masked": "masked language model", "labels": "head of labels"
}  # fmt: skip
_OURS = ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id", "is_causal",
         "masked_generation", "architectures", "transformers_version", "num_labels", "id2label",
         "label2id", "problem_type")  # fmt: skip


def build_config(spec: TrainSpec, head: Head | None = None) -> PreTrainedConfig:
    """The configuration of a model from scratch.

    A causal model type under a masked objective becomes bidirectional: ``is_causal=False``, which
    transformers' masks respect and checkpoints keep.

    Args:
        head: of labels, where these are learned.

    Raises:
        CompressError: labels of words; an unknown model type or field (with the closest known), a
            value that the config refuses, or fewer positions than tokens a sequence.
    """
    where = "model.train.architecture"
    if head is not None and head.task != "sequence":
        raise CompressError(
            "labels of texts, to train a model from scratch on", f"labels of a {head.task}",
            "Give a checkpoint the head: model.train.from", where=where,
        )  # fmt: skip
    fields = dict(spec.architecture or {})
    kind = fields.pop("model_type")
    if kind not in CONFIG_MAPPING:
        raise CompressError(
            "a model type that transformers knows", repr(kind),
            did_you_mean(kind, sorted(CONFIG_MAPPING)), where=where,
        )  # fmt: skip
    config_class = CONFIG_MAPPING[kind]
    _check_fields(config_class, fields, where)
    masked = spec.objective.kind == "masked"
    known = config_class in _BUILT[spec.objective.kind][1]
    if not known and not (masked and config_class in MODEL_FOR_CAUSAL_LM_MAPPING):
        raise CompressError(
            f"a model type with a {_NAMES[spec.objective.kind]}", repr(kind),
            "Choose another model type, such as bert (masked, labels) or llama (all)", where=where,
        )  # fmt: skip
    check_numbers({"model_type": kind, **fields}, where)
    try:
        labels = {} if head is None else head.fields()
        config = config_class(**fields, **_token_fields(spec), **labels)
        check_layers(config, 0)
        _check_memory(config, spec.objective.kind)
    except CompressError as error:
        raise error.within(where) from None
    except Exception as error:  # configs and classes check themselves with errors of many types
        raise CompressError(
            f"a valid {kind} config", reason(error), "Correct it", where=where
        ) from error
    if masked and not known:
        config.is_causal = False
    positions = positions_of(config)
    if spec.length is not None and positions and spec.length > positions:
        raise CompressError(
            f"model.train.length of at most {positions}, the model's positions", str(spec.length),
            "Lower it or raise max_position_embeddings", where=where,
        )  # fmt: skip
    return config


def _check_fields(config_class: type, fields: dict[str, Any], where: str) -> None:
    known = {f.name for f in dataclasses.fields(config_class)} | set(config_class.attribute_map)
    for name in fields:
        if name in _OURS:
            raise CompressError(
                "fields that shape the model", f"{name!r}, which follows from the tokenizer, the "
                "images or the objective", "Leave it out", where=where,
            )  # fmt: skip
        if name not in known:
            raise CompressError(
                f"known fields of {config_class.__name__} only", repr(name),
                did_you_mean(name, sorted(known - set(_OURS))), where=where,
            )  # fmt: skip


def _token_fields(spec: TrainSpec) -> dict[str, Any]:
    size = spec.vocabulary
    if spec.images is not None:
        return {"vocab_size": size, **dict.fromkeys(("pad_token_id", "bos_token_id",
                                                     "eos_token_id"))}  # fmt: skip
    pad, end = size - len(SPECIAL), size - len(SPECIAL) + 1
    return {"vocab_size": size, "pad_token_id": pad, "bos_token_id": end, "eos_token_id": end}


def _auto(config: PreTrainedConfig, kind: str) -> Any:
    """The auto class that builds a model for an objective."""
    if kind == "labels" and reads_images(config):
        return AutoModelForImageClassification
    auto, known = _BUILT[kind]
    return auto if type(config) in known else AutoModelForCausalLM


def _check_memory(config: PreTrainedConfig, kind: str) -> None:
    """Refuse a model whose training this machine has no memory for, however little is free now."""
    auto = _auto(config, kind)
    with torch.device("meta"):
        model = auto.from_config(config, dtype=torch.float32)
    parameters = sum(p.numel() for p in model.parameters())
    total = psutil.virtual_memory().total
    if _TRAINED * parameters > total:
        raise CompressError(
            f"a model that can be trained in {total / 1e9:.1f} GB, the memory of this machine",
            f"{parameters:,} parameters, which take {_TRAINED * parameters / 1e9:,.1f} GB",
            "Make it smaller",
        )  # fmt: skip


def build_model(config: PreTrainedConfig, kind: str, seed: int) -> PreTrainedModel:
    """A model of random weights in float32 for an objective; the same one for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _auto(config, kind).from_config(config, dtype=torch.float32)


def headed_config(folder: Path, head: Head, tokenizer: Any = None) -> PreTrainedConfig:
    """The config of a checkpoint, with a head of labels in the place of the one it has or lacks.

    Raises:
        CompressError: a model type without such a head.
    """
    config = load_config(folder)
    if type(config) not in _HEADED[head.task][1]:
        raise CompressError(
            f"a model type with a head for labels of a {head.task}", repr(config.model_type),
            "Fine-tune another model", where="model.train.from",
        )  # fmt: skip
    for name, value in head.fields().items():
        setattr(config, name, value)
    if head.task != "image" and config.pad_token_id is None and tokenizer is not None:
        # Decoders answer at the last token that is no padding.
        if tokenizer.pad_token_id is None:
            raise CompressError(
                "a tokenizer with a padding token, since examples differ in length", "none",
                "Give it one (pad_token in tokenizer_config.json)", where="model.train.from",
            )  # fmt: skip
        config.pad_token_id = tokenizer.pad_token_id
    return config


def headed_model(
    folder: Path, config: PreTrainedConfig, seed: int, task: Task = "sequence"
) -> PreTrainedModel:
    """A checkpoint's model in float32 with the head that ``config`` describes.

    What the checkpoint has of that head it brings along; the rest is drawn at random, the same for
    the same seed.

    Raises:
        CompressError: weights inside the model itself are missing or of another shape.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, report = _HEADED[task][0].from_pretrained(
            folder, config=config, dtype=torch.float32, use_safetensors=True, local_files_only=True,
            output_loading_info=True, ignore_mismatched_sizes=True,
        )  # fmt: skip
    wrong = {*report["missing_keys"], *(item[0] for item in report["mismatched_keys"])}
    prefix = f"{model.base_model_prefix}."
    lacking = sorted(n for n in wrong if n.startswith(prefix) and not _POOLER.search(n))
    if lacking:
        raise CompressError(
            f"all weights of a {config.model_type} in {folder}",
            f"{len(lacking)} missing or of another shape: {', '.join(lacking[:3])}",
            "Its config and weights are of two different models",
        )  # fmt: skip
    return model
