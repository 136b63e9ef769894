"""What is trained: parameters by name, the optimiser over them, and a moving average of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from compress.errors import CompressError
from compress.train.options import TrainingOptions, learning_rate

Group = dict[str, Any]  # as torch's optimisers take them, with names in place of parameters


def named_groups(
    module: nn.Module,
    chosen: Iterable[nn.Parameter] | Iterable[dict[str, Any]] | None,
) -> list[Group]:
    """Groups of the names of the parameters that are to be trained.

    Args:
        module: owns the parameters.
        chosen: parameters, or groups of them as torch's optimisers take them (``params``, and
            perhaps ``lr``, which the schedule scales, and ``weight_decay``); None for all that
            require gradients. Without groups, parameters with fewer than two dimensions (biases,
            norms) are not decayed.

    Raises:
        CompressError: nothing to train, or a parameter that is not the module's.
    """
    names = {id(p): n for n, p in module.named_parameters()}
    chosen = list(module.parameters() if chosen is None else chosen)
    if chosen and isinstance(chosen[0], dict):
        groups = [{**group, "params": list(group["params"])} for group in chosen]
    else:
        trained = [p for p in chosen if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.dim() >= 2]},
            {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
        ]
    for group in groups:
        if any(id(p) not in names for p in group["params"]):
            raise CompressError("parameters of the module that is trained", "another one")
        group["params"] = [names[id(p)] for p in group["params"]]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise CompressError("parameters to train", "none that require gradients")
    return groups


class Trained:
    """The parameters of a training, their optimiser and their average.

    Args:
        module: owns the parameters.
        groups: from :func:`named_groups`.
        options: of the training.
    """

    def __init__(self, module: nn.Module, groups: list[Group], options: TrainingOptions) -> None:
        owned = dict(module.named_parameters())
        self.parameters = {n: owned[n] for group in groups for n in group["params"]}
        self.options = options
        self.optimiser = torch.optim.AdamW(
            [{**group, "params": [owned[n] for n in group["params"]]} for group in groups],
            lr=options.learning_rate,
            betas=options.betas,
            eps=options.eps,
            weight_decay=options.weight_decay,
            fused=_fusible(self.parameters.values()),
        )
        self._peaks = [group["lr"] for group in self.optimiser.param_groups]
        self.average: dict[str, torch.Tensor] = {}
        if options.ema is not None:
            self.average = {n: p.detach().float().clone() for n, p in self.parameters.items()}

    def gradients(self) -> list[torch.Tensor]:
        """All gradients in a fixed order; zeros where a parameter took no part.

        A parameter may take part in one process's examples only (an expert), and all have to hand
        in the same.
        """
        for parameter in self.parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return [p.grad for p in self.parameters.values()]

    def update(self, step: int, scaler: torch.amp.GradScaler) -> None:
        """One step of the optimiser and of the average; none where float16 has overflowed."""
        share = learning_rate(self.options, step) / self.options.learning_rate
        for group, peak in zip(self.optimiser.param_groups, self._peaks, strict=True):
            group["lr"] = peak * share
        scaler.step(self.optimiser)
        scaler.update()
        # Fused optimisers write without a word, and layers keep what they derive from weights.
        torch.autograd.graph.increment_version(list(self.parameters.values()))
        self.forget_gradients()
        if self.average:
            # Early on the average follows faster, or it would remember where training began.
            decay = min(self.options.ema, (1 + step) / (10 + step))
            for name, parameter in self.parameters.items():
                self.average[name].lerp_(parameter.detach().float(), 1 - decay)

    def forget_gradients(self) -> None:
        """Drop all gradients, whoever made them."""
        self.optimiser.zero_grad(set_to_none=True)

    def settle(self) -> None:
        """Give the parameters their average's values, where there is one."""
        with torch.no_grad():
            for name, value in self.average.items():
                self.parameters[name].copy_(value)

    def state(self) -> dict[str, torch.Tensor]:
        """Everything that the next step depends on, by name."""
        held = {f"parameter.{n}": p for n, p in self.parameters.items()}
        held |= {f"average.{n}": a for n, a in self.average.items()}
        for name, parameter in self.parameters.items():
            for key, value in self.optimiser.state[parameter].items():
                held[f"{key}.{name}"] = value
        return {n: whole(t) for n, t in held.items()}

    def restore(self, held: dict[str, torch.Tensor]) -> None:
        """Take over what :meth:`state` returned."""
        kinds = {n.partition(".")[0] for n in held} - {"parameter", "average", "scaler", "held"}
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(shard(held[f"parameter.{name}"], parameter))
                if self.average:
                    self.average[name].copy_(shard(held[f"average.{name}"], parameter))
                self.optimiser.state[parameter] = {
                    kind: shard(held[f"{kind}.{name}"], parameter) for kind in sorted(kinds)
                }


def _fusible(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether torch's fused AdamW takes these: plain tensors on one CPU or GPU."""
    return all(
        type(p.data) is torch.Tensor and p.is_floating_point() and p.device.type in ("cpu", "cuda")
        for p in parameters
    )


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor as it is, or put together from its shards (all processes have to ask)."""
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def shard(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A whole tensor, placed and cut as another one is; scalars (Adam's step) stay whole."""
    if value.dim() == 0 and like.dim() > 0:
        return value.to(like.device) if like.device.type == "cuda" else value
    if not hasattr(like, "device_mesh"):
        return value.to(like.device)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
