"""A GGUF file in llama.cpp (llama-cpp-python) behind the face of a transformers model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig
from transformers.modeling_outputs import CausalLMOutputWithPast

from compress.errors import CompressError
from compress.models.loading import load_config
from compress.runtimes.module import RuntimeModel, check_no_padding
from compress.runtimes.requirements import require
from compress.system.intake import reason

_BATCH = 512  # tokens of a prompt that are multiplied at once


def open_gguf(
    file: Path, checkpoint: Path, tokens: int, trust_remote_code: bool = False
) -> LlamaCppForCausalLM:
    """A GGUF file with room for so many tokens.

    Args:
        checkpoint: folder that it was made from.
    """
    config = load_config(checkpoint, trust_remote_code=trust_remote_code)
    return LlamaCppForCausalLM(file, config, tokens, trust_remote_code=trust_remote_code)


class LlamaCppForCausalLM(RuntimeModel):
    """A causal model in llama.cpp, on the CPU.

    One sequence at a time: the cache is the library's own, so that only the last one goes on.

    Args:
        file: a GGUF file.
        config: of the checkpoint that it was made from.
        context: tokens of prompt and continuation at most.
        threads: of all products; by default as many as torch has.

    Attributes:
        one_by_one: batches are run a sequence at a time.

    Raises:
        CompressError: llama-cpp-python is missing, or llama.cpp does not load the file.
    """

    one_by_one = True

    def __init__(
        self,
        file: Path,
        config: PreTrainedConfig,
        context: int,
        threads: int | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        require("gguf", running=True)
        super().__init__(config, config.vocab_size, trust_remote_code)
        self.file, self.context = file, context
        self.threads = threads or torch.get_num_threads()
        self._next = self._opened(context, every=False)
        self._every: Any = None  # the same with the logits of all of so many tokens
        self._places = 0

    @property
    def bytes(self) -> int:
        return self.file.stat().st_size

    @property
    def execution(self) -> str:
        import llama_cpp

        return f"llama-cpp-python {llama_cpp.__version__} on the CPU, {self.threads} threads"

    def forward(
        self,
        input_ids: torch.Tensor,
        past_key_values: Any = None,
        use_cache: bool = False,
        logits_to_keep: int = 0,
        attention_mask: torch.Tensor | None = None,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of token ids [batch, tokens]; of the last alone with a cache or where one is kept,
        which takes one row.

        Args:
            attention_mask: [batch, tokens], 1 where there is text.
            past_key_values: what the call before returned; the tokens [1, tokens] come behind its
                own.
            use_cache: return the cache, to go on with.
            logits_to_keep: 1, or 0 for all.
        """
        if not use_cache and past_key_values is None and not logits_to_keep:
            logits = self.base_model(input_ids, attention_mask)[0]
            return CausalLMOutputWithPast(logits=logits)
        import llama_cpp

        check_no_padding(attention_mask)
        if len(input_ids) != 1:
            raise CompressError(
                "one row of tokens, as many as the cache has", f"{len(input_ids)} rows",
                "Go on with one row at a time",
            )  # fmt: skip

        if past_key_values is None:
            self._next.reset()
        total = self._next.n_tokens + input_ids.shape[1]
        if total > self.context:
            raise CompressError(
                f"at most {self.context} tokens, what the model was opened for", str(total),
                "Open it with a longer context, or give a shorter text",
            )  # fmt: skip
        self._next.eval(input_ids[0].tolist())
        pointer = llama_cpp.llama_get_logits_ith(self._next._ctx.ctx, -1)
        values = np.ctypeslib.as_array(pointer, (self.config.vocab_size,)).copy()
        logits = torch.from_numpy(values)[None, None]
        return CausalLMOutputWithPast(logits=logits, past_key_values=self)  # pyrefly: ignore

    def logits(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        if mask is not None:  # what is behind a row's text has no influence on it
            check_no_padding(mask.long().cummin(1).values == mask)
        if ids.shape[1] > self._places:
            self._places = ids.shape[1]
            self._every = self._opened(self._places, every=True)
        found = []
        for row in ids.tolist():
            self._every.reset()
            self._every.eval(row)
            found.append(torch.from_numpy(np.array(self._every.scores[: len(row)])))
        return torch.stack(found)

    def _opened(self, context: int, every: bool) -> Any:
        import llama_cpp

        try:
            return llama_cpp.Llama(
                str(self.file), n_ctx=context, n_batch=context if every else min(_BATCH, context),
                n_threads=self.threads, n_threads_batch=self.threads, logits_all=every,
                verbose=False,
            )  # fmt: skip
        except ValueError as error:
            raise CompressError(
                f"a GGUF file that llama.cpp {llama_cpp.__version__} loads",
                f"{self.file} ({reason(error)})", "Export it anew; it may have been cut short",
            ) from error  # fmt: skip
