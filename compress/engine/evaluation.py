"""One way to evaluate: what runs, Python and the command line read, load, measure and report."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from compress.data.text import TextSpec
from compress.engine.exporting import check_runtime, exported_digest, load_exported
from compress.engine.live import check_model_class
from compress.errors import CompressError
from compress.eval import EvaluationResult, EvaluationSpec
from compress.eval import evaluate as measure_model
from compress.eval.cache import Figures
from compress.eval.report import Report, RunInfo, environment, with_findings, write_report
from compress.models.heads import head_of
from compress.models.identity import model_digest
from compress.models.sources.source import Source, load_config, load_model, resolve
from compress.models.stream import build_meta
from compress.planning.checks import check_data_root, check_evaluation, find_reader, reader_of
from compress.planning.evaluation_inputs import EvaluationInputs, evaluation_inputs
from compress.planning.recipe import split_evaluation
from compress.system.files import refuse_existing
from compress.system.intake import user_path
from compress.system.precision import device_of
from compress.system.progress import Progress
from compress.system.tensors import TensorIndex

REPORTS = ("report.json", "report.md", "report.html")


@dataclass(frozen=True)
class Lab:
    """Where models are loaded and measured, and how that is told.

    Attributes:
        device: for models that are loaded.
        data_root: folder with local copies of data sets.
        cache_dir: of the toolkit; None for the usual one.
        trust_remote_code: run code that comes with checkpoints.
    """

    device: torch.device
    data_root: str | Path | None
    cache_dir: str | Path | None
    trust_remote_code: bool
    progress: Progress

    def load(self, folder: Path) -> PreTrainedModel:
        """A checkpoint's model in float32, the type that everything is evaluated in."""
        return load_model(
            folder, dtype=torch.float32, device=self.device,
            trust_remote_code=self.trust_remote_code,
        )  # fmt: skip

    def figures(self, folder: Path, spec: EvaluationSpec) -> Figures | None:
        """What is known of a checkpoint; None where its figures are to be measured in any case.

        Code that comes with a checkpoint may read whatever it likes, so no digest tells what it
        computes: figures of such models are never kept.
        """
        if not spec.cache or self.trust_remote_code:
            return None
        return Figures(model_digest(folder), self.cache_dir)

    def measure(
        self,
        model: PreTrainedModel,
        inputs: EvaluationInputs,
        *,
        folder: Path | None = None,
        baseline: PreTrainedModel | None = None,
        figures: Figures | None = None,
    ) -> EvaluationResult:
        """Evaluate a model on what was read.

        Args:
            folder: that it was loaded from; without one neither bytes nor memory are told.
            baseline: the original, for what is measured against it.
            figures: of that folder; None measures everything.
        """
        text = inputs.text
        result = measure_model(
            model,
            inputs.reader,
            inputs.spec,
            tokens=text and text.tokens,
            documents=text and text.documents,
            bytes_count=text and text.bytes,
            folder=folder,
            baseline=baseline,
            sequences=inputs.generator.sequences,
            judges=inputs.generator.judges,
            examples=inputs.rows,
            data_root=self.data_root,
            trust_remote_code=self.trust_remote_code,
            figures=figures,
            progress=self.progress.update,
        )
        for part, measured in result.cached.items():
            self.progress.say(f"{part}: from the cache, measured at {measured}")
        return result


def finished_report(folder: Path | None, **parts: Any) -> Report:
    """A report with its findings and this machine, written to ``folder`` if one is given."""
    report = with_findings(Report(**parts, environment=environment()))
    if folder is not None:
        write_report(report, folder)
    return report


def source_info(source: Source, digest: str) -> dict[str, Any]:
    """Fields of a RunInfo that tell where a model came from."""
    shipped = source.shipped
    return {
        "model": source.origin, "model_sha256": digest,
        "source_bytes": shipped and shipped.bytes, "source_format": shipped and shipped.format,
        "source_notes": source.notes,
    }  # fmt: skip


