"""Model inputs of unequal length, kept end to end and padded batch by batch; and images, which are
all of one size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from compress.models.images import PIXELS

Batch = dict[str, torch.Tensor]
IDS, MASK, LABELS = "input_ids", "attention_mask", "labels"
IGNORED = -100  # label of a token that has none, as in transformers


class Rows:
    """Sequences of tokens, each with a label or without; examples of a training, too.

    Args:
        sequences: input name -> the values of each row, integers [n]; ``input_ids`` among them,
            and ``labels`` where each token has one (:data:`IGNORED`: none).
        labels: of the rows, [rows] or None.
        padding: token id behind the end of shorter rows; labels are padded with :data:`IGNORED`,
            other inputs with 0.

    Attributes:
        lengths: tokens of each row, int64 [rows].
        flat: input name -> the values of all rows, one behind the other, int32 [tokens].
    """

    def __init__(
        self,
        sequences: Mapping[str, Sequence[torch.Tensor | Sequence[int]]],
        labels: torch.Tensor | None = None,
        padding: int = 0,
    ) -> None:
        self.labels, self.padding = labels, padding
        self.lengths = torch.tensor([len(row) for row in sequences[IDS]], dtype=torch.int64)
        self._starts = self.lengths.cumsum(0) - self.lengths
        self.flat = {
            name: torch.cat([torch.as_tensor(row, dtype=torch.int32) for row in rows])
            for name, rows in sequences.items()
        }

    @classmethod
    def of_batches(cls, batches: Iterable[Batch], padding: int = 0) -> Rows:
        """The rows of batches, without their padding."""
        sequences: dict[str, list[torch.Tensor]] = {}
        labels: list[torch.Tensor] = []
        for batch in batches:
            shape = batch[IDS].shape
            seen = batch.get(MASK, torch.ones(shape, device=batch[IDS].device)).bool()
            for name, values in batch.items():
                if name != MASK and values.shape == shape:
                    rows = (row[kept].cpu() for row, kept in zip(values, seen, strict=True))
                    sequences.setdefault(name, []).extend(rows)
            if LABELS in batch and batch[LABELS].shape != shape:
                labels.append(batch[LABELS].cpu())
        return cls(sequences, torch.cat(labels) if labels else None, padding)

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def ids(self) -> torch.Tensor:
        """All tokens, one row behind the other, int64 [tokens]."""
        return self.flat[IDS].long()

    def chosen(self, indices: torch.Tensor) -> Rows:
        """The rows of these numbers (int64 [n]), in their order."""
        parts = {name: flat.split(self.lengths.tolist()) for name, flat in self.flat.items()}
        sequences = {n: [rows[i] for i in indices.tolist()] for n, rows in parts.items()}
        labels = None if self.labels is None else self.labels[indices]
        return Rows(sequences, labels, self.padding)

    def get(self, indices: torch.Tensor) -> Batch:
        """The rows of these numbers (int64 [n]), padded to the longest of them."""
        lengths = self.lengths[indices]
        positions = torch.arange(int(lengths.max()))
        seen = positions < lengths[:, None]
        places = (self._starts[indices, None] + positions) * seen
        fill = {IDS: self.padding, LABELS: IGNORED}
        batch = {
            name: flat[places].long().masked_fill(~seen, fill.get(name, 0))
            for name, flat in self.flat.items()
        }
        if not bool(seen.all()):
            batch[MASK] = seen.long()
        if self.labels is not None:
            batch[LABELS] = self.labels[indices]
        return batch


class ImageRows:
    """Images, each with a label or without; asked for like :class:`Rows`.

    Args:
        pixels: makes the inputs of some images, by their numbers (int64 [n]): float32 [n, channels,
            height, width]. Images can be many: they are made when they are asked for.
        labels: of the images, [rows] or None.
        count: of images.
        tokens: that the model makes of an image.
        digest: sha256 of all that decides the inputs, labels aside.

    Attributes:
        lengths: tokens of each image, int64 [rows].
        flat: nothing: no token has a label.
    """

    def __init__(
        self,
        pixels: Callable[[torch.Tensor], torch.Tensor],
        labels: torch.Tensor | None,
        count: int,
        tokens: int = 1,
        digest: str = "",
    ) -> None:
        self.pixels, self.labels, self.digest = pixels, labels, digest
        self.lengths = torch.full((count,), tokens, dtype=torch.int64)
        self.flat: dict[str, torch.Tensor] = {}

    @classmethod
    def of_batches(cls, batches: Iterable[Batch]) -> ImageRows:
        """The images of batches."""
        batches = list(batches)
        held = torch.cat([batch[PIXELS].cpu() for batch in batches])
        labels = [batch[LABELS].cpu() for batch in batches if LABELS in batch]
        whole = torch.cat(labels) if len(labels) == len(batches) else None
        return cls(lambda indices: held[indices], whole, len(held))

    def __len__(self) -> int:
        return len(self.lengths)

    def chosen(self, indices: torch.Tensor) -> ImageRows:
        """The images of these numbers (int64 [n]), in their order."""
        labels = None if self.labels is None else self.labels[indices]
        told = f"{self.digest} {indices.tolist()}"
        tokens = int(self.lengths[0])
        return ImageRows(lambda i: self.pixels(indices[i]), labels, len(indices), tokens, told)

    def get(self, indices: torch.Tensor) -> Batch:
        """The images of these numbers (int64 [n])."""
        batch = {PIXELS: self.pixels(indices)}
        return batch if self.labels is None else {**batch, LABELS: self.labels[indices]}
