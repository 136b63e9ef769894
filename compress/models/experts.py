"""Experts of a mixture as linears.

transformers 5 keeps the experts of a layer in three-dimensional parameters [experts, out, in] and
multiplies by slices of them itself. Here such a module is taken apart, in place, into a pair of
linears for each expert, through which its tokens are sent one expert after the other: everything
that works on linears then works on each expert, with the inputs that were routed to it. What comes
of it goes back into the three-dimensional form, and under the stock class, wherever all of them are
still plain linears.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from compress.linear.quantized import scheme_of

DOWN = "down_proj"
# Config fields that hold how many experts a token is sent to.
ROUTED = ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "top_k_experts")
_ZEROS = "_compress_zeros"  # where a fused module remembers its linears' patterns of zeros
# The parameters that modules had before they were taken apart: an optimizer may hold them. Weakly,
# for nothing else needs them. Beside the modules, so that their copies do not claim them too.
_PARAMETERS: weakref.WeakKeyDictionary[nn.Module, dict[str, weakref.ref[nn.Parameter]]] = (
    weakref.WeakKeyDictionary()
)


class UnfusedExperts(nn.Module):
    """The forward of experts that are linears; mixed into a model's own class of experts, whose
    activation (``_apply_gate``) and sizes it uses.

    Children are called by the experts' numbers; each has the linears that the stock parameters
    held, under their names: ``gate_up_proj`` (or ``up_proj``) and ``down_proj``.
    """

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Sum of the chosen experts' outputs.

        Args:
            hidden_states: [tokens, hidden].
            top_k_index, top_k_weights: the experts of each token and what they count,
                [tokens, experts a token].
        """
        output = torch.zeros_like(hidden_states)
        for number, expert in self.named_children():
            if not number.isdigit():
                continue
            if hidden_states.is_meta:  # shapes alone do not tell whose tokens are whose
                output = output + self._expert(expert, hidden_states)
                continue
            token, place = torch.where(top_k_index == int(number))
            if len(token):
                made = self._expert(expert, hidden_states[token])
                made = made * top_k_weights[token, place, None]
                output.index_add_(0, token, made.to(output.dtype))
        return output

    def _expert(self, expert: nn.Module, states: torch.Tensor) -> torch.Tensor:
        """One expert's outputs for ``states`` [tokens, hidden]."""
        up = _passed(getattr(expert, _up(self)), states)
        return _passed(
            getattr(expert, DOWN), self._apply_gate(up) if self.has_gate else self.act_fn(up)
        )


