"""What a masked generator generates: a small description kept in the checkpoint's config.json."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from torch import Tensor

from compress.errors import CompressError
from compress.generators.schedules import check_schedule
from compress.models.special_tokens import added_tokens

FIELD = "masked_generation"
_FROZEN = ConfigDict(frozen=True, extra="forbid")


class ClassCondition(BaseModel):
    """A class token at a fixed place of the sequence, never masked and never produced."""

    model_config = _FROZEN

    kind: Literal["class"] = "class"
    offset: int = Field(ge=0, description="id of class 0; class c has id offset + c")
    classes: int = Field(ge=1, description="how many")
    position: int = Field(0, ge=0, description="of the class token in the sequence")
    null: int | None = Field(
        None, description="id that stands for no class, if the model was trained with one"
    )


class MaskedGeneration(BaseModel):
    """How a network that predicts masked tokens is used as a generator.

    Stored as a plain dict under ``config.masked_generation``, so that ``save_pretrained`` and
    ``from_pretrained`` carry it.
    """

    model_config = _FROZEN

    mask_id: int = Field(ge=0)
    vocabulary: int | None = Field(
        None, ge=1, description="ids 0..vocabulary-1 may be produced; None: all of the model's"
    )
    forbidden: tuple[int, ...] = Field(
        (), description="ids that are never produced nor masked, beside the mask"
    )
    condition: ClassCondition | Literal["prompt"] | None = Field(
        None, description="a class token, or prompts in front (LLaDA); None: neither"
    )
    length: int | None = Field(None, ge=1, description="tokens generated, if it is fixed")
    grid: tuple[int, int] | None = Field(
        None, description="rows and columns of the tokens, if they are patches"
    )
    prefix: tuple[int, ...] = Field((), description="ids in front of every sequence ([CLS])")
    suffix: tuple[int, ...] = Field((), description="ids behind every sequence ([SEP])")
    weighting: Literal["maskgit", "mdlm", "llada"] = Field(
        "mdlm", description="training loss: mean over masked tokens, or likelihood bound (1/t)"
    )
    schedule: str = Field("cosine", description="used to sample by default")
    shift: bool = Field(False, description="the logits at position i predict token i + 1 (Dream)")

    @field_validator("schedule")
    @classmethod
    def _known(cls, value: str) -> str:
        try:
            return check_schedule(value, even=True)
        except CompressError as error:  # pydantic reports what is a ValueError
            raise ValueError(str(error)) from None

    @classmethod
    def of(cls, model: Any, tokenizer: Any = None) -> MaskedGeneration:
        """Read the description of a model, or derive one for a plain masked language model.

        Args:
            model: a model of transformers, or its config.
            tokenizer: needed to derive a description: its mask token, special tokens and the ids
                it puts around a text.

        Raises:
            CompressError: a description that does not fit the model, a causal model that is not
                marked bidirectional, or a model without a mask token.
        """
        config = getattr(model, "config", model)
        stored = getattr(config, FIELD, None)
        spec = cls._derive(model, tokenizer) if stored is None else cls._parse(stored)
        spec.check(model)
        return spec

    @classmethod
    def _parse(cls, stored: Any) -> MaskedGeneration:
        if isinstance(stored, cls):
            return stored
        try:
            return cls.model_validate(stored)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, (FIELD, *first["loc"])))
            raise CompressError(
                f"a valid description in config.json: {first['msg']}", repr(first["input"])[:200],
                "Correct it", where=place,
            ) from None  # fmt: skip

    @classmethod
    def _derive(cls, model: Any, tokenizer: Any) -> MaskedGeneration:
        config = getattr(model, "config", model)
        mask = getattr(tokenizer, "mask_token_id", None)
        if mask is None:
            raise CompressError(
                f"a mask token: `{FIELD}` in config.json, or a tokenizer with one",
                "no tokenizer" if tokenizer is None else "a tokenizer without one",
                "Only models that were trained with a mask token are masked generators",
                where=FIELD,
            )
        special = {int(i) for i in tokenizer.all_special_ids} - {mask}
        size, known = _vocabulary(config), len(tokenizer)
        prefix, suffix = added_tokens(tokenizer)
        return cls(
            mask_id=mask, forbidden=tuple(sorted(special)), prefix=prefix, suffix=suffix,
            vocabulary=known if size and known < size else None,
        )  # fmt: skip

    def without_frame(self) -> MaskedGeneration:
        """The same with nothing around a sequence."""
        return self.model_copy(update={"prefix": (), "suffix": ()})

    def store(self, config: Any) -> None:
        """Write the description into a config.

        Raises:
            CompressError: it does not fit the config.
        """
        self.check(config)
        setattr(config, FIELD, self.model_dump(mode="json"))

    def check(self, model: Any) -> None:
        """Compare the description with a model or its config.

        Raises:
            CompressError: ids outside the vocabulary, classes among the ids that may be produced, a
                grid of another length, a causal model, or ESM's token dropout.
        """
        _check_direction(model)
        config = getattr(model, "config", model)
        if getattr(config, "token_dropout", False):
            raise CompressError(
                "token_dropout: false in config.json",
                "true: ESM divides by the share of visible tokens, which is zero at the start",
                "Set it to false and train at all mask ratios before you sample", where=FIELD,
            )  # fmt: skip
        size = _vocabulary(config)
        for name, value in self._ids():
            if size is not None and not 0 <= value < size:
                raise CompressError(
                    f"{name} inside the model's vocabulary (0 to {size - 1})", str(value),
                    f"Correct {FIELD} in config.json", where=FIELD,
                )  # fmt: skip
        self._check_condition()
        if self.grid is not None and self.grid[0] * self.grid[1] != self.length:
            raise CompressError(
                f"a grid of {self.length} tokens (length)", f"{self.grid[0]}x{self.grid[1]}",
                f"Correct {FIELD} in config.json", where=FIELD,
            )  # fmt: skip

    def _ids(self) -> list[tuple[str, int]]:
        named = [("a mask id", self.mask_id)]
        for name in ("forbidden", "prefix", "suffix"):
            named += [(f"{name} ids", value) for value in getattr(self, name)]
        if self.vocabulary is not None:
            named.append(("the last id that may be produced", self.vocabulary - 1))
        if isinstance(self.condition, ClassCondition):
            named.append(("the last class", self.condition.offset + self.condition.classes - 1))
            if self.condition.null is not None:
                named.append(("the id of no class", self.condition.null))
        return named

    def _check_condition(self) -> None:
        condition = self.condition
        if not isinstance(condition, ClassCondition):
            return
        classes = range(condition.offset, condition.offset + condition.classes)
        never = {self.mask_id, *self.forbidden}
        shared = [i for i in classes if self._producible(i) and i not in never]
        if shared:
            raise CompressError(
                "class ids apart from the ids that may be produced",
                f"class ids {classes[0]} to {classes[-1]}, of which {shared[0]} may be produced",
                "Set vocabulary to the number of codes", where=FIELD,
            )  # fmt: skip
        if self.mask_id in classes or condition.null in classes or condition.null == self.mask_id:
            raise CompressError(
                "different ids for classes, no class and the mask",
                f"classes {classes[0]} to {classes[-1]}, no class {condition.null}, mask "
                f"{self.mask_id}", f"Correct {FIELD} in config.json", where=FIELD,
            )  # fmt: skip

    def _producible(self, token: int) -> bool:
        return self.vocabulary is None or token < self.vocabulary

    def legal(self, size: int) -> Tensor:
        """Which of ``size`` ids may be produced: bool [size]."""
        legal = torch.ones(size, dtype=torch.bool)
        if self.vocabulary is not None:
            legal[self.vocabulary :] = False
        for token in (self.mask_id, *self.forbidden):
            if token < size:
                legal[token] = False
        return legal

    def class_id(self, number: int | None) -> int:
        """The token of a class; None for "no class".

        Raises:
            CompressError: the model has no classes, no such class, or no token for "no class".
        """
        condition = self.condition
        if not isinstance(condition, ClassCondition):
            raise CompressError(
                "a model with classes", "one without", "Leave the classes out", where="sampler"
            )
        if number is None:
            if condition.null is None:
                raise CompressError(
                    "a class for each sample", "none, of a model trained without 'no class'",
                    "Give classes, and set guidance to 0", where="sampler",
                )  # fmt: skip
            return condition.null
        if not 0 <= number < condition.classes:
            raise CompressError(
                f"a class from 0 to {condition.classes - 1}", str(number), where="sampler"
            )
        return condition.offset + number

    def fixed(self, ids: Tensor) -> Tensor:
        """Positions that are never masked: bool like ``ids`` [rows, length].

        Those are the class token and every token that may not be produced ([CLS], padding, masks).
        """
        size = int(ids.max()) + 1 if ids.numel() else 1
        fixed = ~self.legal(size).to(ids.device)[ids]
        if isinstance(self.condition, ClassCondition):
            fixed[:, self.condition.position] = True
        return fixed


def is_masked_generator(config: Any) -> bool:
    """True for configs that carry a description."""
    return getattr(config, FIELD, None) is not None


def _vocabulary(config: Any) -> int | None:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text, "vocab_size", None)


def _check_direction(model: Any) -> None:
    """Refuse a model that cannot look ahead."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING

    config = getattr(model, "config", model)
    if getattr(config, "is_causal", None) is False:
        return
    names = [type(model).__name__] if config is not model else list(config.architectures or [])
    masked = any(name.endswith("ForMaskedLM") for name in names)
    if not names:
        masked = type(config) in MODEL_FOR_MASKED_LM_MAPPING
    if masked and not getattr(config, "is_decoder", False):
        return
    what = "is_decoder=True" if masked else (names or [config.model_type])[0]
    raise CompressError(
        "a model that sees all tokens: a masked language model, or a causal one trained with "
        "is_causal: false in its config", what,
        "A model trained to see only the past cannot fill masks; adapt it first", where=FIELD,
    )  # fmt: skip
