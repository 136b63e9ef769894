"""What is measured of a run after it was complete: its report gets it, for both models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compress.data.examples import Examples
from compress.data.given import GivenText
from compress.data.text import TextSpec
from compress.engine.intact import check_finished
from compress.engine.lab import Lab, finished_report
from compress.engine.workspace import Workspace
from compress.errors import CompressError
from compress.eval import EvaluationResult, EvaluationSpec
from compress.eval.report import Report, load_report
from compress.models.heads import head_of
from compress.models.sources.source import Source, load_config
from compress.models.stream import build_meta
from compress.planning.checks import check_evaluation, reader_of
from compress.planning.evaluation_inputs import EvaluationInputs, evaluation_inputs
from compress.planning.recipe import ModelSpec
from compress.system import memory
from compress.system.tensors import TensorIndex

_PARTS = ("perplexity", "masked", "generator", "labels")  # each once; tasks are added one by one


def is_run(place: Any) -> bool:
    """Whether a path is a run's folder, not a model's."""
    if not isinstance(place, (str, Path)):
        return False
    folder = Path(place)
    try:
        own = Workspace(folder).journal.is_file() and (folder / "report.json").is_file()
    except OSError:  # a hub id or a text that is too long for a path
        return False
    return own and not (folder / "config.json").exists()


def add_to_run(
    folder: Path,
    text: TextSpec | GivenText | None,
    spec: EvaluationSpec,
    lab: Lab,
    command: str | None,
    given: Examples | None = None,
) -> Report:
    """Measure a complete run's original and result, and add what was found to its report.

    What the report holds stays: a part that it has is not measured anew, tasks are added beside
    those it has (the same task is replaced). Cost and latency are the run's. The recipe of the run
    does not change, so a report that is removed and made again is without the additions.

    Args:
        text, spec: what to measure, as :func:`compress.planning.recipe.split_evaluation` found it.
        given: labelled examples in memory.

    Raises:
        CompressError: a run that is not complete, whose model or original is another one now, or
            that has been evaluated on this already; nothing to measure; tasks with another limit
            than those in the report; and what :func:`compress.evaluate` raises.
    """
    if spec.runtimes:
        raise CompressError(
            "an evaluation of quality to add to the run's report", "runtimes",
            f"Measure {Workspace(folder).model} in them, against the original",
        )  # fmt: skip
    spec = spec.model_copy(update={"latency": False, "memory": False})
    if text is None and not spec.tasks and spec.examples is None and spec.images is None:
        raise CompressError(
            "something to measure and add to the run's report", "neither tasks nor a text",
            "Name tasks (--tasks) or a text (--text)",
        )  # fmt: skip
    with Workspace(folder) as workspace:
        if not workspace.find(event="done") or not check_finished(workspace):
            raise CompressError(
                "a run that is complete", f"{folder}, which is not",
                f"Finish it: compress run {folder / 'recipe.yaml'} --out {folder}",
            )  # fmt: skip
        report = load_report(folder / "report.json")
        _refuse_known(report.after, spec)
        source = _original(report, folder, lab)
        home = source.folder
        reader = reader_of(home, lab.trust_remote_code)
        config = load_config(home, trust_remote_code=lab.trust_remote_code)
        shape = build_meta(config, lab.trust_remote_code)
        for warning in check_evaluation(
            text, spec, reader, shape, lab.data_root, timed=False, given=given
        ):
            lab.progress.say(f"note: {warning}")
        inputs = evaluation_inputs(
            text, spec, config, reader, lab.data_root, head_of(shape), given
        )  # fmt: skip
        before = None
        if report.before is not None:
            lab.progress.say("evaluating the original")
            before = _added(report.before, _measured(home, inputs, lab, known=True))
        lab.progress.say("evaluating the compressed model")
        measured = workspace.model if before is not None else home
        after = _added(report.after, _measured(measured, inputs, lab, known=before is None))
        note = f"evaluation was added afterwards ({command or ', '.join(spec.tasks) or 'a text'})"
        return finished_report(
            folder,
            title=report.title,
            run=report.run.model_copy(update={"notes": (*report.run.notes, note)}),
            data=(*report.data, *inputs.entries()),
            steps=report.steps,
            before=before,
            after=after,
        )


def _original(report: Report, folder: Path, lab: Lab) -> Source:
    """The model that the run began with.

    Raises:
        CompressError: its weights are not those that the run has read.
    """
    spec = ModelSpec.model_validate((report.run.recipe or {}).get("model"))
    if spec.train is not None:
        found = lab.resolve(folder / "base")
    else:
        found = lab.resolve(spec.source, spec.revision)
    digest = found.digest or TensorIndex.open(found.folder).digest()
    if digest != report.run.model_sha256:
        raise CompressError(
            f"the weights that the run began with ({report.run.model})", "others",
            "Put the original back, or start a new run",
        )  # fmt: skip
    return found


def _measured(folder: Path, inputs: EvaluationInputs, lab: Lab, known: bool) -> EvaluationResult:
    """Evaluate one of the run's models; an original's figures may be known already."""
    model = lab.load(folder)
    figures = lab.figures(folder, inputs.spec) if known else None
    result = lab.measure(model, inputs, folder=None, figures=figures)
    del model
    memory.give_back()
    return result


def _refuse_known(found: EvaluationResult, spec: EvaluationSpec) -> None:
    """Refuse to measure again, before anything is loaded, what the report has."""
    asked = {"perplexity": spec.perplexity, "labels": spec.examples, "generator": spec.images}
    known = [part for part in _PARTS if getattr(found, part) is not None]
    if known and any(value is not None for value in asked.values()):
        raise CompressError(
            "something that the run's report does not have", f"{', '.join(known)}, which it has",
            "Add tasks, or evaluate the folder `model` in that of the run by itself",
        )  # fmt: skip
    if spec.tasks and found.tasks is not None and found.tasks.limit != spec.limit:
        raise CompressError(
            f"the limit of the tasks that the report has ({found.tasks.limit or 'none'})",
            str(spec.limit or "none"), "Give the same --limit",
        )  # fmt: skip


def _added(old: EvaluationResult, new: EvaluationResult) -> EvaluationResult:
    """A result with the parts of another one of the same model."""
    update: dict[str, Any] = {
        part: getattr(new, part) for part in _PARTS if getattr(new, part) is not None
    }
    if update:
        update["tokens_sha256"] = new.tokens_sha256
        update["spec"] = new.spec.model_copy(
            update={name: getattr(old.spec, name) for name in ("latency", "memory", "tolerance")}
        )
    else:
        update["spec"] = old.spec
    if new.continuations:
        update["continuations"] = new.continuations
    if new.tasks is not None:
        names = tuple(dict.fromkeys((*old.spec.tasks, *new.spec.tasks)))
        folders = tuple(dict.fromkeys((*old.spec.include_path, *new.spec.include_path)))
        asked = {"tasks": names, "include_path": folders, "limit": new.spec.limit}
        update["spec"] = update["spec"].model_copy(update=asked)
        both = {**(old.tasks.tasks if old.tasks else {}), **new.tasks.tasks}
        update["tasks"] = new.tasks.model_copy(update={"tasks": both})
    for name in ("seconds", "cached"):
        told = {part: value for part, value in getattr(new, name).items() if part != "cost"}
        update[name] = {**getattr(old, name), **told}
    return old.model_copy(update=update)
