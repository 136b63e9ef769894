"""Whether a tensor is what it was when something was derived from it."""

from __future__ import annotations

import weakref

import torch


class Seen:
    """A tensor as it was. Held weakly: another one may come to lie where it was."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, self.facts = weakref.ref(tensor), self._facts(tensor)

    def is_still(self, tensor: torch.Tensor) -> bool:
        return self.tensor() is tensor and self.facts == self._facts(tensor)

    @staticmethod
    def _facts(tensor: torch.Tensor) -> tuple[object, ...]:
        # Those that were made for inference alone count no versions.
        version = None if tensor.is_inference() else tensor._version
        return tensor.data_ptr(), version, tensor.dtype, tensor.device
