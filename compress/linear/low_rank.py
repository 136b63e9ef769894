"""A linear map as two thin matrices."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from compress.linear.layer import Layer, LayerSpec, LinearShape
from compress.linear.matrix import matrix


class LowRank(LayerSpec):
    """A linear is a :class:`LowRankLinear` of this rank."""

    kind: Literal["low_rank"] = "low_rank"
    rank: int = Field(ge=1)


class LowRankLinear(Layer):
    """y = second(first(x)): a linear map of rank at most ``rank``, with an optional bias [out].

    The factors are plain linears, so that a later step (rounding them, say) finds what it knows.
    """

    kind: ClassVar[str] = "low_rank"
    Spec: ClassVar[type[LayerSpec]] = LowRank

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.first = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.second = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)

    @property
    def in_features(self) -> int:
        return self.first.in_features

    @property
    def out_features(self) -> int:
        return self.second.out_features

    @property
    def rank(self) -> int:
        return self.first.out_features

    @property
    def bias(self) -> nn.Parameter | None:
        return self.second.bias

    def spec(self) -> LowRank:
        return LowRank(rank=self.rank)

    @classmethod
    def build(cls, spec: LowRank, like: LinearShape) -> LowRankLinear:
        return cls(
            like.in_features, like.out_features, spec.rank, like.bias, like.device, like.dtype
        )

    def parts(self) -> tuple[str, ...]:
        return "first", "second"

    def dense(self) -> torch.Tensor:
        return matrix(self.second) @ matrix(self.first)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(inputs))
