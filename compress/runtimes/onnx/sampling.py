"""Drawing the next token from its distribution."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from compress.errors import CompressError


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        temperature: what logits are divided by.
        top_k: of the k likeliest tokens only; None or 0 of all.
        top_p: of the fewest tokens that have the share p of the probability; None of all.

    Raises:
        CompressError: a value that leaves no token to draw from.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise CompressError(
                "a temperature above 0", str(self.temperature),
                "Use do_sample=False for the likeliest token",
            )  # fmt: skip
        if self.top_k is not None and self.top_k < 0:
            raise CompressError("top_k of 1 or more tokens, or None for all", str(self.top_k))
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise CompressError("top_p above 0 and at most 1", str(self.top_p))

    def draw(self, logits: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """One token [batch] of logits [batch, vocabulary]."""
        logits = logits / self.temperature
        if self.top_k:
            least = logits.topk(min(self.top_k, logits.shape[-1])).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        probabilities = logits.softmax(-1)
        if self.top_p is not None:
            ordered, order = probabilities.sort(descending=True)
            kept = ordered.cumsum(-1) - ordered < self.top_p
            probabilities = torch.zeros_like(ordered).scatter(-1, order, ordered * kept)
        return torch.multinomial(probabilities, 1, generator=generator)[:, 0]
