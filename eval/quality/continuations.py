"""A few beginnings of the evaluation text as a model goes on with them: to be read, not scored."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import LongTensor, nn

from compress.models.kind import takes_key_values
from compress.models.positions import positions_of

PROMPT, LENGTH = 24, 32  # tokens


class Continuation(BaseModel):
    """A beginning, and the likeliest next tokens one by one (greedy)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: str
    text: str = Field(description=f"{LENGTH} tokens, or fewer where the model ends")


@torch.no_grad()
def continuations(
    model: nn.Module,
    tokenizer: Any,
    tokens: LongTensor,
    count: int,
    prefix: tuple[int, ...] = (),
) -> tuple[Continuation, ...]:
    """Let a causal model go on with beginnings that lie evenly in a text.

    Args:
        tokens: of the text, int64 [n]; of a short text there are fewer beginnings.
        prefix: special tokens in front of each beginning.
    """
    room = (positions_of(model.config) or 1 << 30) - len(prefix) - PROMPT
    count = min(count, len(tokens) // PROMPT)
    if count < 1 or room < 1:
        return ()
    starts = [i * (len(tokens) - PROMPT) // max(1, count - 1) for i in range(count)]
    prompts = torch.stack([tokens[start : start + PROMPT] for start in starts])
    front = torch.tensor(prefix, dtype=prompts.dtype).expand(count, -1)
    given = torch.cat([front, prompts], dim=1).to(model.device)
    # Some runtimes have one cache, for one sequence.
    batches = given.split(1) if getattr(model, "one_by_one", False) else (given,)
    training = model.training
    model.eval()
    try:
        made = [_greedy(model, batch, min(LENGTH, room)) for batch in batches]
    finally:
        model.train(training)
    end = getattr(tokenizer, "eos_token_id", None)
    found = torch.cat(made).tolist()
    return tuple(
        Continuation(prompt=tokenizer.decode(prompt), text=tokenizer.decode(_until(ids, end)))
        for prompt, ids in zip(prompts.tolist(), found, strict=True)
    )


def _greedy(model: nn.Module, given: torch.Tensor, count: int) -> torch.Tensor:
    """The likeliest next tokens [batch, count] behind given ones [batch, tokens]."""
    row, cached = given, takes_key_values(model)
    fed, cache = given, None
    for _ in range(count):
        extra = {"past_key_values": cache, "use_cache": True} if cached else {}
        output = model(input_ids=fed, **extra)
        made = output.logits[:, -1:].argmax(-1)
        row = torch.cat([row, made], dim=1)
        # Without keys and values to go on from, all tokens are read again.
        cache = getattr(output, "past_key_values", None) if cached else None
        fed = row if cache is None else made
    return row[:, given.shape[1] :]


def _until(ids: list[int], end: int | None) -> list[int]:
    return ids[: ids.index(end)] if end in ids else ids
