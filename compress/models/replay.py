"""Run one block over all calibration batches, site by site, computing nothing twice.

A calibrated method wants the inputs of each linear *given that everything before it is compressed
already* ("true sequential", Frantar et al. 2023). Done naively, each of the four sites of a block
costs another forward pass over all batches. Here the block is paused instead: the input of an
output projection is stored when the run reaches it, and the next run starts from there, because the
module that produced it (the *core*: attention, MLP) is replaced by a stub that returns the stored
value. Every matrix product of the block is then done exactly once, and memory holds one batch.

Nothing is assumed about the code of the block except what a first forward shows
(:mod:`compress.models.cores`): that a core's output is the output projection's result (or its
input, where the projection lies outside). Where that does not hold, the core is simply run again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compress.linear.casting import computing
from compress.models.anatomy import ATTENTION_OUT, DOWN, OTHER, UP, BlockAnatomy, Site
from compress.models.cores import Core, look_at_core
from compress.system.activations import Activations


class _Reached(Exception):
    """Ends a forward pass once it has come to the site that was asked for."""


@dataclass
class BlockCall:
    """How the model calls a block: arguments besides the hidden states, for a batch shape.

    Attributes:
        real: bool [batch, length], False where the batch is padding; None where nothing is.
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    hidden_keyword: str | None = None  # None: hidden states are the first positional argument
    real: torch.Tensor | None = None

    def __call__(self, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        if self.hidden_keyword is None:
            out = block(hidden, *self.args, **self.kwargs)
        else:
            out = block(*self.args, **{self.hidden_keyword: hidden}, **self.kwargs)
        return out[0] if isinstance(out, tuple) else out

    def tokens(self, values: torch.Tensor) -> torch.Tensor:
        """Values [batch, length, ...] or [batch * length, ...] of the tokens that are no padding,
        [tokens, ...]; as they are where nothing is padding or positions were mixed."""
        if self.real is None:
            return values
        real = self.real.to(values.device)  # stored activations are read on the CPU
        if values.shape[:2] == real.shape:
            return values[real]
        if len(values) == real.numel():
            return values[real.reshape(-1)]
        return values


@dataclass
class _Cut:
    """A stored place inside the block from which later runs start."""

    site: Site
    core: Core
    inputs: Activations | None = None  # of the output projection, before it is final
    outputs: Activations | None = None  # of the core


class Handed:
    """What the replays of one model's blocks hand on to each other.

    Args:
        scratch: folder for intermediate activations.

    Attributes:
        cores: what a look has shown, by all that decides it: the kind of the site, the classes of
            everything in the block, and what the config says of that layer alone. Only the first
            block of a kind pays for it. None where a core cannot be replaced.
    """

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self.cores: dict[tuple[object, ...], Core | None] = {}
        self._files: dict[str, Activations] = {}

    def file(self, name: str) -> Activations:
        """An empty file, in the type of what is written first; what was there before is lost."""
        if name not in self._files:
            self._files[name] = Activations(self.scratch / f"{name}.bin", dtype=None)
        self._files[name].rewind()
        return self._files[name]

    def discard(self, stored: Activations) -> None:
        """Delete the file of these."""
        self._files.pop(stored.path.stem).remove()

    def remove(self) -> None:
        """Delete the files."""
        for stored in self._files.values():
            stored.remove()
        self._files = {}


class BlockReplay:
    """Visits the sites of one block in the order of execution.

    Args:
        block: the block, with real weights, in eval mode.
        anatomy: its sites.
        inputs: hidden states entering the block, a batch an entry.
        calls: how to call the block, one entry a batch.
        handed: shared by the blocks of one model.
        device: where the block lives.
        dtype: of matrix products; see :func:`compress.linear.casting.computing`.
    """

    def __init__(
        self,
        block: nn.Module,
        anatomy: BlockAnatomy,
        inputs: Activations,
        calls: list[BlockCall],
        handed: Handed,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.block, self.anatomy, self.inputs, self.calls = block, anatomy, inputs, calls
        self.handed, self.device, self.dtype = handed, torch.device(device), dtype
        self._cuts: dict[str, _Cut] = {}
        self._batch = 0

    def head(self, count: int) -> BlockReplay:
        """A replay of the first ``count`` batches only.

        Its files are those of this one, so it is run to its end before this one stores anything.
        """
        inputs = Activations(self.inputs.path, shapes=self.inputs.shapes[:count])
        return BlockReplay(
            self.block, self.anatomy, inputs, self.calls[:count], self.handed, self.device,
            self.dtype,
        )  # fmt: skip

    def visit(self, site: Site, observe: Callable[[str, torch.Tensor], None]) -> None:
        """Run all batches up to ``site`` and pass on its input, ``observe(linear name, x)``.

        ``x`` is [..., in_features], without padding; for a site of several linears it is reported
        once, under the first name. Sites must be visited in the order of the anatomy; skipping some
        is fine.
        """
        if site.kind == OTHER:
            self._observe_everything(site, observe)
            return
        cut = self._prepare_cut(site)
        if cut is not None:
            cut.inputs = self.handed.file(f"{site.kind}-inputs")

        def reached(_module: nn.Module, args: tuple[Any, ...]) -> None:
            self._show(observe, site.linears[0], args[0])
            if cut is not None:
                cut.inputs.write(self._batch, args[0])
            raise _Reached

        with ExitStack() as stack:
            if site.kind in (UP, DOWN):
                # Before the hooks below: it may have to run the block once to the end.
                stack.enter_context(self._recorded_attention())
            for name in site.linears:
                hook = self.block.get_submodule(name).register_forward_pre_hook(reached)
                stack.callback(hook.remove)
            for _ in self._run():
                pass
        if cut is not None:
            self._cuts[site.kind] = cut

    def keep_columns(self, site: Site, columns: torch.Tensor) -> None:
        """Drop features of a visited output projection's stored input (its layer was narrowed)."""
        cut = self._cuts.get(site.kind)
        if cut is None or cut.inputs is None:
            return
        wide, name = cut.inputs, f"{site.kind}-inputs"
        # Two files in turn: what is read is not written over.
        cut.inputs = self.handed.file(f"{name}-narrow" if wide.path.stem == name else name)
        for i in range(len(wide)):
            cut.inputs.write(i, wide.read(i)[..., columns.cpu()])
        self.handed.discard(wide)

    def finish(self, consume: Callable[[int, torch.Tensor], None]) -> None:
        """Run all batches through the block as it is now: ``consume(batch index, output)``."""
        for output in self._run():
            consume(self._batch, output)
        self.close()

    def close(self) -> None:
        """Forget the intermediate activations."""
        self._cuts = {}

    def _run(self) -> Iterator[torch.Tensor]:
        """Forward every batch from the latest cut; yields outputs of batches that reach the end."""
        with torch.no_grad(), computing(self.block, self.dtype), ExitStack() as stack:
            for cut in self._cuts.values():
                if cut.outputs is not None or cut.inputs is not None:
                    stack.enter_context(self._resumed(cut))
            for batch in range(len(self.inputs)):
                self._batch = batch
                hidden = self.inputs.read(self._batch).to(self.device)
                try:
                    output = self.calls[self._batch](self.block, hidden)
                except _Reached:
                    continue
                yield output
        for cut in self._cuts.values():
            # What was computed from stored inputs in this run is stored itself now.
            if cut.outputs is not None:
                cut.inputs = None

    @contextmanager
    def _resumed(self, cut: _Cut) -> Iterator[None]:
        """Replace a core by a stub that returns what is stored, or what follows from it."""
        project = self.block.get_submodule(cut.site.linears[0])
        # Only the attention's result is needed by several runs; the FFN's ends the block.
        keep = cut.outputs is None and cut.core.inside and cut.site.kind == ATTENTION_OUT
        fresh = self.handed.file(f"{cut.site.kind}-outputs") if keep else None

        def stub(*_args: Any, **_kwargs: Any) -> Any:
            if cut.outputs is not None:
                return cut.core.wrap(cut.outputs.read(self._batch).to(self.device))
            value = cut.inputs.read(self._batch).to(self.device)
            value = project(value) if cut.core.inside else value
            if fresh is not None:
                fresh.write(self._batch, value)
            return cut.core.wrap(value)

        with cut.core.replaced(self.block, cut.site.core, stub):
            yield
        if fresh is not None and len(fresh) == len(self.inputs):
            cut.outputs = fresh

    @contextmanager
    def _recorded_attention(self) -> Iterator[None]:
        """Store the attention's result during a run that computes it and will not change it."""
        site = self.anatomy.site(ATTENTION_OUT)
        cut = None if site is None or site.kind in self._cuts else self._prepare_cut(site)
        if cut is None:
            yield
            return
        fresh = self.handed.file(f"{site.kind}-outputs")
        hook = self.block.get_submodule(site.core).register_forward_hook(
            lambda _m, _a, output: fresh.write(self._batch, cut.core.value_in(output))
        )
        try:
            yield
        finally:
            hook.remove()
            cut.outputs = fresh
            self._cuts[site.kind] = cut

    def _prepare_cut(self, site: Site) -> _Cut | None:
        """Learn how to restart behind ``site``'s producers; None where that cannot be done."""
        if site.kind not in (ATTENTION_OUT, DOWN) or site.core is None:
            return None
        cores = self.handed.cores
        # Not of block and core alone: a class of blocks may hold experts, which read what only the
        # core reads elsewhere, in some layers.
        tree = tuple((name, type(module)) for name, module in self.block.named_modules())
        key = (site.kind, self.anatomy.variant, tree)
        if key not in cores:
            with torch.no_grad():
                hidden = self.inputs.read(0).to(self.device)
                cores[key] = look_at_core(
                    self.block, site.core, site.linears[0],
                    lambda: self.calls[0](self.block, hidden),
                )  # fmt: skip
        found = cores[key]
        return None if found is None else _Cut(site, found)

    def _observe_everything(self, site: Site, observe: Callable[[str, torch.Tensor], None]) -> None:
        with ExitStack() as stack:
            for name in site.linears:
                hook = self.block.get_submodule(name).register_forward_pre_hook(
                    lambda _m, args, name=name: self._show(observe, name, args[0])
                )
                stack.callback(hook.remove)
            for _ in self._run():
                pass

    def _show(
        self, observe: Callable[[str, torch.Tensor], None], name: str, inputs: torch.Tensor
    ) -> None:
        """Report a linear's inputs as its product sees them; statistics choose their own types."""
        inputs = self.calls[self._batch].tokens(inputs)
        with torch.autocast(inputs.device.type, enabled=False):
            observe(name, inputs.to(self.dtype))