def _passed(linear: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """What a linear makes of ``rows`` [tokens, features], each row by itself.

    A matrix, as those who watch experts expect it, or a batch of one sequence where the linear
    rounds its inputs: all rows of a matrix get the same scale (``fake_quantize_tokens``), by which
    a token would depend on the others that were sent to its expert.
    """
    if any(map(_rounds_inputs, linear.modules())):
        return linear(rows.unsqueeze(0)).squeeze(0)
    return linear(rows)


def _rounds_inputs(module: nn.Module) -> bool:
    """Whether it is a linear of ours with 8-bit activations, or one of compressed-tensors."""
    if getattr(getattr(module, "scheme", None), "activation_bits", None) is not None:
        return True
    stock = getattr(module, "quantization_scheme", None)
    return getattr(stock, "input_activations", None) is not None


class Expert(nn.Module):
    """One expert's linears."""


def is_fused(module: nn.Module) -> bool:
    """Whether a module is experts in three-dimensional parameters that can be taken apart."""
    if isinstance(module, UnfusedExperts) or not hasattr(module, "is_transposed"):
        return False
    if not hasattr(module, "has_gate") or getattr(module, "has_post_expert_norm", False):
        return False
    held = [module._parameters.get(name) for name in tensors_of(module)]
    return all(p is not None and p.dim() == 3 and p.is_floating_point() for p in held)


def tensors_of(module: nn.Module) -> tuple[str, str]:
    """Names of the three-dimensional parameters of a module of experts."""
    return _up(module), DOWN


def _up(module: nn.Module) -> str:
    return "gate_up_proj" if module.has_gate else "up_proj"


def unfuse(module: nn.Module) -> None:
    """Take a fused module apart, in place; one that is apart already stays as it is.

    :func:`fuse` gives it the same parameters again where they are still in use.
    """
    if isinstance(module, UnfusedExperts):
        return
    names = tensors_of(module)
    held = {name: module._parameters[name] for name in names}
    biases = {name: module._parameters.get(f"{name}_bias") for name in names}
    zeros = module.__dict__.get(_ZEROS, {})
    experts: dict[str, nn.Module] = {}  # made ahead of any change: it may run out of memory
    for number in range(len(held[DOWN])):
        expert = Expert()
        for name in names:
            weight = slice_of(held[name].data, number, module.is_transposed)
            bias = biases[name]
            linear = nn.Linear(
                weight.shape[1], weight.shape[0], bias=bias is not None, device="meta"
            )
            learns = held[name].requires_grad
            linear.weight = nn.Parameter(weight, requires_grad=learns)
            if bias is not None:
                linear.bias = nn.Parameter(bias.data[number], requires_grad=learns)
            if f"{number}.{name}" in zeros:
                linear.zeros = zeros[f"{number}.{name}"]
            expert.add_module(name, linear)
        experts[str(number)] = expert.train(module.training)
    whole = held | {f"{name}_bias": bias for name, bias in biases.items() if bias is not None}
    _PARAMETERS[module] = {name: weakref.ref(parameter) for name, parameter in whole.items()}
    stock = type(module)
    for name in [*names, *(f"{name}_bias" for name in names)]:
        module._parameters.pop(name, None)
    module.__dict__.pop(_ZEROS, None)
    for number, expert in experts.items():
        module.add_module(number, expert)
    module.__class__ = _unfused_class(stock)


def fuse(module: nn.Module) -> None:
    """Put the experts of a module back into three-dimensional parameters, in place; leaves one
    alone whose linears are no plain ones any more.

    The parameters are those that the module had before, with the values of now, where somebody
    still holds them and they are of the same shape, type and device.
    """
    if not isinstance(module, UnfusedExperts) or not is_plain(module):
        return
    zeros, learns = {}, True
    for name, linear in module.named_modules():
        if isinstance(linear, nn.Linear):
            learns = linear.weight.requires_grad
            if getattr(linear, "zeros", None):
                zeros[name] = linear.zeros
    tensors = {name: tensor.detach() for name, tensor in module.state_dict().items()}
    stacked = fused(tensors, tensors_of(module), module.is_transposed)
    known = _PARAMETERS.pop(module, {})
    for number in [name for name, _ in module.named_children() if name.isdigit()]:
        del module._modules[number]
    for name, tensor in stacked.items():
        parameter = known[name]() if name in known else None
        if parameter is None or not _alike(parameter, tensor):
            parameter = nn.Parameter(tensor)
        elif not tensor.is_meta:
            parameter.data.copy_(tensor)
        module.register_parameter(name, parameter.requires_grad_(learns))
    if zeros:
        module.__dict__[_ZEROS] = zeros
    module.__class__ = type(module).__mro__[2]


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether a tensor can take over the values of another one and be used in its place."""
    return (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)


def is_plain(module: UnfusedExperts) -> bool:
    """Whether all linears of the experts are what they were made as, whatever their values."""
    children = [child for expert in module.children() if isinstance(expert, Expert)
                for child in expert.children()]  # fmt: skip
    return all(type(child) is nn.Linear and scheme_of(child) is None for child in children)


def slice_of(tensor: torch.Tensor, number: int, transposed: bool) -> torch.Tensor:
    """One expert's matrix [out, in] of a three-dimensional parameter; a view where it can be."""
    return tensor[number].t().contiguous() if transposed else tensor[number]


def fused(
    tensors: Mapping[str, torch.Tensor], names: tuple[str, ...], transposed: bool
) -> dict[str, torch.Tensor]:
    """The three-dimensional form of tensors of linears, ``NUMBER.NAME.weight`` and ``.bias``."""
    count = 1 + max(int(name.partition(".")[0]) for name in tensors)
    made: dict[str, torch.Tensor] = {}
    for name in names:
        weights = [tensors[f"{number}.{name}.weight"] for number in range(count)]
        made[name] = torch.stack([w.t() if transposed else w for w in weights]).contiguous()
        if f"0.{name}.bias" in tensors:
            biases = [tensors[f"{number}.{name}.bias"] for number in range(count)]
            made[f"{name}_bias"] = torch.stack(biases)
    return made


def unfuse_all(model: nn.Module) -> None:
    """Take all fused experts of a model apart."""
    for module in list(model.modules()):
        if is_fused(module):
            unfuse(module)


def fuse_all(model: nn.Module) -> None:
    """Put all experts of a model back that can be."""
    for module in list(model.modules()):
        fuse(module)


def unfused_in(module: nn.Module) -> Iterator[tuple[str, UnfusedExperts]]:
    """Path and module of the experts in a block that have been taken apart."""
    for name, inner in module.named_modules():
        if isinstance(inner, UnfusedExperts):
            yield name, inner


def routed_share(config: Any, module: UnfusedExperts) -> float:
    """Share of the experts that a token is sent to, as far as the config says; else 1."""
    count = sum(name.isdigit() for name, _ in module.named_children())
    for field in ROUTED:
        chosen = getattr(config, field, None)
        if isinstance(chosen, int) and 0 < chosen <= count:
            return chosen / count
    return 1.0


@functools.cache
def _unfused_class(stock: type[nn.Module]) -> type[nn.Module]:
    return type(f"Unfused{stock.__name__}", (UnfusedExperts, stock), {"__module__": __name__})
