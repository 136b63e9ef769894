"""Train the model that a recipe names, once; the rest of the run reads it as its source."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedConfig

from compress.data.framing import Frame, with_note
from compress.data.labelled import head_for
from compress.errors import CompressError
from compress.models.heads import Head
from compress.models.images import reads_images
from compress.models.sources.source import Source, load_config, load_model, resolve
from compress.system.files import scratch_folder, whole_folder
from compress.system.progress import Progress
from compress.train import fit
from compress.train.create.architecture import (
    build_config,
    build_model,
    headed_config,
    headed_model,
)
from compress.train.create.material import frame_of, prepare, read_data, tokenizer_of
from compress.train.create.objective import describe_generation, loss_for
from compress.train.create.spec import TrainSpec
from compress.train.options import Precision

RECORD = "training.json"  # beside the trained model: what it was trained from
HISTORY = "training.jsonl"


def draft(spec: TrainSpec, cache_dir: str | Path | None = None) -> Source:
    """A model of the shape that training will give, to plan on before there is one.

    It lies in a temporary folder that goes when the returned source does.

    Raises:
        CompressError: an architecture that does not exist or does not fit the section; no room for
            temporary files.
    """
    head = None if spec.examples is None else head_for(spec.examples, None)
    if spec.from_ is not None:
        adapted = resolve(spec.from_, cache_dir=cache_dir)
        if head is None:
            return adapted
        if reads_images(load_config(adapted.folder)):
            head = replace(head, task="image")
        config = headed_config(adapted.folder, head)
    else:
        config = build_config(spec, head)
    describe_generation(config, spec, None)
    temporary = Path(tempfile.gettempdir())
    try:
        # Left behind by a killed process, it is removed by the next one that makes one.
        held = scratch_folder(temporary, "compress-draft-")
        folder = held.__enter__()
        source = Source(folder, _origin(spec), "trained")
        weakref.finalize(source, held.__exit__, None, None, None)
        build_model(config, spec.objective.kind, 0).save_pretrained(folder)
    except (OSError, SafetensorError) as error:
        raise CompressError(
            f"room for a draft of the model in the folder for temporary files ({temporary})",
            str(error), "Make room there, or name another folder in TMPDIR",
        ) from error  # fmt: skip
    return source


def create(
    spec: TrainSpec,
    folder: Path,
    work: Path,
    *,
    seed: int = 0,
    data_root: str | Path | None = None,
    cache_dir: str | Path | None = None,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    guard: Callable[[], None] = lambda: None,
    precision: Precision = "auto",
) -> Source:
    """Train the model, or find it trained. Run again after any interruption: it goes on.

    Args:
        spec: the recipe's ``model.train``.
        folder: where the model goes: an ordinary checkpoint, with its tokenizer or codebook.
        work: for the checkpoints of the training; removed when the model is written.
        seed: of the weights, the codebook and the training.
        guard: called at every step; may raise to stop the training.
        precision: what ``precision: auto`` of the training means.

    Raises:
        CompressError: data or options that do not work, or a folder with a model that was trained
            from something else.
    """
    progress = progress or Progress(quiet=True)
    adapted = None if spec.from_ is None else resolve(spec.from_, cache_dir=cache_dir)
    tokenizer_in = adapted.folder if adapted else None
    data = read_data(spec, data_root, tokenizer_in)
    frame = frame_of(spec, tokenizer_in)
    made_from = {"section": _digest(spec, seed, adapted, frame), "data": data.digest}
    if not _is_trained(folder, made_from):
        progress.say(f"training the model on {data.description}")
        head = None if spec.examples is None else head_for(spec.examples, data)
        config = _config(spec, adapted, head)
        material = prepare(spec, data, tokenizer_in, seed, frame, head, config)
        model = _model(spec, adapted, config, head, material.reader, seed).to(device).train()
        result = fit(
            model,
            loss_for(model, spec),
            material.rows,
            spec.training,
            folder=work,
            seed=seed,
            name="train",
            progress=progress,
            guard=guard,
            auto=precision,
        )
        _write(
            model, material.reader, result.history, {**made_from, "seconds": result.seconds}, folder
        )
    shutil.rmtree(work, ignore_errors=True)
    return _source(spec, folder, adapted, with_note(data.description, frame))


def _config(spec: TrainSpec, adapted: Source | None, head: Head | None) -> PreTrainedConfig | None:
    """The config that the model is built from; None where it is taken as it is."""
    if adapted is None:
        return build_config(spec, head)
    if head is None:
        return None
    tokenizer = None if head.task == "image" else tokenizer_of(adapted.folder)
    return headed_config(adapted.folder, head, tokenizer)


def _model(
    spec: TrainSpec,
    adapted: Source | None,
    config: PreTrainedConfig | None,
    head: Head | None,
    reader: Any,
    seed: int,
) -> Any:
    if adapted is None:
        model = build_model(config, spec.objective.kind, seed)
    elif config is not None:
        model = headed_model(adapted.folder, config, seed, head.task)
    else:
        model = load_model(adapted)
    describe_generation(model.config, spec, reader)
    return model


def _write(model: Any, reader: Any, history: Any, record: dict, folder: Path) -> None:
    """Write the checkpoint under a temporary name and rename it when it is whole."""
    advice = "Make room and run the same command again: training goes on from its last checkpoint"
    with whole_folder(folder, "the trained model", advice) as partial:
        try:
            model.to("cpu").eval().save_pretrained(partial)
        except SafetensorError as error:  # a full disk, as safetensors calls it
            raise OSError(0, str(error)) from error
        reader.save_pretrained(partial)
        lines = "".join(json.dumps(line, sort_keys=True) + "\n" for line in history)
        (partial / HISTORY).write_text(lines)
        (partial / RECORD).write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")


def _is_trained(folder: Path, made_from: dict[str, str]) -> bool:
    path = folder / RECORD
    if not path.is_file():
        return False
    try:
        earlier = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise CompressError(
            f"what the model in {folder} was trained from in {path.name}", "a damaged file",
            f"Remove {folder} to train anew",
        ) from error  # fmt: skip
    for name, value in made_from.items():
        if earlier.get(name) != value:
            raise CompressError(
                f"the {name} that the model in {folder} was trained from",
                f"{value!r} instead of {earlier.get(name)!r}",
                "The data or the options have changed since; start in a new folder",
            )
    return True


def _digest(spec: TrainSpec, seed: int, adapted: Source | None, frame: Frame) -> str:
    section = spec.model_dump(mode="json", by_alias=True, exclude={"special_tokens"})
    if spec.examples is None:  # there was a time before examples
        del section["examples"]
    elif spec.examples.image is None:  # and one before images among them
        del section["examples"]["image"]
    data = [section, seed, adapted and adapted.digest]
    # What a folder from before this choice was trained with: special tokens around documents only.
    streamed = spec.packing == "stream"
    if len(frame) if streamed else not spec.special_tokens:
        data.append([frame.prefix, frame.suffix])
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def _origin(spec: TrainSpec) -> str:
    what = spec.from_ or spec.architecture["model_type"]
    return f"{what}, {_verb(spec)} by this recipe"


def _verb(spec: TrainSpec) -> str:
    if spec.from_ is None:
        return "trained"
    return "adapted" if spec.examples is None else "fine-tuned"


def _source(spec: TrainSpec, folder: Path, adapted: Source | None, data: str) -> Source:
    options = spec.training
    note = (
        f"the original was {_verb(spec)} by this run: {options.steps} steps of "
        f"{options.batch} sequences from {data}"
    )
    notes = (*(adapted.notes if adapted else ()), note)
    license_ = adapted.license if adapted else None
    return Source(folder, _origin(spec), "trained", license=license_, notes=notes)
