"""The stages of a run on one folder; each looks in the journal first and does what is left."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import shutil
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from compress.checkpoint import fresh
from compress.checkpoint.export import check_export, companions, export, export_masks
from compress.checkpoint.state import ModelState
from compress.checkpoint.storage import Storage
from compress.data.calibration import Calibration, calibration_batches
from compress.engine.card import NAME as CARD
from compress.engine.card import model_card
from compress.engine.context import StepContext
from compress.engine.intact import digests, model_digests, rewind_damaged
from compress.engine.lab import Lab
from compress.engine.original import Original
from compress.engine.run_evaluation import RunEvaluation
from compress.engine.run_exports import export_result, exported_places
from compress.engine.sink import JournalSink
from compress.engine.step_clock import StepClock
from compress.engine.steps import run_step
from compress.engine.workspace import Workspace
from compress.errors import CompressError
from compress.methods.base import DEPTH, MODULES, WIDTH
from compress.methods.catalog import METHODS
from compress.methods.questions import trains, uses_original
from compress.models.loading import read_config
from compress.models.stream import StreamedModel
from compress.planning.checks import reader_of
from compress.planning.planner import Plan
from compress.planning.recipe import Recipe, parse_size
from compress.system import memory, processes
from compress.system.files import write_atomically
from compress.system.imports import import_digests
from compress.system.precision import calibration_dtype, device_of
from compress.system.progress import Progress
from compress.system.tensors import file_sha256
from compress.system.version import VERSION
from compress.train.options import Precision, auto_precision, flagged_precision

_ALWAYS_FITS = 64 * 2**20
_VERSIONED = (
    "torch", "transformers", "tokenizers", "safetensors", "compressed-tensors", "lm-eval", "peft",
)  # fmt: skip


class Job:
    """One run's stages; each looks in the journal first and does what is left."""

    def __init__(
        self,
        made: Plan,
        workspace: Workspace,
        data_root: str | Path | None,
        max_memory: int | None,
        progress: Progress,
        command: str | None,
        cache_dir: str | Path | None = None,
    ) -> None:
        self.plan, self.recipe, self.workspace = made, made.recipe, workspace
        self.limit, self.progress, self.command = max_memory, progress, command
        self.device = device_of(self.recipe.device)
        self.data_root, self.cache_dir = data_root, cache_dir
        # A run that goes on elsewhere must not change its mind; the first versions knew one type.
        self.compute = workspace.keep("compute", self._compute, begun="float32")
        if self.recipe.output.dtype is not None:
            self.storage = Storage(getattr(torch, self.recipe.output.dtype))
        else:
            self.storage = Storage.like(made.state.source, made.state.blocks_path)
        self.state: ModelState = made.state
        self._source: StreamedModel | None = None  # of the state, where it has been built
        self.calibration: Calibration | None = None
        self.evaluator: RunEvaluation | None = None
        self.scratch = workspace.work / "activations"
        self.digest = ""
        self.resumed = workspace.resumed

    def prepare(self) -> None:
        """Read the texts and pin everything the result depends on."""
        free = shutil.disk_usage(self.workspace.folder).free
        if not self.resumed and self.plan.disk_bytes > free:
            raise CompressError(
                f"{self.plan.disk_bytes / 1e9:.2f} GB of free disk for {self.workspace.folder}",
                f"{free / 1e9:.2f} GB",
                "Make room, choose another folder with --out, or lower calibration.samples",
            )
        if not self.resumed:
            self.plan.state.check_outer()
        self.digest = self.plan.source.digest or self.plan.state.source.index.digest()
        must = {"model": self.digest, **self._beside_weights()}
        if self.recipe.calibration is not None:
            self.calibrate()
            must["calibration tokens"] = self.calibration.digest
        if self.recipe.evaluation is not None:
            lab = Lab(
                self.device, self.data_root, self.cache_dir, self.recipe.model.trust_remote_code,
                self.progress,
            )  # fmt: skip
            self.evaluator = RunEvaluation(self.plan, self._tokenizer(), self.workspace, lab)
            must["evaluation tokens"] = self.evaluator.digest
        may = {"python": platform.python_version(), "compress": VERSION}
        may |= {name: _version(name) for name in _VERSIONED}
        may |= dict(filter(None, (METHODS.package(m.name) for m in self.recipe.steps)))
        may["threads"] = torch.get_num_threads()
        # Not before here: a recipe that was refused may be mended and run in the same folder.
        self.workspace.claim(self.recipe.to_yaml())
        if self.progress.log is not None:
            self.progress.log.begin()
        changed = self.workspace.pin({"must": must, "may": may, "seed": self.recipe.seed})
        for name, (then, now) in changed.items():
            self.progress.say(f"note: {name} was {then} when this run was started and is {now} now")
        self.workspace.start(datetime.now(UTC).isoformat())
        for told in rewind_damaged(self.workspace):
            self.progress.say(f"note: {told}")
        self.scratch.mkdir(parents=True, exist_ok=True)

    def _compute(self) -> str:
        chosen = calibration_dtype(self.recipe.compute, self.device)
        return str(chosen).removeprefix("torch.")

    def _beside_weights(self) -> dict[str, str]:
        """Digests of the other files that decide what the result is."""
        source, code = self.plan.source, self.recipe.model.trust_remote_code
        fields = read_config(source.folder)
        fields.pop("transformers_version", None)  # of who wrote it, not of the model
        beside = digests(companions(source, code), source.folder)
        found = {"config.json": _digest(fields), "files beside the weights": _digest(beside)}
        for number, method in enumerate(self.recipe.steps):
            for path in method.files():
                found[f"{path} (step {number + 1})"] = file_sha256(path)
        imported = import_digests(self.recipe.imports)
        return found | {f"{name} (imported)": digest for name, digest in imported.items()}

    def calibrate(self) -> None:
        """Read the calibration text, where the recipe has one."""
        if self.recipe.calibration is not None:
            self.calibration = calibration_batches(
                self.recipe.calibration,
                self._tokenizer(),
                self.plan.state.config,
                seed=self.recipe.seed,
                data_root=self.data_root,
            )

    def _tokenizer(self) -> Any:
        return reader_of(self.plan.source.folder, self.recipe.model.trust_remote_code)

    def evaluate_before(self) -> None:
        if self.evaluator is not None:
            self.evaluator.before()

    def compress(self) -> None:
        memory.map_large_blocks()
        for number, method in enumerate(self.recipe.steps):
            self._step(number, method)

    def _step(self, number: int, method: Any) -> None:
        name = f"step {number + 1}/{len(self.recipe.steps)} {method.name}"
        source = self._source or self.state.streamed(self.device)
        sink = self.sink(number, source, JournalSink)
        if self.workspace.find(event="step", step=number):
            context = self.context(source, sink)
            run_step(method, context)  # of which all passes are finished
            self.state, self._source = sink.state, context.source
            return
        memory.give_back()
        memory.reset_peak()
        resumed = bool(self.workspace.find(step=number))
        clock = StepClock(self.workspace.work / f"{number:02d}-time.json")
        context = self.context(source, sink, clock)
        torch.manual_seed(self.recipe.seed)
        context.progress = self.progress
        context.joined = lambda: processes.joined(number)
        context.report = lambda stage, index, count, _note: self.progress.update(
            f"{name} ({stage})", index + 1, count
        )
        decision = run_step(method, context)
        event = {
            "event": "step",
            "step": number,
            "method": method.name,
            **clock.totals(),
            "planned_bytes": self.plan.steps[number].peak_bytes,
            "planned_seconds": self.plan.steps[number].seconds,
            "resumed": resumed,
            "groups": context.groups,
            "decision": decision,
        }
        self.workspace.append(event)
        self.state, self._source = sink.state, context.source

    def sink(self, number: int, source: StreamedModel, kind: type[JournalSink]) -> JournalSink:
        """Where a step's blocks go, and what its journal says."""
        name = self.recipe.steps[number].name
        return kind(self.workspace, number, name, self.state, source.anatomy, self.storage)

    def context(
        self, source: StreamedModel, sink: JournalSink, clock: StepClock | None = None
    ) -> StepContext:
        """What a step works with."""

        def guard() -> None:
            memory.check_limit(self.limit)
            if clock is not None:
                clock.note()

        return StepContext(
            source,
            self.calibration.batches if self.calibration else [],
            self.scratch,
            labels=self.calibration.labels if self.calibration else None,
            folder=sink.folder / "training",
            seed=self.recipe.seed,
            compute=getattr(torch, self.compute),
            storage_dtype=self.storage.dtype,
            sink=sink,
            guard=guard,
            precision=settled_precision(self.workspace, self.recipe, self.device),
            original=self._original(),
        )

    def _original(self) -> Original | None:
        """The model that the recipe began with, where a step asks for it."""
        if not any(uses_original(method.passes()) for method in self.recipe.steps):
            return None
        state = self.plan.state
        return Original(lambda: state.streamed(self.device), state.load)

    def write(self) -> None:
        """Assemble the checkpoint and prove that it is the model."""
        if not self.recipe.steps:
            return
        if not self.workspace.find(event="written"):
            export(
                self.state,
                self.plan.source,
                self.workspace.model,
                self.storage,
                parse_size(self.recipe.output.max_shard_size),
            )
            export_masks(self.state, self.workspace.model, self._mask_base())
            files = model_digests(self.workspace)
            self.workspace.append({"event": "written", "files": files})
        if not self.workspace.find(event="verified"):
            memory.give_back()
            proof = check_export(
                self.state,
                self.workspace.model,
                self.storage,
                self.scratch,
                self.device,
                *self._proof(),
                imports=self.recipe.imports,
            )
            self.workspace.append({"event": "verified", **proof})

    def _mask_base(self) -> str:
        """Digest of the checkpoint that the result's masks fit; none after a change of shape."""
        shaping = {DEPTH, WIDTH, MODULES}
        return "" if any(shaping & set(m.writes) for m in self.recipe.steps) else self.digest

    def _proof(self) -> tuple[bool, bool]:
        """Whether the proof may load the result whole, and in a process of its own.

        Whole: only within the peak that the plan has stated. A run that evaluates needs that much
        anyway; one that only streams must not take more for its last check than for all its work.
        Small models always fit. A process of its own, where one is called for, holds what it loads
        instead of this one, on top of what an interpreter takes; both together have to stay within
        the memory that the run may use.
        """
        needed = 1.5 * 4 * self.plan.result.parameters
        budget = self.plan.peak_bytes if self.limit is None else self.limit
        here = memory.resident()
        whole = needed < max(budget - here, _ALWAYS_FITS)
        free = memory.available() if self.limit is None else self.limit - here
        fits = fresh.BASE_BYTES + (needed if whole else 0) < free
        return whole, fits and fresh.needs_fresh_process(self.state.config)

    def export(self) -> None:
        """Write the result for the other runtimes that the recipe names."""
        result = self.workspace.model if self.recipe.steps else self.plan.source.folder
        export_result(self.workspace, self.recipe, result, self.progress)

    def report(self) -> Any:
        """Evaluate what was written, put all of it into the report and the cards."""
        report = None
        if self.evaluator is not None:
            report = self.evaluator.report(self.calibration, self.command)
        homes = {"torch": self.workspace.model} if self.recipe.steps else {}
        for runtime, home in (homes | exported_places(self.workspace)).items():
            if home.is_dir():  # a GGUF file says of itself what it is
                card = model_card(
                    self.recipe.name, self.plan.source, self.recipe.steps, self.state.config,
                    report, runtime,
                )  # fmt: skip
                write_atomically(home / CARD, card)
        return report


def settled_precision(workspace: Workspace, recipe: Recipe, device: torch.device) -> Precision:
    """What ``precision: auto`` means in all trainings of a run, wherever it goes on."""
    if recipe.model.train is None and not any(trains(step.passes()) for step in recipe.steps):
        return "auto"  # nothing is trained, nothing has to be measured
    started = workspace.find(event="started")
    # Versions that did not journal the lock went by the processor's flags and recorded nothing.
    begun = flagged_precision(device) if started and "lock" not in started[0] else None
    return workspace.keep("precision", lambda: auto_precision(device), begun=begun)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _version(package: str) -> str | None:
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None
