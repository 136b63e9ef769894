"""lm-eval's model around a causal one, with one BOS in front of a text where it would put two."""

from __future__ import annotations

from typing import Any

from lm_eval.models.huggingface import HFLM


class CausalLM(HFLM):
    """lm-eval's own, but for ``loglikelihood_rolling``.

    lm-eval (0.4.13) encodes prompts as the tokenizer does by itself, BOS included where it adds
    one. Whole texts get a prefix token too, which is BOS where there is one: a tokenizer that adds
    BOS then has it twice, and the second one is scored as if it were text.
    """

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Score whole texts, each behind the prefix token alone."""
        kept, self.add_bos_token = self.add_bos_token, False
        try:
            return super().loglikelihood_rolling(requests, disable_tqdm)
        finally:
            self.add_bos_token = kept
