"""What tests of flattening share: models whose last two blocks can become one, and the method."""

from __future__ import annotations

import pytest
import torch
import transformers

import compress
from compress.methods.depth.flatten.method import Flatten
from compress.models.anatomy import find_blocks

ONE_TYPE = {"global_attn_every_n_layers": 1}  # ModernBERT with full attention everywhere


@pytest.fixture
def make(tiny):
    """``make(family)``: a tiny model whose last two blocks can become one."""

    def build(family, **fields):
        if family == "modernbert":
            fields = {**ONE_TYPE, **fields}
        if family != "gemma":
            model = tiny(family, **fields)
        else:
            config = transformers.GemmaConfig(
                **{"vocab_size": 264, "hidden_size": 32, "intermediate_size": 64, "head_dim": 8,
                   "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
                   "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **fields}
            )  # fmt: skip
            torch.manual_seed(0)
            model = transformers.GemmaForCausalLM(config).eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        model.config.use_cache = False
        return model

    return build


@pytest.fixture
def flatten(tokens, tmp_path):
    """``flatten(model, groups, **options)``: these blocks become one, in place; returns the notes.

    Without groups they are chosen; the decision is then returned.
    """

    def run(model, groups=None, **options):
        class Chosen(Flatten):
            def decide(self, similarity, anatomy):
                return {"groups": groups, "similarity": similarity}

        if groups is not None:
            options = {"remove": len(find_blocks(model)[1]) - len(groups), **options}
        compress.apply(
            model, [(Flatten if groups is None else Chosen)(**options)], tokens, compute="float32"
        )

    return run
