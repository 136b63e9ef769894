"""A live model while steps change it: float32 for the solvers, and the way back if they fail.

Blocks come up one at a time, before anything is done to them (the sink of a step is told), so a
copy of each is made just before it changes. A block of a 16-bit model is in float32 from there
until it is finished: solvers and statistics never see 16 bits, and memory holds one such block.
"""

from __future__ import annotations

import random
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from compress.checkpoint.storage import HALF
from compress.errors import CompressError
from compress.system.memory import available

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


@contextmanager
def global_state(seed: int) -> Iterator[None]:
    """Seed torch's generators, and put back every global that steps or their libraries touch.

    Steps run with gradients enabled (those that learn) and float32 as the default dtype.
    """
    python, numpy = random.getstate(), np.random.get_state()
    default = torch.get_default_dtype()
    cuda = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with (
            torch.random.fork_rng(devices=cuda),
            torch.inference_mode(False),
            torch.enable_grad(),
        ):
            torch.set_default_dtype(torch.float32)
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_default_dtype(default)
        random.setstate(python)
        np.random.set_state(numpy)


class Transaction:
    """What a live model was, kept block by block as blocks come up to be changed.

    Making one changes nothing; :meth:`open` does, and is to be followed by :meth:`close` whether
    it ends or fails.

    Args:
        model: live, checked.
        blocks: its blocks.
        atomic: keep a copy of every block that is touched, so that a failure can be undone; None
            where the copies fit into half of the free memory.

    Attributes:
        atomic: whether a failure can be undone.
        began: whether anything of the model may have changed.
        dtype: what the model's floats are stored in.
    """

    def __init__(self, model: nn.Module, blocks: Iterable[nn.Module], atomic: bool | None) -> None:
        blocks = list(blocks)
        if atomic is None:
            size = sum(_bytes(block) for block in blocks)
            atomic = size <= available() / 2
        self.atomic, self.began = atomic, False
        half = [p.dtype for p in model.parameters() if p.dtype in HALF]
        self.dtype = half[0] if half else torch.float32
        self._model, self._training = model, model.training
        # Without a way back nothing may keep a parameter in memory that a step replaces.
        self._modules = [_ModuleState(module, whole=atomic) for module in model.modules()]
        self._flags = [(p, p.requires_grad) for p in model.parameters()] if atomic else []
        self._originals = {id(tensor) for tensor in _tensors(model)} if atomic else set()
        self._config = dict(model.config.__dict__)
        inside = {id(tensor) for block in blocks for tensor in _tensors(block)}
        outside = {n: t for n, t in _named(model) if id(t) not in inside}
        self._outside = list(outside)
        self._outer_dtypes = {name: tensor.dtype for name, tensor in outside.items()}
        self._outer: list[tuple[torch.Tensor, torch.Tensor]] = []  # 16-bit ones, their values then
        self._outer_changes = False
        self._saved: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # tensor, its values then
        self._members: dict[int, set[int]] = {}  # saved tensors by block
        self._open: dict[int, tuple[nn.Module, dict[str, torch.dtype]]] = {}

    def open(self) -> None:
        """Bring what lies outside the blocks into float32. As long as no step changes it, what it
        was is simply put back."""
        named = dict(_named(self._model))
        for tensor in {id(named[name]): named[name] for name in self._outside}.values():
            if tensor.dtype in HALF:
                self._outer.append((tensor, tensor.data))  # ahead of the change: it may fail
                tensor.data = tensor.data.float()

    def before(self, block: nn.Module) -> None:
        """Called before a block is run or changed: keep it, and bring it into float32."""
        if id(block) in self._open:
            return
        named = [*block.named_parameters(), *block.named_buffers()]
        self._open[id(block)] = block, {n: t.dtype for n, t in named if t.is_floating_point()}
        for tensor in _tensors(block):
            half = tensor.dtype in HALF
            if id(tensor) in self._originals and id(tensor) not in self._saved:
                # Widening gives a 16-bit tensor other memory: its own stays the copy.
                self._saved[id(tensor)] = tensor, tensor.data if half else tensor.data.clone()
                self._members.setdefault(id(block), set()).add(id(tensor))
            if half:
                tensor.data = tensor.data.float()

    def made(self, block: nn.Module) -> None:
        """Called with a block that a step has made of others, which are open: it gets their dtypes
        when it is finished."""
        if id(block) not in self._open:
            dtypes = next(iter(self._open.values()))[1]
            self._open[id(block)] = block, dtypes

    def before_outer(self) -> None:
        """Called before what lies outside the blocks is changed: keep it."""
        if self._outer_changes:
            return
        self._outer_changes = self.began = True
        widened = {id(tensor) for tensor, _ in self._outer}
        named = dict(_named(self._model))
        for tensor in (named[name] for name in self._outside) if self.atomic else ():
            if id(tensor) not in widened:  # of those the 16-bit values are still there
                self._saved.setdefault(id(tensor), (tensor, tensor.data.clone()))

    def finished(self, solved: bool = False) -> None:
        """Called when blocks are done: back to the dtypes that their tensors had.

        Args:
            solved: what these blocks no longer hold is gone for good.
        """
        for block, dtypes in self._open.values():
            for name, tensor in block.named_parameters():
                if tensor.is_floating_point():
                    tensor.data = tensor.data.to(_nearest(name, dtypes))
            for name, tensor in block.named_buffers():
                if name in dtypes:  # scales of a new quantised linear stay as they are
                    tensor.data = tensor.data.to(dtypes[name])
            if solved:
                self._release(block)
        self._open = {}

    def _release(self, block: nn.Module) -> None:
        """Of what a step has replaced in a block, one copy will do."""
        present = {id(tensor) for tensor in _tensors(block)}
        for key in self._members.get(id(block), set()) - present:
            tensor, data = self._saved[key]
            tensor.data = data

    def close(self, failed: bool) -> None:
        """End it: modes as they were, and after a failure all that can be put back."""
        undo = failed and self.atomic
        if undo:
            for tensor, data in self._saved.values():
                tensor.data = data
            for state in self._modules:
                state.restore()
            for parameter, flag in self._flags:
                parameter.requires_grad_(flag)
            self._model.config.__dict__.clear()
            self._model.config.__dict__.update(self._config)
        else:
            self.finished()
        if undo or not self._outer_changes:
            for tensor, data in self._outer:
                tensor.data = data
        else:
            self._narrow_outer()
        modes = {}
        for state in self._modules:
            state.remove_stubs()
            modes[id(state.module)] = state.training
        _set_modes(self._model, modes, self._training)

    def _narrow_outer(self) -> None:
        """What steps have changed outside the blocks gets the dtypes that it had."""
        for name, tensor in _named(self._model):
            dtype = self._outer_dtypes.get(name)
            if dtype in HALF:
                tensor.data = tensor.data.to(dtype)


