"""What methods may know about the inputs of a linear: moments, the Gram matrix, ranges."""

from __future__ import annotations

import torch

from compress.errors import CompressError
from compress.linear.gram import add_gram

NOTHING, MOMENTS, MAGNITUDES, GRAM, RANGES = "nothing", "moments", "magnitudes", "gram", "ranges"

# What of a linear map of the inputs follows from none of what is known of the inputs.
UNDERIVABLE = (MAGNITUDES, RANGES)


def statistics_bytes(kind: str, width: int, derivable: bool = False) -> int:
    """Bytes that :class:`InputStatistics` of these arguments hold."""
    if kind == NOTHING:
        return 0
    if holds_gram(kind, derivable):
        return 4 * width**2
    return 4 * width * (2 if kind == RANGES else 1)


def holds_gram(kind: str, derivable: bool = False) -> bool:
    """Whether :class:`InputStatistics` of these arguments hold a Gram matrix."""
    return kind == GRAM or (kind == MOMENTS and derivable)


class InputStatistics:
    """What is known of the rows of all inputs seen, [rows, width]; all of it in float32.

    Args:
        width: number of input features.
        kind: ``moments`` (mean squares of each feature), ``magnitudes`` (mean absolute values),
            ``gram`` (X^T X [width, width], from which the mean squares follow) or ``ranges`` (the
            least and the largest value of each feature).
        device: where the numbers live.
        derivable: the statistics of a linear map of the inputs can be asked for
            (:meth:`through`), which takes the Gram matrix in place of moments; of no effect on
            magnitudes and ranges, which cannot be derived.
    """

    def __init__(
        self,
        width: int,
        kind: str,
        device: torch.device | str = "cpu",
        derivable: bool = False,
    ) -> None:
        kinds = (MOMENTS, MAGNITUDES, GRAM, RANGES)
        if kind not in kinds:
            raise ValueError(f"statistics are {', '.join(kinds[:-1])} or {RANGES}, not {kind!r}")
        self.width, self.kind, self.count = width, kind, 0
        self._gram = self._square = self._absolute = self._least = self._largest = None
        if holds_gram(kind, derivable):
            self._gram = torch.zeros(width, width, device=device)
        elif kind == MOMENTS:
            self._square = torch.zeros(width, device=device)
        elif kind == MAGNITUDES:
            self._absolute = torch.zeros(width, device=device)
        elif kind == RANGES:
            self._least = torch.full((width,), torch.inf, device=device)
            self._largest = torch.full((width,), -torch.inf, device=device)

    def update(self, x: torch.Tensor) -> None:
        """Add inputs ``x`` [..., width]."""
        rows = x.detach().reshape(-1, self.width)
        self.count += rows.shape[0]
        if self._least is not None and len(rows):
            self._least = torch.minimum(self._least, rows.amin(0).float())
            self._largest = torch.maximum(self._largest, rows.amax(0).float())
        if self._absolute is not None:
            self._absolute += rows.abs().sum(0, dtype=torch.float32)
        if self._square is not None:
            values = rows.float()
            # A copy is squared in place: half of the time would go into memory that is new.
            squares = values.square() if values is rows else values.square_()
            self._square += squares.sum(0)
        if self._gram is not None:
            add_gram(self._gram, rows)

    @property
    def gram(self) -> torch.Tensor:
        """X^T X, symmetric [width, width] (not divided by the count)."""
        gram = self._collected(self._gram, "the Gram matrix")
        whole = torch.triu(gram)
        whole += torch.triu(gram, 1).t()
        return whole

    @property
    def norm(self) -> torch.Tensor:
        """Root mean square of each feature [width]."""
        square = self._square if self._gram is None else self._gram.diagonal()
        return (self._collected(square, "moments") / max(self.count, 1)).sqrt()

    @property
    def mean_absolute(self) -> torch.Tensor:
        """Mean absolute value of each feature [width] (magnitudes only)."""
        return self._collected(self._absolute, "mean absolute values") / max(self.count, 1)

    @property
    def least(self) -> torch.Tensor:
        """Least value of each feature [width]; infinity where no row was seen (ranges only)."""
        return self._collected(self._least, "ranges")

    @property
    def largest(self) -> torch.Tensor:
        """Largest value of each feature [width]; -infinity where no row was seen (ranges only)."""
        return self._collected(self._largest, "ranges")

    @property
    def span(self) -> tuple[float, float]:
        """Least and largest value of all features (ranges only)."""
        return float(self.least.min()), float(self.largest.max())

    def through(self, weight: torch.Tensor) -> InputStatistics:
        """Statistics of x W^T from those of x; weight [out, width].

        They hold the Gram matrix and what follows from it.

        Raises:
            CompressError: these are magnitudes or ranges.
        """
        if self.kind in UNDERIVABLE:
            raise CompressError(
                "statistics from which those of a linear map of the inputs follow",
                f"{self.kind}, which tell nothing of sums of features",
                "Leave the layers that earlier steps have put in place of linears alone",
            )
        carried = InputStatistics(weight.shape[0], GRAM, weight.device)
        carried._gram, carried.count = weight @ self.gram @ weight.t(), self.count
        return carried

    def keep(self, columns: torch.Tensor) -> None:
        """Forget all features but ``columns``."""
        self.width = len(columns)
        for name in ("_square", "_absolute", "_least", "_largest"):
            values = getattr(self, name)
            if values is not None:
                setattr(self, name, values[columns])
        if self._gram is not None:
            self._gram = self.gram[columns][:, columns]

    @staticmethod
    def _collected(values: torch.Tensor | None, what: str) -> torch.Tensor:
        if values is None:
            raise ValueError(f"these statistics were collected without {what}")
        return values
