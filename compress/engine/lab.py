"""Where models are measured, for runs, Python and the command line alike, and what a report says of
where they came from."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from compress.eval import EvaluationResult, EvaluationSpec
from compress.eval import evaluate as measure_model
from compress.eval.cache import Figures
from compress.eval.report import Report, environment, with_findings, write_report
from compress.models.identity import model_digest
from compress.models.sources.source import Source, load_model, resolve
from compress.planning.evaluation_inputs import EvaluationInputs
from compress.system.imports import imported
from compress.system.progress import Progress

# Packages that a model's class may be of: what decides its figures is told by version or digest.
_KNOWN_CODE = frozenset(
    {"abc", "builtins", "compress", "huggingface_hub", "torch", "transformers", "typing"}
)


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

    def resolve(self, source: str | Path, revision: str | None = None) -> Source:
        """Find or fetch a model."""
        return resolve(
            source, revision=revision, cache_dir=self.cache_dir,
            trust_remote_code=self.trust_remote_code,
        )  # fmt: skip

    def load(self, folder: Path) -> PreTrainedModel:
        """A checkpoint's model in float32, the type that everything is evaluated in."""
        return load_model(
            folder, dtype=torch.float32, device=self.device,
            trust_remote_code=self.trust_remote_code,
        )  # fmt: skip

    def figures(self, folder: Path, spec: EvaluationSpec) -> Figures | None:
        """What is known of a checkpoint; None where its figures are to be measured in any case.

        Code that comes with a checkpoint may read whatever it likes, so no digest tells what it
        computes: figures of such models are never kept. Code that a recipe imports is part of what
        decides a figure: all that was imported into this process, for any of it may have changed
        what another's classes compute.
        """
        if not spec.cache or self.trust_remote_code:
            return None
        return Figures(model_digest(folder), self.cache_dir, imported().values())

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
            figures: of that folder; None measures everything, and so does a model whose class is
                of code that no digest tells of.
        """
        text = inputs.text
        if not _code_known(type(model)):
            figures = None
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


def _code_known(model_class: type) -> bool:
    """Whether a model's class and its bases are of libraries whose versions are part of a figure's
    key, of this package, or of a file that was imported with its digest."""
    digests = imported()

    def known(module: str) -> bool:
        if module.partition(".")[0] in _KNOWN_CODE or module in digests:
            return True
        file = getattr(sys.modules.get(module), "__file__", None)
        return file is not None and str(Path(file).resolve()) in digests

    return all(known(base.__module__) for base in model_class.__mro__)


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
