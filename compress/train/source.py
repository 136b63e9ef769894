"""Where examples come from, and the order in which they come."""

from __future__ import annotations

import hashlib
from typing import Protocol

import torch

from compress.errors import CompressError
from compress.train.moment import derive_seed


class BatchSource(Protocol):
    """Examples that can be asked for by number."""

    def __len__(self) -> int:
        """How many there are."""

    def get(self, indices: torch.Tensor) -> dict[str, torch.Tensor]:
        """The examples of these numbers (int64 [n]), stacked along the first dimension."""


class TokenSource:
    """Windows of tokens.

    Args:
        tokens: integer [n, length].
        labels: integer of the same shape, -100 where nothing is to be predicted; None where the
            tokens themselves are the labels.
        attention: 0 where a window is padded, else 1, of the same shape; None where none is.

    Raises:
        CompressError: other shapes, or no window at all.
    """

    def __init__(
        self,
        tokens: torch.Tensor,
        labels: torch.Tensor | None = None,
        attention: torch.Tensor | None = None,
    ) -> None:
        if tokens.dim() != 2 or not len(tokens) or tokens.is_floating_point():
            raise CompressError(
                "integer token ids [windows, length], at least one window",
                f"{tokens.dtype} of shape {list(tokens.shape)}",
            )
        if labels is not None and labels.shape != tokens.shape:
            raise CompressError(
                f"labels of the tokens' shape {list(tokens.shape)}", f"{list(labels.shape)}"
            )
        self.tokens, self.labels, self.attention = tokens, labels, attention

    def __len__(self) -> int:
        return len(self.tokens)

    def get(self, indices: torch.Tensor) -> dict[str, torch.Tensor]:
        batch = {"input_ids": self.tokens[indices].long()}
        if self.labels is not None:
            batch["labels"] = self.labels[indices].long()
        if self.attention is not None:
            batch["attention_mask"] = self.attention[indices].long()
        return batch


class Indices:
    """A source of examples that are numbers: what they stand for is read from files."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def get(self, indices: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"indices": indices}


class Order:
    """Which examples each step sees: all of them once an epoch, shuffled anew for each.

    Position p of training is example ``p % count`` of the permutation that belongs to epoch
    ``p // count``, so any step's examples are known without those before it.
    """

    def __init__(self, count: int, seed: int) -> None:
        if count < 1:
            raise CompressError("at least one example to train on", "none")
        self.count, self.seed = count, seed
        self._epoch, self._permutation = -1, torch.empty(0, dtype=torch.int64)

    def indices(self, start: int, length: int) -> torch.Tensor:
        """Numbers of the examples at positions ``start`` to ``start + length - 1``, int64."""
        parts = []
        while length > 0:
            epoch, offset = divmod(start, self.count)
            part = self._order(epoch)[offset : offset + length]
            parts.append(part)
            start, length = start + len(part), length - len(part)
        return torch.cat(parts)

    def _order(self, epoch: int) -> torch.Tensor:
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "epoch", epoch))
            self._permutation = torch.randperm(self.count, generator=generator)
            self._epoch = epoch
        return self._permutation


def sample_digest(source: BatchSource) -> str:
    """sha256 of a few examples: enough to notice that a folder belongs to other data."""
    count = len(source)
    chosen = torch.tensor(sorted({0, count // 3, count // 2, count - 1}))
    digest = hashlib.sha256()
    for name, tensor in sorted(source.get(chosen).items()):
        values = tensor.detach().cpu().contiguous()
        digest.update(f"{name}:{values.dtype}:{tuple(values.shape)}:".encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
