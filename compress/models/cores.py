"""What a forward pass shows of a block's cores, the modules that a replay skips.

Nothing is assumed about the code of the block except what is seen here: where the output
projection's result is in what the core returns, and which module computes something that nobody
but the core reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

_VALUE = object()  # marks, in a template, the place of the stored tensor


@dataclass(frozen=True)
class Core:
    """How to stand in for a core.

    Attributes:
        inside: the output projection is part of the core.
        template: structure of the core's output, the tensor that matters replaced by a mark.
        feeder: path of the module, mostly a norm, that computes what only the core reads; None
            where there is none.
    """

    inside: bool
    template: Any
    feeder: str | None = None

    def value_in(self, output: Any) -> torch.Tensor:
        """The tensor that matters."""
        return output[self.template.index(_VALUE)] if isinstance(output, tuple) else output

    def wrap(self, value: torch.Tensor) -> Any:
        """What the core would return with this value."""
        if not isinstance(self.template, tuple):
            return value
        return tuple(value if item is _VALUE else item for item in self.template)

    @contextmanager
    def replaced(self, block: nn.Module, path: str, stub: Callable[..., Any]) -> Iterator[None]:
        """Call ``stub`` in place of the core of this path, and nothing in place of its feeder."""
        core = block.get_submodule(path)
        feeder = None if self.feeder is None else block.get_submodule(self.feeder)
        core.forward = stub
        if feeder is not None:
            feeder.forward = _unchanged
        try:
            yield
        finally:
            del core.forward
            if feeder is not None:
                del feeder.forward


def _unchanged(states: torch.Tensor, *_args: Any, **_kwargs: Any) -> torch.Tensor:
    return states


def look_at_core(
    block: nn.Module, path: str, projection: str, run: Callable[[], torch.Tensor]
) -> Core | None:
    """Run a batch to see what a core returns.

    Args:
        path: of the core. projection: of the linear at its end.
        run: the forward pass of the block; returns its output.

    Returns:
        None where the projection's value is not in what the core returns, or something else is
        that depends on the batch.
    """
    core, project = block.get_submodule(path), block.get_submodule(projection)
    inside = any(m is project for m in core.modules())
    seen: dict[str, Any] = {}
    makers: dict[str, torch.Tensor] = {}
    with ExitStack() as stack:
        hook = stack.enter_context
        hook(_hooked(core, lambda _m, _a, out: seen.update(core=out)))
        hook(_hooked(project, lambda _m, a, out: seen.update(out=out, arg=a[0])))
        for name, module in block.named_children():
            if module is not core:
                hook(_hooked(module, lambda _m, _a, out, name=name: makers.update({name: out})))
        entered = core.register_forward_pre_hook(
            lambda _m, args, kwargs: seen.update(read=(*args, *kwargs.values())), with_kwargs=True
        )
        stack.callback(entered.remove)
        whole = run()
    wanted, output = seen.get("out" if inside else "arg"), seen.get("core")
    items = output if isinstance(output, tuple) else (output,)
    matches = [
        isinstance(item, torch.Tensor)
        and wanted is not None
        and item.shape == wanted.shape
        and torch.equal(item, wanted)
        for item in items
    ]
    others = [i for i, match in zip(items, matches, strict=True) if not match]
    if sum(matches) != 1 or any(isinstance(i, torch.Tensor) for i in others):
        return None
    template = tuple(_VALUE if m else i for m, i in zip(matches, items, strict=True))
    found = Core(inside, template if isinstance(output, tuple) else _VALUE)
    feeders = [
        name for name, made in makers.items()
        if isinstance(made, torch.Tensor) and any(made is read for read in seen["read"])
    ]  # fmt: skip
    makers.clear()  # the second forward holds no more of the first than it needs
    seen.clear()
    for name in feeders:
        fed = Core(inside, found.template, name)
        if _only_feeds(block, path, fed, output, run, whole):
            return fed
    return found


def _only_feeds(
    block: nn.Module, path: str, core: Core, output: Any, run: Callable[[], Any], whole: Any
) -> bool:
    """Whether the block computes the same without what the feeder does to its input."""
    feeder = block.get_submodule(core.feeder or "")
    with core.replaced(block, path, lambda *_args, **_kwargs: output):
        # Whoever else read it would turn these into the block's output, even through a gate at zero
        # that another block of this kind has learned to open.
        feeder.forward = lambda states, *_args, **_kwargs: torch.full_like(states, torch.nan)
        try:
            return torch.equal(run(), whole)
        except Exception:  # a class that checks its states: it reads them
            return False


@contextmanager
def _hooked(module: nn.Module, hook: Callable[..., None]) -> Iterator[None]:
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
