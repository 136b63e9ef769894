"""The sequences that sampling starts from: conditions known, everything else masked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.errors import CompressError
from compress.generators.denoiser import Denoiser
from compress.generators.description import ClassCondition, MaskedGeneration

WHERE = "sampler"
Prompts = Tensor | Sequence[Sequence[int]]
Classes = Tensor | Sequence[int | None]


@dataclass(frozen=True)
class Start:
    """Rows to fill.

    Attributes:
        ids: int64 [rows, length]; masks are to be filled.
        prompt: bool [rows, length], given tokens that guidance leaves out.
    """

    ids: Tensor
    prompt: Tensor


def start_rows(
    denoiser: Denoiser,
    *,
    count: int | None = None,
    prompts: Prompts | None = None,
    classes: Classes | None = None,
    rows: Tensor | None = None,
    length: int | None = None,
) -> Start:
    """Build the rows from what :func:`compress.generators.sample` is given.

    Raises:
        CompressError: nothing to sample, what does not go together, no length, empty prompts or
            prompts of different lengths, a class that does not exist, too few positions.
    """
    spec = denoiser.spec
    given = [n for n, v in (("rows", rows), ("prompts", prompts), ("classes", classes)) if
             v is not None]  # fmt: skip
    if len(given) > 1 or not (given or count is not None):
        raise CompressError(
            "one of count, prompts, classes and rows", " and ".join(given) or "none", where=WHERE
        )
    if count is not None and count < 1:
        raise CompressError("at least one sample", f"count {count}", where=WHERE)
    if rows is not None:
        start = _partial(rows, spec)
    else:
        start = _fresh(spec, count, prompts, classes, length)
    if count is not None and count != len(start.ids):
        raise CompressError(
            f"count equal to the number of {given[0]} ({len(start.ids)})", str(count), where=WHERE
        )
    size, least, largest = denoiser.vocab_size, int(start.ids.min()), int(start.ids.max())
    if least < 0 or (size is not None and largest >= size):
        raise CompressError(
            f"token ids inside the model's vocabulary (0 to {size - 1 if size else '...'})",
            str(least if least < 0 else largest), "Use the model's own tokenizer", where=WHERE,
        )  # fmt: skip
    limit = denoiser.positions
    if limit is not None and start.ids.shape[1] > limit:
        raise CompressError(
            f"at most {limit} tokens a sequence, the model's positions",
            f"{start.ids.shape[1]} with prompt and special tokens", "Lower the length", where=WHERE,
        )  # fmt: skip
    return start


def _partial(rows: Tensor, spec: MaskedGeneration) -> Start:
    """Rows that the caller has masked; what is visible stays."""
    if rows.dim() != 2 or rows.is_floating_point() or not rows.numel():
        raise CompressError(
            "rows of token ids [samples, length]", f"{rows.dtype} {list(rows.shape)}", where=WHERE
        )
    _check_classes(rows, spec)
    unknown = rows == spec.mask_id
    empty = (unknown.sum(dim=1) == 0).nonzero()
    if len(empty):
        raise CompressError(
            f"a mask token ({spec.mask_id}) in each row", f"none in row {int(empty[0])}",
            "Leave such rows out", where=WHERE,
        )  # fmt: skip
    return Start(rows.long().clone(), ~unknown & ~spec.fixed(rows))


def _check_classes(rows: Tensor, spec: MaskedGeneration) -> None:
    """Refuse rows of a model with classes whose class token is missing."""
    condition = spec.condition
    if not isinstance(condition, ClassCondition):
        return
    classes = range(condition.offset, condition.offset + condition.classes)
    known = {*classes, *(() if condition.null is None else (condition.null,))}
    place = condition.position
    found = rows[:, place].tolist() if rows.shape[1] > place else [None]
    for number, token in enumerate(found):
        if token not in known:
            raise CompressError(
                f"a class token ({classes[0]} to {classes[-1]}) at position {place} of each row",
                f"{token} in row {number}", "Put it there, or give classes", where=WHERE,
            )  # fmt: skip


def _fresh(
    spec: MaskedGeneration,
    count: int | None,
    prompts: Prompts | None,
    classes: Classes | None,
    length: int | None,
) -> Start:
    length = length or spec.length
    if length is None or length < 1 or (spec.length is not None and length != spec.length):
        wanted = "any, as this model leaves it open" if spec.length is None else str(spec.length)
        raise CompressError(
            f"the number of tokens to generate: {wanted}", str(length), "Give length", where=WHERE
        )
    heads = _heads(prompts, spec) if prompts is not None else None
    tokens = _class_tokens(spec, count, classes)
    samples = len(heads) if heads is not None else len(tokens)
    if samples < 1:
        raise CompressError("at least one sample", str(samples), where=WHERE)
    if heads is None:
        heads = torch.empty(samples, 0, dtype=torch.long)

    def repeated(ids: Sequence[int]) -> Tensor:
        return torch.tensor(ids, dtype=torch.long).expand(samples, -1)

    masks = torch.full((samples, length), spec.mask_id)
    ids = torch.cat([repeated(spec.prefix), heads, masks, repeated(spec.suffix)], dim=1)
    prompt = torch.zeros(ids.shape, dtype=torch.bool)
    prompt[:, len(spec.prefix) : len(spec.prefix) + heads.shape[1]] = True
    if isinstance(spec.condition, ClassCondition):
        at = spec.condition.position
        if len(tokens) != samples:
            tokens = tokens.expand(samples)
        ids = torch.cat([ids[:, :at], tokens[:, None], ids[:, at:]], dim=1)
        prompt = torch.cat([prompt[:, :at], prompt.new_zeros(samples, 1), prompt[:, at:]], dim=1)
    return Start(ids, prompt)


def _heads(prompts: Prompts, spec: MaskedGeneration) -> Tensor:
    """Prompts as int64 [samples, tokens]."""
    lists = [list(map(int, prompt)) for prompt in prompts]
    for number, ids in enumerate(lists):
        if not ids:
            raise CompressError(
                "a prompt with at least one token", f"prompt {number}, which is empty",
                "Give count instead of prompts to sample without one", where=WHERE,
            )  # fmt: skip
        if spec.mask_id in ids or min(ids) < 0:
            raise CompressError(
                "prompts of ordinary tokens", f"prompt {number} with {spec.mask_id} (the mask) or "
                "negative ids", "Give rows to fill masks inside a text", where=WHERE,
            )  # fmt: skip
    lengths = {len(ids) for ids in lists}
    if len(lengths) > 1:
        raise CompressError(
            "prompts of one length", f"{min(lengths)} to {max(lengths)} tokens",
            "Sample prompts of equal length together (a seed a row keeps the results the same)",
            where=WHERE,
        )  # fmt: skip
    return torch.tensor(lists, dtype=torch.long).reshape(len(lists), -1)


def _class_tokens(spec: MaskedGeneration, count: int | None, classes: Classes | None) -> Tensor:
    if classes is None and not isinstance(spec.condition, ClassCondition):
        return torch.full((1 if count is None else count,), spec.mask_id)
    if classes is None:
        return torch.full((1 if count is None else count,), spec.class_id(None))
    numbers = classes.tolist() if isinstance(classes, Tensor) else list(classes)
    ids = [spec.class_id(None if n is None else int(n)) for n in numbers]
    return torch.tensor(ids, dtype=torch.long)
