"""The evaluation of a run: the original once, the result at the end, both into one report."""

from __future__ import annotations

import hashlib
import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from compress.data.calibration import Calibration
from compress.engine.lab import Lab, finished_report, source_info
from compress.engine.run_exports import exported_places
from compress.engine.runtimes import in_runtimes
from compress.engine.workspace import Workspace
from compress.eval import EvaluationResult, EvaluationSpec
from compress.eval.report import DataEntry, Report, RunInfo, StepEntry
from compress.planning.evaluation_inputs import EvaluationInputs, evaluation_inputs
from compress.planning.planner import Plan
from compress.planning.recipe import split_evaluation
from compress.planning.step_check import left_alone
from compress.system import memory
from compress.system.files import write_atomically
from compress.system.imports import import_digests


class RunEvaluation:
    """Evaluates the models of one run.

    Args:
        plan: of the run, whose recipe has an evaluation section.
        reader: the tokenizer or the codebook of the model.
        workspace: the run's folder; the original's result is kept in it.
        lab: where models are measured.
    """

    def __init__(self, plan: Plan, reader: Any, workspace: Workspace, lab: Lab) -> None:
        self.plan, self.workspace, self.lab = plan, workspace, lab
        # Clocks are set back and forward between two starts: durations are what can be added up.
        self._began = time.perf_counter()
        self._earlier = sum(e["seconds"] for e in workspace.find(event="step"))
        text, spec = split_evaluation(plan.recipe.evaluation)

        def read(spec: EvaluationSpec) -> EvaluationInputs:
            return evaluation_inputs(text, spec, plan.state.config, reader, lab.data_root)

        self.inputs = read(spec)
        pinned = workspace.locked("evaluation tokens")
        if pinned not in (None, self.digest):
            # Earlier versions put nothing in front of a causal model's windows: the original was
            # measured that way, and so must be the result.
            bare = read(spec.model_copy(update={"special_tokens": False}))
            self.inputs = bare if bare.digest == pinned else self.inputs

    @property
    def digest(self) -> str | None:
        """What the results depend on, for the run's lock."""
        return self.inputs.digest

    def before(self) -> EvaluationResult:
        """Evaluate the original, or read what an earlier start of this run found."""
        path = self.workspace.folder / "evaluation-before.json"
        found = self._kept(path)
        if found is not None:
            return found
        self.lab.progress.say("evaluating the original")
        folder = self.plan.source.folder
        model = self.lab.load(folder)
        figures = self.lab.figures(folder, self.inputs.spec)
        result = self.lab.measure(model, self.inputs, folder=folder, figures=figures)
        del model
        memory.give_back()
        text = result.model_dump_json()
        kept = {"of": self._measured(), "sha256": _sha(text), "result": json.loads(text)}
        write_atomically(path, json.dumps(kept, indent=1) + "\n")
        return result

    def _kept(self, path: Path) -> EvaluationResult | None:
        """What an earlier start found, where it measured the same and the file is as it wrote it.

        A file of an earlier version is the result alone; it is taken while the recipe stays as it
        was.
        """
        with suppress(OSError, ValueError, KeyError, TypeError):
            kept = json.loads(path.read_text(encoding="utf-8"))
            if "sha256" not in kept:
                mended = self.workspace.find(event="mended")
                return None if mended else EvaluationResult.model_validate(kept)
            result = EvaluationResult.model_validate(kept["result"])
            same = kept["sha256"] == _sha(result.model_dump_json())
            return result if same and kept["of"] == self._measured() else None
        return None

    def _measured(self) -> dict[str, Any]:
        """What decides the original's result, as far as the recipe and the texts do."""
        recipe = self.plan.recipe
        return {
            "evaluation": json.loads(json.dumps(recipe.evaluation, sort_keys=True)),
            "tokens": self.digest,
            "model": self.workspace.locked("model"),
            "config.json": self.workspace.locked("config.json"),
        }

    def report(self, calibration: Calibration | None, command: str | None) -> Report:
        """Evaluate the result, write the report, return it."""
        before = self.before() if self.plan.recipe.steps else None
        after = self._after() if self.plan.recipe.steps else self.before()
        return finished_report(
            self.workspace.folder,
            title=self.plan.recipe.name,
            run=self._run_info(command),
            data=(*self._calibration(calibration), *self.inputs.entries()),
            steps=self._steps(),
            before=before,
            after=after,
        )

    def _after(self) -> EvaluationResult:
        """Evaluate the result; every run makes another one, so its figures are not kept."""
        self.lab.progress.say("evaluating the compressed model")
        model = self.lab.load(self.workspace.model)
        baseline = self.lab.load(self.plan.source.folder) if self.inputs.paired else None
        result = self.lab.measure(
            model, self.inputs, folder=self.workspace.model, baseline=baseline
        )
        del model, baseline
        memory.give_back()
        if not self.inputs.spec.runtimes:
            return result
        started = time.perf_counter()
        found = in_runtimes(
            self.workspace.model, self.inputs, self.lab, original=self.plan.source.folder,
            exported=exported_places(self.workspace), scratch=self.workspace.work,
        )  # fmt: skip
        seconds = {**result.seconds, "runtimes": time.perf_counter() - started}
        return result.model_copy(update={"runtimes": found, "seconds": seconds})

    def _run_info(self, command: str | None) -> RunInfo:
        started = self.workspace.find(event="started")[0]["at"]
        recipe = self.plan.recipe
        return RunInfo(
            **source_info(self.plan.source, self.workspace.locked("model")),
            recipe_name=recipe.name,
            recipe=recipe.dump(),
            command=command,
            seed=recipe.seed,
            compute=self._compute(),
            started=started,
            seconds=self._earlier + time.perf_counter() - self._began,
            trust_remote_code=recipe.model.trust_remote_code,
            imports=import_digests(recipe.imports),
            notes=(*self.workspace.notes, *map(_mended, self.workspace.find(event="mended"))),
        )

    def _compute(self) -> str | None:
        observed = any(method.needs != "nothing" for method in self.plan.recipe.steps)
        return self.workspace.kept("compute") if observed else None

    def _calibration(self, calibration: Calibration | None) -> tuple[DataEntry, ...]:
        if calibration is None:
            return ()
        given = self.plan.recipe.calibration
        return (
            DataEntry(
                role="calibration",
                name=given.source,
                sha256=calibration.digest,
                bytes=calibration.bytes,
                tokens=calibration.tokens,
                detail=calibration.description,
            ),
        )

    def _steps(self) -> tuple[StepEntry, ...]:
        entries = []
        for number, method in enumerate(self.plan.recipe.steps):
            event = self.workspace.find(event="step", step=number)[0]
            notes = _grouped(event)
            alone = left_alone(method, self.plan.steps[number].before)
            notes += (alone,) if alone else ()
            done = self.workspace.find(event="block", step=number)
            notes += _experts(done)
            notes += method.told([e["note"] for e in done])
            entries.append(
                StepEntry(
                    method=method.name,
                    summary=method.summary,
                    options=method.model_dump(mode="json"),
                    writes=tuple(sorted(method.makes())),
                    seconds=event["seconds"],
                    peak_rss_bytes=event["peak_bytes"],
                    resumed=event["resumed"],
                    notes=notes,
                )
            )
        return tuple(entries)