def evaluate(
    model: str | Path | PreTrainedModel,
    evaluation: dict[str, Any] | EvaluationSpec | None = None,
    *,
    text: TextSpec | dict[str, Any] | None = None,
    tokenizer: Any = None,
    against: str | Path | PreTrainedModel | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    device: str = "auto",
    runtime: Literal["torch", "onnx"] = "torch",
    data_root: str | Path | None = None,
    cache_dir: str | Path | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    command: str | None = None,
) -> Report:
    """Measure quality and cost of one model, as a run and ``compress evaluate`` do.

    A checkpoint is loaded in float32; a live model is measured in the type it has, and is left as
    it was. Quality figures of a checkpoint that were measured before (same weights and config,
    tokens, options and code) come from the toolkit's cache, and the report says so; ``cache:
    false`` in the evaluation measures them in any case. A live model is always measured: what was
    done to it in memory cannot be told by a digest.

    Args:
        model: folder, hub id, .gguf file, ``pypi:<name>==<version>``, or a live model.
        evaluation: as in a recipe: ``text`` (source, split, part ...), ``examples`` or ``images``,
            and the fields of :class:`compress.eval.EvaluationSpec`. Without one the model's cost
            alone is told.
        text: the evaluation text, where ``evaluation`` is an EvaluationSpec; by default the one
            that its ``perplexity`` describes.
        tokenizer: of a live model; a checkpoint brings its own.
        against: the original, for latency in pairs and a masked generator's divergence.
        out: folder for report.json, report.md and report.html; made where there is none.
        overwrite: replace reports that lie there.
        device: for models that are loaded: auto, cpu, cuda, cuda:0 ...
        runtime: what runs ``model``; "onnx" for a folder that was exported, on the CPU. Quality,
            latency and bytes are then those of the graph; its figures are never from the cache.
        data_root: folder with local copies of data sets.
        cache_dir: where fetched models and evaluation figures are kept.
        trust_remote_code: run code that comes with a checkpoint.
        progress: where to tell how far it is.
        command: the command line, for the report.

    Returns:
        The report; ``report.after`` is the model's :class:`compress.eval.EvaluationResult`:
        perplexities, losses in nats per token, sizes in bytes, times in seconds.

    Raises:
        CompressError: a source that cannot be used or does not load; an object that is no language
            model; an evaluation with unknown keys or wrong values, with data, tasks or a scorer
            that do not exist, or with lengths beyond the model's positions; a text without a
            tokenizer or shorter than a window; logits that are not finite; reports that are not to
            be overwritten, or a folder that cannot be written.
    """
    begin, started = time.perf_counter(), datetime.now(UTC).isoformat()
    folder = None if out is None else _report_folder(out, overwrite)
    check_data_root(data_root)
    chosen, spec = split_evaluation(_section(evaluation, text))
    live = not isinstance(model, (str, Path))
    exported = check_runtime(runtime) and not live
    lab = Lab(
        model.device if live and isinstance(model, PreTrainedModel)
        else device_of("cpu" if exported else device),
        data_root, cache_dir, trust_remote_code, progress or Progress(quiet=True),
    )  # fmt: skip
    if live:
        found, home, reader, shape = None, None, tokenizer, _live(model)
        info = {"model": f"{type(model).__name__} in memory"}
    else:
        found = _resolved(model, lab)
        home = found.folder
        reader = _reader(home, lab, chosen, spec, tokenizer)
        shape = build_meta(load_config(home, trust_remote_code=trust_remote_code),
                           trust_remote_code)  # fmt: skip
        digest = exported_digest(home) if exported else None
        info = source_info(found, digest or found.digest or TensorIndex.open(home).digest())
    for warning in check_evaluation(
        chosen, spec, reader, shape, data_root, timed=against is not None
    ):
        lab.progress.say(f"note: {warning}")
    inputs = evaluation_inputs(chosen, spec, shape.config, reader, data_root, head_of(shape))
    lab.progress.say(f"evaluating {info['model']}")
    subject = load_exported(home)[0] if exported else model if live else lab.load(home)
    baseline = _baseline(against, lab) if against is not None and inputs.paired else None
    result = lab.measure(
        subject, inputs, folder=home, baseline=baseline,
        figures=None if live or exported else lab.figures(home, spec),
    )  # fmt: skip
    if folder is not None:
        _make(folder)
    return finished_report(
        folder,
        title=type(model).__name__ if live else Path(model).name,
        run=RunInfo(
            **info, command=command, started=started, seconds=time.perf_counter() - begin,
            trust_remote_code=trust_remote_code,
        ),
        data=inputs.entries(),
        after=result,
    )  # fmt: skip


def _section(
    evaluation: dict[str, Any] | EvaluationSpec | None, text: TextSpec | dict[str, Any] | None
) -> dict[str, Any]:
    """The evaluation as a recipe would have it."""
    if isinstance(evaluation, EvaluationSpec):
        section = evaluation.model_dump(mode="json", exclude_unset=True)
        described = section.pop("perplexity", None)
        text = described if text is None else text
    elif evaluation is None or isinstance(evaluation, dict):
        section = dict(evaluation or {})
    else:
        raise CompressError(
            "an evaluation as in a recipe (a dict), or an EvaluationSpec",
            type(evaluation).__name__, where="evaluation",
        )  # fmt: skip
    if text is None:
        return section
    if section.get("text") is not None:
        raise CompressError("one evaluation text", "two", "Leave one out", where="evaluation")
    section["text"] = text.model_dump(exclude_unset=True) if isinstance(text, TextSpec) else text
    return section


def _live(model: Any) -> PreTrainedModel:
    check_model_class(model, "to evaluate")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise CompressError(
            "a model with its weights in memory to evaluate", "parameters on the meta device",
            "Load the weights, or give the checkpoint's folder",
        )  # fmt: skip
    return model


def _resolved(source: str | Path, lab: Lab) -> Source:
    return resolve(source, cache_dir=lab.cache_dir, trust_remote_code=lab.trust_remote_code)


def _reader(
    folder: Path, lab: Lab, text: TextSpec | None, spec: EvaluationSpec, tokenizer: Any
) -> Any:
    """A checkpoint's tokenizer or codebook, which it must have where anything is read."""
    if tokenizer is not None:
        raise CompressError(
            "a tokenizer with a live model only", f"one beside the checkpoint {folder}",
            "Leave it out: the checkpoint's own is used",
        )  # fmt: skip
    if text is not None or spec.images is not None or spec.examples is not None or spec.tasks:
        return reader_of(folder, lab.trust_remote_code)
    return find_reader(folder, lab.trust_remote_code)[0]


def _baseline(against: str | Path | PreTrainedModel, lab: Lab) -> PreTrainedModel:
    if isinstance(against, (str, Path)):
        return lab.load(_resolved(against, lab).folder)
    return _live(against)


def _report_folder(out: str | Path, overwrite: bool) -> Path:
    folder = user_path(out, "a folder for the report")
    if folder.exists() and not folder.is_dir():
        raise CompressError("a folder for the report (--out)", f"{str(folder)!r}, which is none")
    if not overwrite:
        refuse_existing(*(folder / name for name in REPORTS))
    return folder


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CompressError(
            "a folder for the report that can be made", f"{folder}: {error.strerror or error}",
            "Choose another one with --out",
        ) from error  # fmt: skip
