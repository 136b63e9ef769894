"""One way to evaluate: what runs, Python and the command line read, load, measure and report."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedModel

from compress.data.examples import Examples
from compress.data.given import GivenText, given_examples, given_text
from compress.data.text import TextSpec
from compress.engine.added_evaluation import add_to_run, is_run
from compress.engine.exporting import check_runtime, exported_digest, load_exported
from compress.engine.lab import Lab, finished_report, source_info
from compress.engine.live import check_model_class
from compress.engine.runtimes import in_runtimes
from compress.errors import CompressError
from compress.eval import EvaluationResult, EvaluationSpec
from compress.eval.report import Report, RunInfo
from compress.models.config_limits import check_one_stack
from compress.models.heads import head_of
from compress.models.sources.source import load_config
from compress.models.stream import build_meta
from compress.planning.checks import check_data_root, check_evaluation, find_reader, reader_of
from compress.planning.evaluation_inputs import evaluation_inputs
from compress.planning.export_check import check_runtime_of
from compress.planning.recipe import split_evaluation
from compress.system.files import refuse_existing
from compress.system.intake import user_path
from compress.system.precision import device_of
from compress.system.progress import Progress, showing
from compress.system.tensors import TensorIndex

REPORTS = ("report.json", "report.md", "report.html")


def evaluate(
    model: str | Path | PreTrainedModel,
    evaluation: dict[str, Any] | EvaluationSpec | None = None,
    *,
    text: Any = None,
    examples: Any = None,
    tokenizer: Any = None,
    against: str | Path | PreTrainedModel | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    device: str = "auto",
    runtime: Literal["torch", "onnx"] = "torch",
    data_root: str | Path | None = None,
    cache_dir: str | Path | None = None,
    trust_remote_code: bool = False,
    progress: Progress | bool | None = None,
    command: str | None = None,
) -> Report:
    """Measure quality and cost of one model, as a run and ``compress evaluate`` do.

    A checkpoint is loaded in float32; a live model is measured in the type it has, and is left as
    it was. Quality figures of a checkpoint that were measured before (same weights and config,
    tokens, options and code) come from the toolkit's cache, and the report says so; ``cache:
    false`` in the evaluation measures them in any case. A live model is always measured: what was
    done to it in memory cannot be told by a digest.

    Args:
        model: folder, hub id, .gguf file, ``pypi:<name>==<version>``, or a live model; or the
            folder of a complete run: then its original and its result are measured, and what was
            found is added to its report (:func:`compress.engine.added_evaluation.add_to_run`).
        evaluation: as in a recipe: ``text`` (source, split, part ...), ``examples`` or ``images``,
            and the fields of :class:`compress.eval.EvaluationSpec`. Without one the model's cost
            alone is told.
        text: the evaluation text: where it is (a TextSpec, or a dict as in a recipe), or the text
            itself: :data:`compress.data.given.TEXTS`. By default what ``evaluation`` describes.
        examples: labelled examples in memory, for a model with a head of labels: a list of objects
            with text and label, or a ``datasets.Dataset``.
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
        progress: where to tell how far it is; True, False, or None: on a terminal or in a notebook.
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
    chosen, spec, given = _asked(evaluation, text, examples)
    live = isinstance(model, PreTrainedModel)
    exported = check_runtime(runtime) and not live
    with showing(progress) as told:
        lab = Lab(
            model.device if live else device_of("cpu" if exported else device),
            data_root, cache_dir, trust_remote_code, told,
        )  # fmt: skip
        if is_run(model) and not exported:
            _require_own_report(out, against, tokenizer)
            return add_to_run(Path(model), chosen, spec, lab, command, given)
        info, data, result = _measured(
            model, chosen, spec, given, tokenizer, against, lab, exported
        )
    if folder is not None:
        _make(folder)
    return finished_report(
        folder,
        title=Path(model).name if isinstance(model, (str, Path)) else type(model).__name__,
        run=RunInfo(
            **info, command=command, started=started, seconds=time.perf_counter() - begin,
            trust_remote_code=trust_remote_code,
        ),
        data=data,
        after=result,
    )  # fmt: skip


