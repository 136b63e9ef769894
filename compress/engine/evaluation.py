"""The evaluation of a run: the original once, the result at the end, both into one report."""

from __future__ import annotations

import hashlib
import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from compress.data.calibration import Calibration
from compress.data.tokens import token_digest
from compress.engine.workspace import Workspace
from compress.errors import CompressError
from compress.eval import EvaluationResult, evaluate
from compress.models.sources.source import load_model
from compress.planning.evaluation_material import (
    GeneratorMaterial,
    check_objective,
    generator_material,
)
from compress.planning.evaluation_text import TextMaterial, text_material
from compress.planning.imports import import_digests
from compress.planning.planner import Plan
from compress.planning.recipe import split_evaluation
from compress.planning.step_check import left_alone
from compress.system import memory
from compress.system.files import write_atomically
from compress.system.progress import Progress


class Evaluator:
    """Evaluates the models of one run.

    Args:
        plan: of the run, whose recipe has an evaluation section.
        tokenizer: of the model.
        workspace: the run's folder; the original's result is kept in it.
    """

    def __init__(
        self,
        plan: Plan,
        tokenizer: Any,
        workspace: Workspace,
        device: torch.device,
        data_root: str | Path | None,
        progress: Progress,
    ) -> None:
        self.plan, self.tokenizer, self.workspace = plan, tokenizer, workspace
        self.device, self.data_root, self.progress = device, data_root, progress
        # Clocks are set back and forward between two starts: durations are what can be added up.
        self._began = time.perf_counter()
        self._earlier = sum(e["seconds"] for e in workspace.find(event="step"))
        text_spec, self.spec = split_evaluation(plan.recipe.evaluation)
        self.text: TextMaterial | None = None
        self.material = GeneratorMaterial()
        self.generates = check_objective(plan.state.config, self.spec, tokenizer)
        if text_spec is not None:
            self.text = text_material(
                text_spec, self.spec, plan.state.config, tokenizer, data_root,
                generates=self.generates,
            )  # fmt: skip
            self._check_length()
        if self.generates:
            self.material = generator_material(
                self.spec, plan.state.config, tokenizer, self.text and self.text.text, data_root
            )

    @property
    def digest(self) -> str | None:
        if self.material.sequences is not None:
            return token_digest(self.material.sequences.tokens)
        return None if self.text is None else self.text.pinned

    def before(self) -> EvaluationResult:
        """Evaluate the original, or read what an earlier start of this run found."""
        path = self.workspace.folder / "evaluation-before.json"
        found = self._kept(path)
        if found is not None:
            return found
        self.progress.say("evaluating the original")
        model = self._load(self.plan.source.folder)
        result = self._evaluate(model, self.plan.source.folder, None)
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

    def report(self, calibration: Calibration | None, command: str | None) -> Any:
        """Evaluate the result, write the report, return it."""
        from compress.eval.report import Report, environment, with_findings, write_report

        before = self.before() if self.plan.recipe.steps else None
        if self.plan.recipe.steps:
            self.progress.say("evaluating the compressed model")
            model = self._load(self.workspace.model)
            baseline = None
            if self.spec.latency_spec() is not None or self.generates:
                baseline = self._load(self.plan.source.folder)
            after = self._evaluate(model, self.workspace.model, baseline)
            del model, baseline
            memory.give_back()
        else:
            after = self.before()
        report = with_findings(
            Report(
                title=self.plan.recipe.name,
                run=self._run_info(command),
                data=self._data(calibration),
                steps=self._steps(),
                before=before,
                after=after,
                environment=environment(),
            )
        )
        write_report(report, self.workspace.folder)
        return report

    def _check_length(self) -> None:
        window = self.spec.window or 2
        found = len(self.text.tokens)
        if self.text.documents is None and found < window:
            raise CompressError(
                f"an evaluation text of at least one window ({window} tokens)",
                f"{found} tokens",
                "Lower evaluation.window or choose a longer text",
            )

    def _load(self, folder: Path) -> Any:
        return load_model(
            folder,
            dtype=torch.float32,
            device=self.device,
            trust_remote_code=self.plan.recipe.model.trust_remote_code,
        )

    def _evaluate(self, model: Any, folder: Path, baseline: Any) -> EvaluationResult:
        return evaluate(
            model,
            self.tokenizer,
            self.spec,
            tokens=self.text and self.text.tokens,
            documents=self.text and self.text.documents,
            bytes_count=self.text and self.text.bytes,
            folder=folder,
            baseline=baseline,
            sequences=self.material.sequences,
            judges=self.material.judges,
            data_root=self.data_root,
            trust_remote_code=self.plan.recipe.model.trust_remote_code,
            progress=self.progress.update,
        )

    def _run_info(self, command: str | None) -> Any:
        from compress.eval.report import RunInfo

        started = self.workspace.find(event="started")[0]["at"]
        shipped = self.plan.source.shipped
        return RunInfo(
            model=self.plan.source.origin,
            model_sha256=self.workspace.locked("model"),
            source_bytes=shipped and shipped.bytes,
            source_format=shipped and shipped.format,
            recipe_name=self.plan.recipe.name,
            recipe=self.plan.recipe.dump(),
            command=command,
            seed=self.plan.recipe.seed,
            compute=self._compute(),
            started=started,
            seconds=self._earlier + time.perf_counter() - self._began,
            trust_remote_code=self.plan.recipe.model.trust_remote_code,
            imports=import_digests(self.plan.recipe.imports),
            notes=(*self.workspace.notes, *map(_mended, self.workspace.find(event="mended"))),
        )

    def _compute(self) -> str | None:
        observed = any(method.needs != "nothing" for method in self.plan.recipe.steps)
        return self.workspace.kept("compute") if observed else None

    def _data(self, calibration: Calibration | None) -> tuple[Any, ...]:
        from compress.eval.report import DataEntry

        entries = []
        if calibration is not None:
            given = self.plan.recipe.calibration
            entries.append(
                DataEntry(
                    role="calibration",
                    name=(given.text or given.images).source,
                    sha256=calibration.digest,
                    bytes=calibration.bytes,
                    tokens=calibration.tokens,
                    detail=calibration.description,
                )
            )
        if self.material.images is not None:
            entries.append(
                DataEntry(
                    role="evaluation",
                    name=self.spec.images["source"],
                    sha256=self.digest,
                    tokens=self.material.sequences.tokens.numel(),
                    detail=self.material.images.description,
                )
            )
        if self.text is not None:
            entries.append(self.text.entry(self.plan.recipe.evaluation["text"]["source"]))
        return tuple(entries)

    def _steps(self) -> tuple[Any, ...]:
        from compress.eval.report import StepEntry

        entries = []
        for number, method in enumerate(self.plan.recipe.steps):
            event = self.workspace.find(event="step", step=number)[0]
            kept = event["kept"]
            notes = () if kept is None else (f"kept blocks {', '.join(map(str, kept))}",)
            alone = left_alone(method, self.plan.steps[number].before)
            notes += (alone,) if alone else ()
            entries.append(
                StepEntry(
                    method=method.name,
                    summary=method.summary,
                    options=method.model_dump(mode="json"),
                    writes=tuple(sorted(method.writes)),
                    seconds=event["seconds"],
                    peak_rss_bytes=event["peak_bytes"],
                    resumed=event["resumed"],
                    notes=notes,
                )
            )
        return tuple(entries)


def _mended(event: dict[str, Any]) -> str:
    return f"the recipe's {', '.join(event['parts'])} changed after the run was started"


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
