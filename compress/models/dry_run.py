"""A forward pass on shapes: what the code of a model's class does, without weights or values.

Which tensor enters which module differs by family, and within one by options of its config; names
do not tell. So a model of the same class runs once on the meta device while somebody watches.
That takes tenths of a second, so it is done when somebody asks, once for each class and config.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedConfig, PreTrainedModel

from compress.linear.layer import is_map
from compress.models.experts import unfuse_all

_REMEMBERED = 16  # answers of each function that stay known

_T = TypeVar("_T")
_Asked = Callable[[type[PreTrainedModel], PreTrainedConfig, tuple[str, ...]], _T]


def once_a_class(function: _Asked[_T]) -> _Asked[_T]:
    """Remember what a function of (class, config, paths of blocks) has found."""
    known: dict[tuple[type, str, tuple[str, ...]], _T] = {}

    @functools.wraps(function)
    def asked(cls: type[PreTrainedModel], config: PreTrainedConfig, blocks: tuple[str, ...]) -> _T:
        key = (cls, config.to_json_string(use_diff=False), blocks)
        if key not in known:
            while len(known) >= _REMEMBERED:
                del known[next(iter(known))]
            known[key] = function(cls, config, blocks)
        return known[key]

    return asked


def run_on_shapes(
    cls: type[PreTrainedModel],
    config: PreTrainedConfig,
    blocks: Sequence[str],
    watch: Callable[[int, nn.Module], None],
) -> bool:
    """Run a model of a class once, on the meta device.

    Args:
        blocks: paths of its blocks, in order.
        watch: called with the index and the module of each block first, to register hooks; the
            model is thrown away afterwards.

    Returns:
        Whether the pass went through to its end. A class whose code needs values raises whatever it
        hits; what was seen before holds.
    """
    from transformers.monkey_patching import apply_patches

    config = copy.deepcopy(config)
    # Without kernels of other packages, and without code that depends on values.
    config._attn_implementation = "eager"
    if getattr(config, "_experts_implementation", None) is not None:
        config._experts_implementation = "batched_mm"
    with suppress(Exception), torch.device("meta"), torch.no_grad(), apply_patches(), _Agreeing():
        model = cls(config).eval()
        unfuse_all(model)
        if len(model.get_submodule(blocks[0].rpartition(".")[0])) != len(blocks):
            return False  # the model has lost blocks that its config still counts
        for index, path in enumerate(blocks):
            watch(index, model.get_submodule(path))
        model(**_inputs(model))
        return True
    return False


@once_a_class
def linears_never_called(
    cls: type[PreTrainedModel], config: PreTrainedConfig, blocks: tuple[str, ...]
) -> frozenset[str]:
    """Paths inside a block of the linears that no block calls: the class multiplies by their
    weights itself, and nothing can see what it multiplies.

    Those in a list are left out: which expert is called depends on values. Empty where the class
    cannot run on shapes alone.
    """
    there: set[str] = set()
    called: set[str] = set()

    def watch(_index: int, block: nn.Module) -> None:
        for name, module in block.named_modules():
            if is_map(module) and not any(part.isdigit() for part in name.split(".")):
                there.add(name)
                module.register_forward_pre_hook(lambda _module, _args, name=name: called.add(name))

    return frozenset(there - called) if run_on_shapes(cls, config, blocks, watch) else frozenset()


def _inputs(model: PreTrainedModel) -> dict[str, Any]:
    accepted = inspect.signature(type(model).forward).parameters
    config = model.config
    given: dict[str, Any] = {}
    if "input_ids" in accepted:
        given["input_ids"] = torch.ones(1, 4, dtype=torch.long)
        if "attention_mask" in accepted:
            given["attention_mask"] = torch.ones(1, 4, dtype=torch.long)
    else:
        given["pixel_values"] = torch.ones(
            1, config.num_channels, config.image_size, config.image_size
        )
    if "use_cache" in accepted:
        given["use_cache"] = False
    return given


class _Agreeing(TorchDispatchMode):
    """Answers yes where code asks a tensor without values: whether a mask is all ones, say."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return args[0].dtype == torch.bool or 1
        return func(*args, **(kwargs or {}))