@contextmanager
def keeping_gradients(model: nn.Module) -> Iterator[None]:
    """Whatever a step replaces requires gradients where that which it replaces did."""
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    # Weakly: a parameter that is replaced must not stay in memory. Removed blocks shift the names.
    known = {id(p): (weakref.ref(p), p.requires_grad) for p in model.parameters()}
    try:
        yield
    finally:
        for name, parameter in model.named_parameters():
            reference, flag = known.get(id(parameter), (lambda: None, None))
            if reference() is not parameter:
                flag = _nearest(name, flags)
            if flag is not None and parameter.is_floating_point():
                parameter.requires_grad_(flag)


def explained(error: BaseException, began: bool, atomic: bool, where: str) -> BaseException:
    """The error of a failed step, saying what it has left.

    An interruption stays one; everything else becomes a :class:`CompressError` where the model is
    not what it was.
    """
    if not began:
        return error
    if atomic:
        error.add_note("compress.apply: the model is as it was before.")
        return error
    left = (
        f"The model is partly compressed ({where}): no copy of its weights was kept. Load it again"
    )
    if isinstance(error, CompressError):
        fix = f"{error.fix}. {left}" if error.fix else left
        return CompressError(error.expected, error.got, fix, where=error.where)
    if not isinstance(error, Exception):
        error.add_note(f"compress.apply: {left}.")
        return error
    return CompressError("all steps to end", f"{type(error).__name__}: {error}", left)


def _set_modes(module: nn.Module, modes: dict[int, bool], inherited: bool) -> None:
    """Give modules the modes they had; one that is new has that of the module it is in."""
    module.training = modes.get(id(module), inherited)
    for child in module.children():
        _set_modes(child, modes, module.training)


class _ModuleState:
    """Attributes and members of a module; the values of tensors are not copied.

    Args:
        whole: keep all that :meth:`restore` needs, not only what :meth:`remove_stubs` does.
    """

    _MEMBERS = ("_parameters", "_buffers", "_modules")

    def __init__(self, module: nn.Module, whole: bool) -> None:
        self.module, self.training = module, module.training
        self._forward = vars(module).get("forward")
        self._hooks = {name: set(vars(module)[name]) for name in _HOOKS}
        self._attributes = dict(vars(module)) if whole else {}
        self._members = {name: dict(vars(module)[name]) for name in self._MEMBERS if whole}

    def restore(self) -> None:
        """Only for a state that is ``whole``."""
        attributes = vars(self.module)
        attributes.clear()
        attributes.update(self._attributes)
        for name, entries in self._members.items():
            attributes[name].clear()
            attributes[name].update(entries)

    def remove_stubs(self) -> None:
        """Take away what an interrupted step has left in front of or behind the forward.

        Hooks that transformers has set stay: it sets those that record hidden states and router
        logits in a model's first forward, which may have been a step's, and never again.
        """
        attributes = vars(self.module)
        if self._forward is None:
            attributes.pop("forward", None)
        else:
            attributes["forward"] = self._forward
        for name in _HOOKS:
            for key in set(attributes[name]) - self._hooks[name]:
                if not str(attributes[name][key].__module__).startswith("transformers."):
                    del attributes[name][key]


def _tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _named(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]


def _bytes(module: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in _tensors(module))


def _nearest(name: str, values: dict[str, Any]) -> Any:
    """The value under a name, or the most frequent one in the nearest module around it."""
    if name in values:
        return values[name]
    path = name
    while path:
        path = path.rpartition(".")[0]
        start = f"{path}." if path else ""
        found = [value for other, value in values.items() if other.startswith(start)]
        if found:
            return max(found, key=found.count)
    return None
