"""Which norm a linear reads, seen in a forward pass.

Where norms stand differs by family, and within one by options of its config (OPT's may come before
or after): names do not tell. So a model of the same class runs once on the meta device, shapes
without values, and what counts is whether the very tensor that a norm returns is the one that
enters the linear. That takes tenths of a second, so it is done when somebody asks, once for each
class and config.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedConfig, PreTrainedModel

from compress.linear.layer import is_map

_REMEMBERED = 16  # models whose norms stay known
_known: dict[tuple[type, str, tuple[str, ...]], list[dict[str, str]]] = {}


class NormFinder:
    """Finds the norms of the blocks of one model; does nothing until it is asked.

    Args:
        model: its class and config are kept, none of its weights.
        blocks: paths of its blocks, in order.
    """

    def __init__(self, model: PreTrainedModel, blocks: Sequence[str]) -> None:
        self._class, self._config, self._blocks = type(model), model.config, tuple(blocks)

    def find(self, index: int, linears: Sequence[str]) -> str | None:
        """Path inside block ``index`` of the norm that all these linears of it read.

        None where they read something else, where the norm is outside the block, and where the
        class cannot run on shapes alone.
        """
        key = (self._class, self._config.to_json_string(use_diff=False), self._blocks)
        if key not in _known:
            while len(_known) >= _REMEMBERED:
                del _known[next(iter(_known))]
            _known[key] = _norms_read(self._class, self._config, self._blocks)
        found = {_known[key][index].get(name) for name in linears}
        return found.pop() if len(found) == 1 else None


def is_norm(module: nn.Module) -> bool:
    """Whether a module normalises: every such class of torch and transformers is named after it."""
    return "norm" in type(module).__name__.lower()


def _norms_read(
    cls: type[PreTrainedModel], config: PreTrainedConfig, paths: Sequence[str]
) -> list[dict[str, str]]:
    """For each block: path of a linear -> path of the norm whose output it reads."""
    from transformers.monkey_patching import apply_patches

    config = copy.deepcopy(config)
    # Without kernels of other packages, and without code that depends on values.
    config._attn_implementation = "eager"
    if getattr(config, "_experts_implementation", None) is not None:
        config._experts_implementation = "batched_mm"
    watched = [_Block() for _ in paths]
    # A class whose code needs values after all raises whatever it hits; what was seen before holds.
    with suppress(Exception), torch.device("meta"), torch.no_grad(), apply_patches(), _Agreeing():
        model = cls(config).eval()
        if len(model.get_submodule(paths[0].rpartition(".")[0])) != len(paths):
            return [{} for _ in paths]  # the model has lost blocks that its config still counts
        for path, seen in zip(paths, watched, strict=True):
            seen.watch(model.get_submodule(path))
        model(**_inputs(model))
    return [seen.norms for seen in watched]


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


class _Block:
    """What is seen of one block: of each linear, the norm that made its input.

    A tensor is made by the innermost module that returns it first; views of it count as it, unless
    their features are others. Only what the block itself made in the same call counts, since a
    shared block is called several times.
    """

    def __init__(self) -> None:
        self.norms: dict[str, str] = {}
        self._other: set[str] = set()
        # By storage: a tensor, which keeps it alive, its version, and the norm that returned it.
        self._made: dict[int, tuple[torch.Tensor, int, str | None]] = {}

    def watch(self, block: nn.Module) -> None:
        """Register hooks; the model is thrown away afterwards."""
        block.register_forward_pre_hook(lambda _module, _args: self._made.clear())
        for name, module in block.named_modules():
            if not name:
                continue
            norm = name if is_norm(module) else None
            module.register_forward_hook(
                lambda _module, _args, output, norm=norm: self._returned(output, norm)
            )
            if is_map(module):
                module.register_forward_pre_hook(
                    lambda _module, args, name=name: self._entered(args[0], name)
                )

    def _returned(self, output: Any, norm: str | None) -> None:
        if isinstance(output, torch.Tensor):
            entry = (output, output._version, norm)
            self._made.setdefault(output.untyped_storage()._cdata, entry)

    def _entered(self, value: torch.Tensor, linear: str) -> None:
        norm = self._source(value)
        if norm is None or self.norms.get(linear, norm) != norm or linear in self._other:
            self._other.add(linear)
            self.norms.pop(linear, None)
        else:
            self.norms[linear] = norm

    def _source(self, value: torch.Tensor) -> str | None:
        found = self._made.get(value.untyped_storage()._cdata)
        if found is None:
            return None
        made, version, norm = found
        same_rows = made.numel() == value.numel() and made.shape[-1] == value.shape[-1]
        untouched = made._version == version
        return norm if same_rows and untouched and made.stride(-1) == value.stride(-1) else None


class _Agreeing(TorchDispatchMode):
    """Answers yes where code asks a tensor without values: whether a mask is all ones, say."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return args[0].dtype == torch.bool or 1
        return func(*args, **(kwargs or {}))
