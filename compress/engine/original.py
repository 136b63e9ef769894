"""The model that a recipe began with, at hand beside the one that its steps have changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import nn
from transformers import PreTrainedModel

from compress.models.anatomy import Anatomy
from compress.models.stream import StreamedModel


def _filled(_index: int, _block: nn.Module, _anatomy: Anatomy) -> None:
    """A live block holds its weights."""


@dataclass
class Original:
    """A model that never changes, block by block or whole.

    Attributes:
        make: gives the model, on the meta device or live.
        load: fills a block of it in float32.
    """

    make: Callable[[], StreamedModel]
    load: Callable[[int, nn.Module, Anatomy], None] = _filled
    _source: StreamedModel | None = field(default=None, repr=False)

    @property
    def source(self) -> StreamedModel:
        """The model; its blocks are empty where they are streamed."""
        if self._source is None:
            self._source = self.make()
        return self._source

    @contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """One block, with its weights meanwhile."""
        source = self.source
        block = source.block(index)
        self.load(index, block, source.anatomy)
        try:
            yield block.to(source.device)
        finally:
            source.release_block(index)

    def whole(self) -> PreTrainedModel:
        """All of it in memory, in float32, in eval mode, its parameters not requiring gradients.

        Each call gives the same live model, or fills a new one.
        """
        source = self.make()
        source.fill_outer()
        for index in range(len(source.anatomy.blocks)):
            self.load(index, source.block(index), source.anatomy)
        return source.model.to(source.device).eval().requires_grad_(False)
