"""A model in another runtime behind the face of a transformers model.

It is a module: what measures models (perplexity, masked scores, latency) runs it like any other. It
has no weights of its own and cannot be trained or changed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from compress.errors import CompressError
from compress.models.stream import build_meta


class RuntimeModel(nn.Module, ABC):
    """What the models of all runtimes share.

    Args:
        config: of the checkpoint that was exported.
        vocabulary: number of tokens.
        trust_remote_code: run code that comes with that checkpoint, for :attr:`shape`.

    Attributes:
        base_model: gives all logits where a trunk gives hidden states: the head is inside of it.
    """

    def __init__(
        self, config: PreTrainedConfig, vocabulary: int, trust_remote_code: bool = False
    ) -> None:
        super().__init__()
        self.config, self.trust_remote_code = config, trust_remote_code
        self.base_model = _Trunk(self.logits)
        # Whoever asks for the vocabulary looks at the embedding's rows.
        with torch.device("meta"):
            self._embeddings = nn.Embedding(vocabulary, 1)
        self.eval()

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @cached_property
    def shape(self) -> PreTrainedModel:
        """The checkpoint that was exported as a model on the meta device."""
        return build_meta(self.config, self.trust_remote_code)

    @property
    @abstractmethod
    def bytes(self) -> int:
        """Of what runs on disk, without tokenizer and config where these lie beside it."""

    @property
    @abstractmethod
    def execution(self) -> str:
        """What runs it, in a clause."""

    def get_input_embeddings(self) -> nn.Module:
        return self._embeddings

    @abstractmethod
    def logits(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Logits [batch, tokens, vocabulary] of token ids [batch, tokens]."""


def check_no_padding(mask: torch.Tensor | None) -> None:
    """Refuse what a causal runtime model would take for text.

    Raises:
        CompressError: an attention mask with zeros.
    """
    if mask is not None and not bool(mask.all()):
        raise CompressError(
            "token ids without padding", "an attention_mask with zeros",
            "Give rows of one length, or one row at a time",
        )  # fmt: skip


class _Trunk(nn.Module):
    """The whole graph in the place of a trunk: the head on top of it passes on what it is given."""

    def __init__(self, run: Any) -> None:
        super().__init__()
        self.run = run

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **_: Any
    ) -> tuple[torch.Tensor]:
        return (self.run(input_ids, attention_mask),)
