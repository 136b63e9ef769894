"""A family that its user describes: in a recipe, in code that a recipe imports, in a package.

A description goes into config.json of the result (``compress_family``), so that what was made with
it loads wherever this toolkit is, and into the run's lock with the rest of the recipe. It is not
vouched for as the table is: what rests on it is rehearsed on a miniature.
"""

from __future__ import annotations

import functools
import importlib
import re
from dataclasses import replace
from importlib.metadata import entry_points
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from compress.errors import CompressError, did_you_mean
from compress.models.families import FAMILIES, Family, inferred_family

KEY = "compress_family"  # in config.json
GROUP = "compress.families"  # of entry points: model type = module:DESCRIPTION
Role = Literal["qkv", "attention_out", "up", "down"]
Layout = Literal["separate", "concatenated", "interleaved"]
# Names of fields of the config.
_FIELDS = ("layers", "heads", "kv_heads", "head_dim", "ffn", "experts")

_registered: dict[str, FamilySpec] = {}


class FamilySpec(BaseModel):
    """How a model type names its parts; what is left out is inferred, or as in another family."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    like: str | None = Field(None, description="a family that it is like but for what is said here")
    roles: dict[Role, str] = Field(
        default_factory=dict,
        description="regular expressions of the ends of linears' paths inside a block, by role: "
        "qkv, attention_out, up (of the FFN, gates too), down",
    )
    layers: str | None = Field(None, description="config field with the number of blocks")
    heads: str | None = Field(None, description="config field with the number of heads")
    kv_heads: str | None = Field(None, description="config field with the key/value heads")
    head_dim: str | None = Field(
        None, description="config field that fixes the size of a head whatever their number"
    )
    ffn: str | None = Field(None, description="config field with the FFN's width")
    experts: str | None = Field(
        None, description="config field with the number of routed experts of a layer"
    )
    qkv_layout: Layout | None = Field(
        None, description="query, key and value: a linear each, rows [q | k | v], or rows by head"
    )
    up_layout: Literal["separate", "concatenated"] | None = Field(
        None, description="gate and up: a linear each, or rows [gate | up]"
    )
    attributes: dict[str, dict[str, str]] | None = Field(
        None,
        description="module path in a block -> attribute -> size that it holds: heads, kv_heads, "
        "attention_width or ffn; for classes whose forward reads sizes from attributes",
    )
    blocks: str | None = Field(None, description="name of the list of blocks, where there are more")
    fixed_first: int | None = Field(
        None, ge=0, description="blocks at the start that are built unlike the others"
    )
    fixed_heads: bool | None = Field(
        None, description="the number of heads is read outside the blocks too"
    )
    fixed_layers: bool | None = Field(
        None, description="weights outside the blocks have a row for each block"
    )

    @field_validator("roles")
    @classmethod
    def _compiles(cls, value: dict[Role, str]) -> dict[Role, str]:
        for role, pattern in value.items():
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"a regular expression for {role} ({error})") from None
        return value

    @model_validator(mode="after")
    def _known(self) -> FamilySpec:
        if self.like is not None and self.like not in FAMILIES:
            raise ValueError(f"a known family: {did_you_mean(self.like, sorted(FAMILIES))}")
        return self

    def told(self) -> dict[str, Any]:
        """What was said, as plain data."""
        return self.model_dump(exclude_none=True, exclude_defaults=True)

    def family(self, config: Any) -> Family:
        """The family of a model with this config."""
        base = FAMILIES[self.like] if self.like is not None else inferred_family(config)
        said = self.told()
        said.pop("like", None)
        return replace(base, **said)


def register_family(model_type: str, **description: Any) -> None:
    """Describe a model type that the table of families does not have, in this process.

    Args:
        model_type: as in config.json.
        description: fields of :class:`FamilySpec`.

    Raises:
        CompressError: a type of the table, an unknown field, or a value that does not fit.
    """
    _refuse_known(model_type)
    _registered[model_type] = parse_family(description, f"the family {model_type}")


def parse_family(description: Any, where: str) -> FamilySpec:
    """Check a description.

    Raises:
        CompressError: naming the field.
    """
    try:
        return FamilySpec.model_validate(description)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            fix = did_you_mean(name, sorted(FamilySpec.model_fields))
            raise CompressError("known fields only", repr(name), fix, where=where) from None
        told = first["msg"].removeprefix("Value error, ")
        raise CompressError(
            f"{name or 'a description'} to be valid ({told})", repr(first["input"])[:80],
            where=where,
        ) from None  # fmt: skip


def described_family(config: Any, model_type: str) -> Family | None:
    """The family that a config carries or somebody has registered; None where none is described."""
    carried = getattr(config, KEY, None)
    spec = parse_family(carried, KEY) if carried else registered_family(model_type)
    return None if spec is None else spec.family(config)


def registered_family(model_type: str) -> FamilySpec | None:
    """What code or an installed package says of a model type."""
    if model_type in _registered:
        return _registered[model_type]
    target = _installed().get(model_type)
    if target is None:
        return None
    module, _, name = target.partition(":")
    try:
        value = getattr(importlib.import_module(module), name)
    except Exception as error:  # a stranger's module may raise anything
        raise CompressError(
            f"the family {model_type!r} of an installed package ({target})",
            f"{type(error).__name__}: {error}", "Repair or uninstall that package",
        ) from error  # fmt: skip
    return value if isinstance(value, FamilySpec) else parse_family(value, target)


def attach(config: Any, model_type: str, description: FamilySpec | None = None) -> None:
    """Let a config carry its family's description, where there is one.

    Args:
        description: of a recipe; by default what is registered.

    Raises:
        CompressError: a description of a type of the table, or fields that the config lacks.
    """
    if description is not None:
        _refuse_known(model_type)
    spec = description or registered_family(model_type)
    if spec is None or model_type in FAMILIES:
        return
    names = {*vars(config), *(getattr(config, "attribute_map", None) or {})}
    for option in _FIELDS:
        field = getattr(spec, option)
        if field is not None and field not in names:
            known = sorted(name for name in names if not name.startswith("_"))
            raise CompressError(
                f"a field of {type(config).__name__} as {option}", repr(field),
                did_you_mean(field, known), where="model.family",
            )  # fmt: skip
    setattr(config, KEY, spec.told())


def _refuse_known(model_type: str) -> None:
    if model_type in FAMILIES:
        raise CompressError(
            "a model type without an entry in the table of families", repr(model_type),
            "Leave the description out: `compress methods --families` lists those with one",
            where="model.family",
        )  # fmt: skip


@functools.cache
def _installed() -> dict[str, str]:
    return {point.name: point.value for point in entry_points(group=GROUP)}