def _measured(
    model: str | Path | PreTrainedModel,
    chosen: TextSpec | GivenText | None,
    spec: EvaluationSpec,
    given: Examples | None,
    tokenizer: Any,
    against: str | Path | PreTrainedModel | None,
    lab: Lab,
    exported: bool,
) -> tuple[dict[str, Any], tuple[Any, ...], EvaluationResult]:
    """What a report says of where the model came from and of the data, and what was measured."""
    code, data_root = lab.trust_remote_code, lab.data_root
    live = not isinstance(model, (str, Path))
    if live:
        found, home, reader, shape = None, None, tokenizer, _live(model)
        info = {"model": f"{type(model).__name__} in memory"}
    else:
        found = lab.resolve(model)
        home = found.folder
        reader = _reader(home, lab, chosen, spec, tokenizer)
        shape = build_meta(load_config(home, trust_remote_code=code), code)
        digest = exported_digest(home) if exported else found.digest
        info = source_info(found, digest or TensorIndex.open(home).digest())
    for warning in check_evaluation(
        chosen, spec, reader, shape, data_root, timed=against is not None, given=given
    ):
        lab.progress.say(f"note: {warning}")
    _check_runtimes(spec, shape, live or exported)
    inputs = evaluation_inputs(
        chosen, spec, shape.config, reader, data_root, head_of(shape), given
    )  # fmt: skip
    lab.progress.say(f"evaluating {info['model']}")
    subject = load_exported(home)[0] if exported else model if live else lab.load(home)
    baseline = _baseline(against, lab) if against is not None and inputs.paired else None
    result = lab.measure(
        subject, inputs, folder=home, baseline=baseline,
        figures=None if live or exported else lab.figures(home, spec),
    )  # fmt: skip
    if home is not None and spec.runtimes:
        del subject, baseline
        named = isinstance(against, (str, Path))
        original = lab.resolve(against).folder if named else None  # pyrefly: ignore
        found = in_runtimes(home, inputs, lab, original=original)
        result = result.model_copy(update={"runtimes": found})
    return info, inputs.entries(), result


def _check_runtimes(spec: EvaluationSpec, shape: PreTrainedModel, elsewhere: bool) -> None:
    """Refuse runtimes that a model cannot be measured in, before anything is loaded."""
    if spec.runtimes and elsewhere:
        raise CompressError(
            "a checkpoint to measure in other runtimes", "a model in memory or an exported one",
            "Save it first, or leave evaluation.runtimes out",
        )  # fmt: skip
    for name in spec.runtimes:
        try:
            check_runtime_of(name, shape, running=True)
        except CompressError as error:
            raise error.within("evaluation.runtimes") from None


def _require_own_report(out: Any, against: Any, tokenizer: Any) -> None:
    for name, given in (("out", out), ("against", against), ("tokenizer", tokenizer)):
        if given is not None:
            raise CompressError(
                f"no `{name}` with a run's folder: its own report is added to", repr(given)[:80],
                "Leave it out, or give the folder `model` in that of the run",
            )  # fmt: skip


def _asked(
    evaluation: dict[str, Any] | EvaluationSpec | None, text: Any, examples: Any
) -> tuple[TextSpec | GivenText | None, EvaluationSpec, Examples | None]:
    """The text, what to measure, and the examples that are in memory."""
    described = isinstance(text, TextSpec) or (isinstance(text, dict) and "source" in text)
    if text is None or described:
        chosen, spec = split_evaluation(_section(evaluation, text))
    else:
        _, spec = split_evaluation(_section(evaluation, None))
        chosen = given_text(text)
        _refuse_two(spec, "text")
        spec = spec.model_copy(update={"perplexity": {"source": chosen.source}})
    if examples is None:
        return chosen, spec, None
    _refuse_two(spec, "examples")
    given = given_examples(examples)
    told = {"source": given.description}
    return chosen, spec.model_copy(update={"examples": told}), given


def _refuse_two(spec: EvaluationSpec, name: str) -> None:
    """Refuse data in memory beside data that the evaluation describes."""
    if any(part is not None for part in (spec.perplexity, spec.examples, spec.images)):
        raise CompressError(
            "one text, or examples, to evaluate on", f"`{name}` and what the evaluation names",
            "Leave one out", where="evaluation",
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
    check_one_stack(model.config, type(model).__name__)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise CompressError(
            "a model with its weights in memory to evaluate", "parameters on the meta device",
            "Load the weights, or give the checkpoint's folder",
        )  # fmt: skip
    return model


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
        return lab.load(lab.resolve(against).folder)
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
