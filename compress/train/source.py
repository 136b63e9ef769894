"""Where examples come from, and the order in which they come."""

from __future__ import annotations

import hashlib
from typing import Protocol

import torch

from compress.errors import CompressError
from compress.train.moment import derive_seed

_STRETCH = 50  # batches that are sorted by length together: enough that little is padded


class BatchSource(Protocol):
    """Examples that can be asked for by number.

    One that pads its examples has ``lengths``, int64 [n], by which :class:`Order` puts those of
    like length into one batch (:class:`compress.models.inputs.Rows`).
    """

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

    Args:
        count: of examples.
        lengths: of the examples, where short ones are padded: those of like length come together.
            The permutation is cut into stretches of some batches, which are sorted by length, and
            the batches are shuffled. An epoch is then whole batches; which examples are left over
            is another draw in each.
        batch: examples a step.
    """

    def __init__(
        self, count: int, seed: int, lengths: torch.Tensor | None = None, batch: int = 1
    ) -> None:
        if count < 1:
            raise CompressError("at least one example to train on", "none")
        self.examples, self.seed, self.lengths, self.batch = count, seed, lengths, batch
        if lengths is None or count < batch:
            self.lengths, self.count = None, count
        else:
            self.count = count // batch * batch
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
            chosen = torch.randperm(self.examples, generator=generator)[: self.count]
            if self.lengths is not None:
                chosen = self._alike(chosen, generator)
            self._permutation, self._epoch = chosen, epoch
        return self._permutation

    def _alike(self, chosen: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """The same examples with like lengths in each batch, int64 [n]."""
        stretches = chosen.split(_STRETCH * self.batch)
        ordered = [part[self.lengths[part].argsort(stable=True)] for part in stretches]
        batches = torch.cat(ordered).view(-1, self.batch)
        return batches[torch.randperm(len(batches), generator=generator)].flatten()


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
