"""What a plan checks beyond its steps: data, tasks and lengths, all without weights.

A run plans first, so what is refused here is refused before any work. What only the network or the
content of a file can tell becomes a warning, or is told when the run reads its texts.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from compress.data.calibration import check_kind, check_length
from compress.data.calibration_spec import CalibrationSpec
from compress.data.catalog import canonical, find
from compress.data.codebook import load_codebook
from compress.data.examples import Examples
from compress.data.examples_spec import ExamplesSpec
from compress.data.given import GivenText
from compress.data.images import DIGITS, ImageSpec, check_images
from compress.data.labelled import check_reader, example_length
from compress.data.pictures import image_place
from compress.data.processor import FILE, ImageProcessor
from compress.data.readers import expand, is_file_source, read_python_module
from compress.data.text import TextSpec
from compress.data.tokens import check_tokenizer
from compress.errors import CompressError
from compress.eval import EvaluationSpec
from compress.models.anatomy import find_blocks
from compress.models.heads import Head, head_of
from compress.models.images import reads_images
from compress.models.positions import positions_of
from compress.models.sources.source import load_tokenizer
from compress.planning.evaluation_material import check_objective
from compress.planning.recipe import Recipe, split_evaluation
from compress.system.intake import user_path

_PLAIN = (".txt", ".md", ".rst", ".raw", ".jsonl", ".json", ".csv", ".tsv")  # bytes bound tokens
_HUB_SECONDS = 3.0


def check_inputs(
    recipe: Recipe, folder: Path, model: nn.Module, data_root: str | Path | None
) -> tuple[str, ...]:
    """Check the data, tasks and lengths that a recipe names against a model's headers.

    Args:
        folder: of the checkpoint, with its tokenizer or codebook.
        model: on the meta device.
        data_root: folder with local copies of data sets.

    Returns:
        Warnings, as sentences.

    Raises:
        CompressError: naming the part of the recipe.
    """
    check_data_root(data_root)
    found: list[str] = []
    reader = None
    trained = recipe.model.train
    if trained is not None:  # its tokenizer is made when it is trained
        found += _source(trained.text, trained.images, data_root, "model.train", trained.examples)
        if trained.examples is not None:
            _in_part("model.train", example_length, trained.length, model.config)
    elif recipe.calibration is not None or recipe.evaluation is not None:
        reader = reader_of(folder, recipe.model.trust_remote_code)
    if recipe.calibration is not None:
        found += _calibration(recipe.calibration, reader, model.config, data_root)
    if recipe.evaluation is not None:
        text, spec = split_evaluation(recipe.evaluation)
        found += check_evaluation(text, spec, reader, model, data_root, timed=bool(recipe.steps))
    return tuple(dict.fromkeys(found))


def check_data_root(data_root: str | Path | None) -> None:
    """Refuse a data root that is no folder.

    Raises:
        CompressError: naming it.
    """
    if data_root is not None and not user_path(data_root, "a data root").is_dir():
        raise CompressError("an existing folder as data root", repr(str(data_root)))


def reader_of(folder: Path, trust_remote_code: bool) -> Any:
    """The tokenizer, the codebook or the image processor beside a model.

    Raises:
        CompressError: there is none of them.
    """
    reader, reason = find_reader(folder, trust_remote_code)
    if reader is None:
        raise CompressError(
            f"a tokenizer beside the weights, to read texts with, or {FILE}, to read images with",
            reason, "Put the model's own into its folder",
        )  # fmt: skip
    return reader


def find_reader(folder: Path, trust_remote_code: bool) -> tuple[Any, str]:
    """(The tokenizer, the codebook or the image processor beside a model, ""), or (None, why there
    is none)."""
    tokenizer, reason = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    if tokenizer is not None:
        return tokenizer, reason
    return load_codebook(folder) or ImageProcessor.of_folder(folder), reason


def _calibration(
    spec: CalibrationSpec, reader: Any, config: PreTrainedConfig, data_root: Any
) -> list[str]:
    check_length(spec, config)
    if reader is not None:
        check_kind(spec, reader)
        if spec.images is None and not isinstance(reader, ImageProcessor):
            check_tokenizer(reader, config)
    if spec.examples is not None:
        _require_head(head_of(config), config, "calibration")
    found = _source(spec.text, spec.images, data_root, "calibration", spec.examples)
    if spec.text is not None and spec.packing == "stream":
        shown = f"{spec.samples} x {spec.length} = {spec.samples * spec.length}"
        _check_size(spec.text, spec.samples * spec.length, shown, data_root, "calibration",
                    "Lower calibration.samples or length")  # fmt: skip
    return found


def check_evaluation(
    text: TextSpec | GivenText | None,
    spec: EvaluationSpec,
    reader: Any,
    model: nn.Module,
    data_root: str | Path | None,
    *,
    timed: bool,
    given: Examples | None = None,
) -> list[str]:
    """Check what an evaluation names against a model, before anything is read.

    Args:
        text, spec: as :func:`compress.planning.recipe.split_evaluation` found them; a text may be
            in memory.
        reader: the model's tokenizer or codebook; None where there is none yet.
        model: its weights are not looked at.
        timed: whether latency is measured against an original.
        given: labelled examples that are in memory.

    Returns:
        Warnings, as sentences.

    Raises:
        CompressError: naming the part of the evaluation.
    """
    from compress.eval.quality.task_names import check_task_names
    from compress.models.kind import kind_of, takes_key_values

    kind = kind_of(model)
    if kind == "other":
        raise CompressError(
            "a language model, or a model with a head of labels, to evaluate", type(model).__name__,
            "Give one with such a head, or leave the evaluation out", where="evaluation",
        )  # fmt: skip
    if (head := head_of(model)) is not None and head.task == "image":
        _in_part("evaluation", _check_encoder, model)
    if kind == "labels" and (text is not None or spec.tasks):
        raise CompressError(
            "examples to evaluate a model with a head of labels on",
            "a text" if text is not None else "lm-eval tasks", "Use evaluation.examples",
            where="evaluation",
        )  # fmt: skip
    examples = None
    if spec.examples is not None and given is None:
        examples = ExamplesSpec.model_validate(spec.examples)
    if spec.examples is not None:
        _require_head(head_of(model), model.config, "evaluation")
        if reader is not None:
            _in_part("evaluation", check_reader, reader, head_of(model))
        _in_part("evaluation", example_length, spec.length, model.config)
    positions = positions_of(model.config)
    if reader is not None:
        check_objective(model.config, spec, reader)
    images = spec.images and ImageSpec.model_validate({"split": "test", **spec.images})
    described = text if isinstance(text, TextSpec) else None
    found = _source(described, images, data_root, "evaluation", examples)
    if text is not None:
        _check_window(spec, kind, positions)
    if described is not None:
        window = spec.window or 2
        _check_size(
            described, window, str(window), data_root, "evaluation", "Lower evaluation.window"
        )
    try:
        check_task_names(spec.tasks, spec.include_path)
        latency = spec.latency_spec()
        if latency is not None and timed:
            decodes = kind == "causal" and takes_key_values(model)
            fits = latency.within(positions, decodes)
            if fits != latency:
                found.append(
                    f"latency is timed with a prefill of {fits.prefill_tokens} tokens"
                    + (f" and {fits.decode_tokens} decoded ones" if decodes else "")
                    + f": the model has {positions} positions"
                )
            if kind == "causal" and not decodes and latency.decode_tokens:
                found.append(
                    f"decoding is not timed: a {type(model).__name__} has no key-value cache"
                )
    except CompressError as error:
        raise error.within("evaluation") from None
    return found


def _check_encoder(model: Any) -> None:
    """Refuse a model that labels images and is no transformer of patches."""
    find_blocks(model)
    if not reads_images(model.config):
        raise CompressError(
            "image_size and num_channels in the config of a model that reads images",
            model.config.model_type, "Use a ViT or one of its kin",
        )  # fmt: skip


def _check_window(spec: Any, kind: str, positions: int | None) -> None:
    if spec.window and positions and spec.window > positions:
        raise CompressError(
            f"evaluation.window of at most {positions}, the model's positions", str(spec.window),
            "Lower it",
        )  # fmt: skip
    window = spec.window or min(1024, positions or 1024)
    if kind == "causal" and spec.stride is not None and spec.stride > window:
        raise CompressError(
            f"evaluation.stride of at most the window ({window} tokens)", str(spec.stride),
            "Lower it: the tokens between windows would not be scored",
        )  # fmt: skip


def _require_head(head: Head | None, config: PreTrainedConfig, where: str) -> None:
    if head is None:
        raise CompressError(
            "a model with a head of labels (...ForSequenceClassification, "
            "...ForImageClassification) for examples",
            ", ".join(config.architectures or ()) or config.model_type,
            "Use text, or fine-tune a head first (model.train with examples)", where=where,
        )  # fmt: skip


def _in_part(where: str, function: Callable[..., Any], *given: Any) -> Any:
    """Call a function and name the part of the recipe in what it refuses."""
    try:
        return function(*given)
    except CompressError as error:
        raise error.within(where) from None


def _source(
    text: TextSpec | None,
    images: Any,
    data_root: Any,
    where: str,
    examples: ExamplesSpec | None = None,
) -> list[str]:
    """Refuse sources that are not there; returns what could not be found out."""
    if images is not None:
        _in_part(where, check_images, images, data_root)
    read = text or examples
    return [] if read is None else _in_part(where, _file_or_dataset, read, data_root)


def _file_or_dataset(spec: TextSpec | ExamplesSpec, data_root: Any) -> list[str]:
    if isinstance(spec, ExamplesSpec) and (
        spec.source == DIGITS or image_place(spec.source, spec.split, data_root) is not None
    ):
        return []
    if spec.source.startswith("python:"):
        read_python_module(spec.source.removeprefix("python:"))
        return []
    if is_file_source(spec.source):
        for path in expand(spec.source, spec.split):
            if not os.access(path, os.R_OK):
                raise CompressError(
                    "a text file that may be read", str(path), "Change its permissions"
                )
        return []
    if data_root is not None and find(_root(data_root), spec.source, spec.subset, spec.split):
        return []
    return _ask_hub(canonical(spec.source, spec.subset)[0])


def _ask_hub(dataset: str) -> list[str]:
    """One short question; without an answer the run will see."""
    import huggingface_hub
    from huggingface_hub import errors
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(dataset)
        huggingface_hub.HfApi().dataset_info(dataset, timeout=_HUB_SECONDS)
    except errors.HFValidationError:
        raise CompressError(
            "a file that exists, or a data set id of the form owner/name", repr(dataset)[:200],
            "Check the path",
        ) from None  # fmt: skip
    except errors.GatedRepoError:
        return []  # it exists; a login is asked for when it is read
    except errors.RepositoryNotFoundError:
        raise CompressError(
            "a file, or the id of a data set on the hub", f"{dataset!r}, which is neither",
            "Check the spelling; a private or gated one needs a login (hf auth login)",
        ) from None  # fmt: skip
    except Exception:  # no network, a hub that is down: every client has errors of its own
        return [f"the data set {dataset} is not in the data root, and the hub did not answer"]
    return []


def _check_size(
    spec: TextSpec, tokens: int, shown: str, data_root: Any, where: str, fix: str
) -> None:
    """Refuse a text that cannot have so many tokens: few are less than a byte, none half of one."""
    if is_file_source(spec.source):
        paths = expand(spec.source, spec.split)
    else:
        found = data_root and find(_root(data_root), spec.source, spec.subset, spec.split)
        paths = [found[0]] if found else []
    if not paths or any(path.suffix.lower() not in _PLAIN for path in paths):
        return
    size = sum(path.stat().st_size for path in paths)
    if 2 * size < tokens:
        raise CompressError(
            f"a text of at least {shown} tokens" if size else "a text with something in it",
            f"one of {size} bytes ({spec.source})", fix, where=where,
        )  # fmt: skip


def _root(data_root: str | Path) -> Path:
    return user_path(data_root, "a data root")