def _experts(blocks: list[dict[str, Any]]) -> tuple[str, ...]:
    """How well experts of a mixture are known, where calibration did not reach all of them."""
    notes = [event["note"] for event in blocks if isinstance(event["note"], dict)]
    counts = [
        sum(note.get(f"experts.{what}", 0) for note in notes)
        for what in ("linears", "few", "unseen")
    ]
    every, few, unseen = map(int, counts)
    if not few and not unseen:
        return ()
    told = f"{few + unseen} of {every} linears of experts saw fewer tokens than they have inputs"
    if unseen:
        told += f", {unseen} none at all: these were solved as if all inputs were alike"
    return (f"{told}; more calibration samples reach more experts",)


def _grouped(event: dict[str, Any]) -> tuple[str, ...]:
    """What a step has made of the list of blocks, as a sentence; nothing where it left it alone."""
    kept = event.get("kept")  # of earlier versions, which only ever dropped blocks
    groups = event.get("groups") or [[index] for index in kept or ()]
    if not groups:
        return ()
    found = [f"kept blocks {', '.join(str(group[0]) for group in groups)}"]
    if any(len(group) > 1 for group in groups):
        found = [f"made one block of each of {', '.join(map(_span, groups))}"]
    return tuple(found)


def _span(group: list[int]) -> str:
    return str(group[0]) if len(group) == 1 else f"{group[0]}-{group[-1]}"


def _mended(event: dict[str, Any]) -> str:
    return f"the recipe's {', '.join(event['parts'])} changed after the run was started"


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
