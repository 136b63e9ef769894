"""A GGUF file in llama.cpp (llama-cpp-python) behind the face of a transformers model."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.modeling_outputs import CausalLMOutputWithPast


def available() -> bool:
    """Whether llama-cpp-python is installed."""
    return importlib.util.find_spec("llama_cpp") is not None


class LlamaCppForCausalLM(nn.Module):
    """One sequence at a time; its cache is the library's own, so that only the last one goes on.

    Args:
        file: a GGUF file.
        config: of the model that it was made from.
        context: tokens of prompt and continuation at most.
        threads: of all products; by default as many as torch has.
    """

    def __init__(
        self, file: Path, config: PreTrainedConfig, context: int, threads: int | None = None
    ) -> None:
        super().__init__()
        import llama_cpp

        count = threads or torch.get_num_threads()
        self.config = config
        self._library = llama_cpp
        self._llama = llama_cpp.Llama(
            str(file), n_ctx=context, n_batch=min(512, context), n_threads=count,
            n_threads_batch=count, logits_all=False, verbose=False,
        )  # fmt: skip
        with torch.device("meta"):
            self._embeddings = nn.Embedding(config.vocab_size, 1)
        self.eval()

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def get_input_embeddings(self) -> nn.Module:
        return self._embeddings

    def forward(
        self, input_ids: torch.Tensor, past_key_values: Any = None, **_: Any
    ) -> CausalLMOutputWithPast:
        """Logits [1, 1, vocabulary] of the last token."""
        if past_key_values is None:
            self._llama.reset()
        self._llama.eval(input_ids[0].tolist())
        pointer = self._library.llama_get_logits_ith(self._llama._ctx.ctx, -1)
        values = np.ctypeslib.as_array(pointer, (self.config.vocab_size,)).copy()
        return CausalLMOutputWithPast(
            logits=torch.from_numpy(values)[None, None], past_key_values=self
        )


def tokens_of(file: Path, text: str) -> list[int]:
    """What llama.cpp makes of a text with the file's tokenizer, without special tokens."""
    import llama_cpp

    vocabulary = llama_cpp.Llama(str(file), vocab_only=True, verbose=False)
    return vocabulary.tokenize(text.encode(), add_bos=False, special=False)


def mean_nll(file: Path, ids: Sequence[int], window: int) -> float:
    """Nats a token over windows without overlap, the first token of each not predicted."""
    import llama_cpp

    count = torch.get_num_threads()
    llama = llama_cpp.Llama(
        str(file), n_ctx=window, n_batch=window, n_threads=count, n_threads_batch=count,
        logits_all=True, verbose=False,
    )  # fmt: skip
    total = []
    for start in range(0, len(ids) - window + 1, window):
        row = list(ids[start : start + window])
        llama.reset()
        llama.eval(row[:-1])
        logits = torch.from_numpy(np.array(llama.scores[: window - 1]))
        total.append(nn.functional.cross_entropy(logits, torch.tensor(row[1:])))
    return float(torch.stack(total).mean())
