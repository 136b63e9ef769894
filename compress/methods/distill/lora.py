"""Low-rank adapters of the peft library beside linears, and exactly what they add to a weight.

Hu et al. 2021 (LoRA, arXiv 2106.09685): a linear learns W + (alpha / r) B A with thin matrices
A [r, in] and B [out, r], B zero at the start. Where W has zeros that are to stay, what is added is
masked by them while it learns already, so that a merge changes nothing of what was learned
(Munoz et al. 2024, SQFT, arXiv 2410.03750).
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn
from torch.nn import functional

from compress.linear.matrix import is_conv1d
from compress.train.moment import derive_seed

_INSIDE = "linear"


class LoraOptions(BaseModel):
    """The adapters of :class:`.method.Distill`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    rank: int = Field(16, ge=1, description="rows of A and columns of B")
    alpha: float = Field(32.0, gt=0, description="what is added to a weight is (alpha / rank) B A")


class Adapter(nn.Module):
    """A linear with an adapter of peft beside it; stands in its place while the adapter learns.

    Args:
        linear: ``nn.Linear`` or ``Conv1D``; never written to before :meth:`merge`.
        options: of the adapter. seed: of A's values.

    Attributes:
        layer: peft's.
        zeros: of the weight, bool in its layout; None where it has none. They stay zero.
    """

    def __init__(self, linear: nn.Module, options: LoraOptions, seed: int) -> None:
        super().__init__()
        zeros = linear.weight.detach() == 0
        self.zeros = zeros if bool(zeros.any()) else None
        self.layer = _adapted(linear, options, seed)

    @property
    def inner(self) -> nn.Module:
        """The linear itself."""
        return self.layer.get_base_layer()

    def learned(self) -> dict[str, nn.Parameter]:
        """A and B by their names here."""
        return {n: p for n, p in self.named_parameters() if is_adapters(n)}

    def added(self) -> torch.Tensor:
        """What the adapter adds to the weight, in its layout."""
        delta = self.layer.get_delta_weight(self.layer.active_adapters[0])
        return delta if self.zeros is None else delta.masked_fill(self.zeros, 0)

    def merge(self) -> nn.Module:
        """The linear, with what was learned in its weight."""
        with torch.no_grad():
            self.inner.weight.add_(self.added())
        return self.inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.zeros is None:
            return self.layer(x)
        weight = self.inner.weight + self.added()
        return functional.linear(
            x, weight.t() if is_conv1d(self.inner) else weight, self.inner.bias
        )


def is_adapters(name: str) -> bool:
    """Whether a parameter of this name is one that peft has added."""
    return ".lora_" in name


def adapters(module: nn.Module) -> dict[str, Adapter]:
    """Paths of all adapters inside a module."""
    return {n: m for n, m in module.named_modules() if isinstance(m, Adapter)}


def _adapted(linear: nn.Module, options: LoraOptions, seed: int) -> Any:
    """The layer that peft makes of a linear."""
    from peft import LoraConfig, inject_adapter_in_model  # takes seconds to import

    holder = nn.Module()
    holder.add_module(_INSIDE, linear)
    config = LoraConfig(
        r=options.rank, lora_alpha=options.alpha, target_modules=[_INSIDE],
        fan_in_fan_out=is_conv1d(linear),
    )  # fmt: skip
    flags = {name: p.requires_grad for name, p in linear.named_parameters()}
    devices = [linear.weight.device] if linear.weight.is_cuda else []
    with torch.random.fork_rng(devices=devices), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a module without a config is what is meant
        torch.manual_seed(derive_seed(seed, "lora"))
        inject_adapter_in_model(config, holder)
    for name, parameter in linear.named_parameters():
        parameter.requires_grad_(flags[name])  # peft freezes all but what it adds
    return holder.get_submodule(_INSIDE)
