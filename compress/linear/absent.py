"""A linear map that is not there: no weights, zeros whatever it is given."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch

from compress.linear.layer import Layer, LayerSpec, LinearShape


class Absent(LayerSpec):
    """A linear is an :class:`AbsentLinear`, of the sizes that it had."""

    kind: Literal["absent"] = "absent"


class AbsentLinear(Layer):
    """y = 0, without weights and bias: what is left of the linears of a sub-layer that was removed.

    The modules around it run as ever: attention over zeros returns zeros, and the stream passes a
    removed sub-layer unchanged, in front of a norm (GPT-2) as behind one (BERT).
    """

    kind: ClassVar[str] = "absent"
    Spec: ClassVar[type[LayerSpec]] = Absent

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.bias = None

    def spec(self) -> Absent:
        return Absent()

    @classmethod
    def build(cls, _spec: LayerSpec, like: LinearShape) -> AbsentLinear:
        return cls(like.in_features, like.out_features)

    def dense(self) -> torch.Tensor:
        return torch.zeros(self.out_features, self.in_features)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs.new_zeros(*inputs.shape[:-1], self.out_features)
