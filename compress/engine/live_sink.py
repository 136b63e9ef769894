"""Where the blocks of a live model go: they stay where they are, and a transaction knows of it."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from compress.checkpoint.config import apply_records, keep_layers
from compress.checkpoint.embeddings import marked
from compress.checkpoint.records import record_block
from compress.engine.context import MemorySink
from compress.engine.transaction import Transaction
from compress.methods.passes import SOLVE, SURVEY
from compress.methods.questions import kind_of
from compress.models.anatomy import BlockAnatomy, anatomy_of
from compress.models.groups import Groups, merged_origins, set_blocks, single
from compress.models.mixtures import follow_experts
from compress.models.stream import StreamedModel


class LiveSink(MemorySink):
    """The :class:`compress.engine.context.Sink` of a step on a live model.

    Args:
        transaction: is told which block comes up.
        origins: what the blocks that enter the step stand for; None where that is not known.
        follow_config: write into the model's config what its modules are.
    """

    def __init__(
        self, transaction: Transaction, origins: list[tuple[int, int]] | None, follow_config: bool
    ) -> None:
        super().__init__()
        self.transaction, self.follow_config = transaction, follow_config
        self._origins, self._stage = origins, ""

    def finished(self, stage: str) -> int:
        self._stage = stage  # asked once, at the start of each
        return super().finished(stage)

    def load(self, index: int, block: nn.Module) -> None:
        self.transaction.before(block)
        if self._stage and kind_of(self._stage) != SURVEY:
            self.transaction.began = True

    def store(self, stage: str, index: int, block: nn.Module, anatomy: BlockAnatomy) -> None:
        self.transaction.made(block)

    def touch_outer(self, model: PreTrainedModel) -> None:
        self.transaction.before_outer()

    def record(
        self,
        stage: str,
        index: int,
        note: Any,
        activations: dict[str, Any] | None,
        blocks: int = 1,
    ) -> None:
        super().record(stage, index, note, activations, blocks)
        self.transaction.finished(solved=kind_of(stage) == SOLVE)

    def changed(self, stage: str, groups: Groups, source: StreamedModel) -> StreamedModel:
        """Give the model the blocks that the stage has left, and a config that says so."""
        self.transaction.finished()
        self.transaction.began = True
        if self._origins is not None:
            self._origins = merged_origins(self._origins, groups)
        if not self.follow_config:
            return source
        model, anatomy = source.model, source.anatomy
        config, path = model.config, anatomy.blocks_path
        if groups != single(len(anatomy.blocks)):
            firsts = [group[0] for group in groups]
            config = keep_layers(config, anatomy.family, firsts, path)
            set_blocks(model, path, [source.block(index) for index in firsts])
        after = anatomy_of(model)
        follow_experts(model, *(max(b.experts for b in a.blocks) for a in (anatomy, after)))
        records = [record_block(model.get_submodule(b.path), b) for b in after.blocks]
        config = apply_records(
            config, after.family, records, path, after.blocks[0].hidden, marked(model) or None
        )
        # All modules of the model refer to this object.
        model.config.__dict__.clear()
        model.config.__dict__.update(config.__dict__)
        return StreamedModel(model, device=source.device)

    def origins(self) -> list[tuple[int, int]] | None:
        return self._origins
