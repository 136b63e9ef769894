"""A linear that keeps its weights packed and computes from them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from compress.linear import tinygemm
from compress.linear.bags import bag_sums, codes_of, kernels, make_table, width_for
from compress.linear.grid import QuantScheme
from compress.linear.layer import Layer, LayerSize, LayerSpec, LinearShape
from compress.linear.routes import Route, fastest, watched
from compress.linear.seen import Seen

# Rows of inputs from which on it never pays to add up codes for each row by itself, and, on GPUs,
# to multiply with what is packed.
_FEW, _FEW_ON_GPU = 8, 64
# Weights that are unpacked at once: 16 MB of float32.
_PIECE = 2**22
# Codes that are added up at once where a scale stands for a whole row: bags run in parallel.
_BAG = 128

_wanted: ContextVar[bool] = ContextVar("packed", default=True)


@contextmanager
def packed_weights(wanted: bool) -> Iterator[None]:
    """Whether checkpoints that are loaded inside the block keep their weights packed."""
    token = _wanted.set(wanted)
    try:
        yield
    finally:
        _wanted.reset(token)


def packing() -> bool:
    """Whether they do."""
    return _wanted.get()


class Packed(LayerSpec):
    """A linear is a :class:`PackedLinear` on this grid."""

    kind: Literal["packed"] = "packed"
    scheme: QuantScheme


class PackedLinear(Layer):
    """y = W x from the codes of W, which stay packed in memory. For inference.

    Two routes lead to the product, in float32 both: adding up codes for each row of inputs, which
    reads a weight's 2, 4 or 8 bits once a row, and multiplying with weights that are unpacked a
    piece at a time. The first wins at few rows; where it ends is measured (``linear/routes.py``).
    Inputs of other types are answered in theirs. Codes of 3 bits take 4, those of 5 to 7 take 8.
    On GPUs the first route is a kernel for 4 bits in bfloat16 (``linear/tinygemm.py``), whose tiles
    are made at the first product and kept beside the table as long as it stays what it is; neither
    copies nor files have them.

    Attributes:
        table: the codes, see ``linear/bags.py``.
        scale: [groups, out] float32.
        zero_point: [groups, out] int8, None where symmetric.
    """

    kind: ClassVar[str] = "packed"
    Spec: ClassVar[type[LayerSpec]] = Packed

    table: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None

    def __init__(
        self,
        codes: torch.Tensor,
        scale: torch.Tensor,
        zero_point: torch.Tensor | None,
        scheme: QuantScheme,
        bias: nn.Parameter | None = None,
    ) -> None:
        """Pack.

        Args:
            codes: [out, in] int8.
            scale, zero_point: [out, groups], as ``linear/grid.py`` has them.
        """
        super().__init__()
        self.out_features, self.in_features = codes.shape
        self.scheme = scheme
        self.register_buffer("table", make_table(codes, scheme.bits))
        self.register_buffer("scale", scale.float().t().contiguous())
        zero_point = None if zero_point is None else zero_point.t().contiguous()
        self.register_buffer("zero_point", zero_point)
        self.bias = bias
        self._tiles: tuple[list[Seen], tinygemm.Tiles] | None = None

    @classmethod
    def build(cls, spec: Packed, like: LinearShape) -> PackedLinear:
        rows, columns, device = like.out_features, like.in_features, like.device
        groups = spec.scheme.groups(columns)
        zero_point = torch.zeros(rows, groups, dtype=torch.int8, device=device)
        return cls(
            torch.zeros(rows, columns, dtype=torch.int8, device=device),
            torch.ones(rows, groups, device=device),
            None if spec.scheme.symmetric else zero_point,
            spec.scheme,
            nn.Parameter(torch.zeros(rows, device=device, dtype=like.dtype)) if like.bias else None,
        )

    def spec(self) -> Packed:
        return Packed(scheme=self.scheme)

    def forget(self) -> None:
        self._tiles = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tiles": None}

    def _apply(self, fn: Callable[..., torch.Tensor], recurse: bool = True) -> PackedLinear:
        self.forget()  # what moves would leave them behind, in memory that is to become free
        return super()._apply(fn, recurse)

    def execution(self) -> str:
        return f"packed {self.scheme.bits}-bit weights"

    def size(self) -> LayerSize:
        weights = self.out_features * self.in_features
        nonzero = weights
        if not self.table.is_meta:
            pieces = self._pieces()
            nonzero = sum(int(self._weights(*piece).count_nonzero()) for piece in pieces)
        return LayerSize(weights, nonzero, weights)

    @property
    def weight(self) -> torch.Tensor:
        """W [out, in], float32, unpacked at each reading: for code that looks at weights."""
        return self.dense()

    def dense(self) -> torch.Tensor:
        return self._weights(0, self.in_features).t().contiguous()

    def codes(self) -> torch.Tensor:
        """The codes [out, in], int8."""
        found = [self._codes(*piece).to(torch.int8) for piece in self._pieces()]
        return torch.cat(found).t().contiguous()

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows ``ids`` [n] of W, float32 [n, in]."""
        width = width_for(self.scheme.bits)
        per = 8 // width
        codes = self.table[:, ids // per]
        if per > 1:
            codes = (codes >> ((ids % per) * width).to(torch.uint8)) & (2**width - 1)
        values = codes.t().float().sub_(2.0 ** (width - 1)).unflatten(1, (len(self.scale), -1))
        if self.zero_point is not None:
            values = values.sub_(self.zero_point[:, ids].t().unsqueeze(-1))
        return values.mul_(self.scale[:, ids].t().unsqueeze(-1)).flatten(1)

    def shared(self, bias: nn.Parameter | None) -> PackedLinear:
        """The same map of the same table, with another bias."""
        other = copy.copy(self)
        other._buffers, other._parameters = dict(self._buffers), {}
        other.bias = bias
        return other

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        rows = inputs.reshape(-1, self.in_features)
        direct = self._direct(rows)
        if direct is None:
            output = self._multiplied(rows)
        else:
            shape = (self.out_features, self.in_features, len(rows))
            key = ("packed", self.scheme, *shape, rows.dtype, rows.device)
            routes = direct, self._multiplied
            output = fastest((*key, torch.get_num_threads()), routes, rows)(rows)
        output = output.to(inputs.dtype).view(*inputs.shape[:-1], self.out_features)
        return output if self.bias is None else output + self.bias.to(inputs.dtype)

    def _direct(self, rows: torch.Tensor) -> Route | None:
        """The way without unpacking, where there are kernels; they know of no gradients."""
        learns = torch.is_grad_enabled() and rows.requires_grad
        if not len(rows) or learns or watched():
            return None
        if len(rows) <= _FEW and kernels(rows.device):
            return self._added
        shape = (self.out_features, self.in_features, self.scheme.bits, self.scheme.group_size)
        tiled = rows.dtype == torch.bfloat16 and tinygemm.fits(*shape)
        if len(rows) <= _FEW_ON_GPU and tiled and tinygemm.has_kernels(rows.device):
            return self._tiled
        return None

    def _tiled(self, rows: torch.Tensor) -> torch.Tensor:
        """By the kernel, from tiles that are made once of what the table is now."""
        tensors = [t for t in (self.table, self.scale, self.zero_point) if t is not None]
        if self._tiles is None or not all(map(Seen.is_still, self._tiles[0], tensors)):
            tiles = tinygemm.tiles(self.codes(), self.scale, self.zero_point)
            self._tiles = [Seen(tensor) for tensor in tensors], tiles
        return tinygemm.product(rows, self._tiles[1])

    def _added(self, rows: torch.Tensor) -> torch.Tensor:
        """Sums over each group, then scales: groups of [tokens, groups, out]."""
        rows = rows.float()
        width = width_for(self.scheme.bits)
        group = self.scheme.group_size
        sums = bag_sums(self.table, width, rows, group or _BAG)[..., : self.out_features]
        if self.zero_point is not None:
            totals = rows.unflatten(1, (len(self.scale), -1)).sum(-1, keepdim=True)
            if group is None:
                sums = sums.sum(1, keepdim=True)
            sums = torch.addcmul(sums, self.zero_point.float(), totals, value=-1)
        if group is None:
            return sums.sum(1).mul_(self.scale)
        return sums.mul_(self.scale).sum(1)

    def _multiplied(self, rows: torch.Tensor) -> torch.Tensor:
        """By way of the weights, a piece of the inputs at a time."""
        pieces = self._pieces()
        if len(pieces) == 1:
            return rows @ self._weights(*pieces[0]).to(rows.dtype)
        output = rows.new_zeros(len(rows), self.out_features, dtype=torch.float32)
        for start, stop in pieces:
            weights = self._weights(start, stop).to(rows.dtype)
            output = output + (rows[:, start:stop] @ weights)
        return output

    def _pieces(self) -> list[tuple[int, int]]:
        """Ranges of inputs to unpack at once, whole groups each."""
        group = self.scheme.group_size or 1
        step = max(1, _PIECE // max(self.out_features, 1) // group) * group
        return [(i, min(i + step, self.in_features)) for i in range(0, self.in_features, step)]

    def _codes(self, start: int, stop: int) -> torch.Tensor:
        width = width_for(self.scheme.bits)
        return codes_of(self.table, width, start, stop)[:, : self.out_features]

    @torch.no_grad()
    def _weights(self, start: int, stop: int) -> torch.Tensor:
        """The weights of inputs ``start`` to ``stop``, float32 [stop - start, out]."""
        group = self.scheme.group_size or self.in_features
        first, last = start // group, -(-stop // group)
        values = self._codes(start, stop).unflatten(0, (last - first, -1))
        if self.zero_point is not None:
            values = values.sub_(self.zero_point[first:last].float().unsqueeze(1))
        return values.mul_(self.scale[first:last].unsqueeze(1)).flatten(0, 1)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.scheme.bits} bits"
