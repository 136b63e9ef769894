"""Sections of recipes that train a model in a second or two."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

_LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_BERT = {
    "model_type": "bert",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


@pytest.fixture
def sections(text) -> SimpleNamespace:
    """Functions that give plain data for ``model.train``; keywords replace fields."""
    training = {"steps": 12, "batch": 4, "learning_rate": 1e-2, "checkpoint_every": 4}

    def causal(**more: Any) -> dict[str, Any]:
        return {
            "architecture": _LLAMA,
            "tokenizer": "bytes",
            "text": {"source": str(text), "part": "head:0.8"},
            "length": 24,
            "training": training,
            **more,
        }

    def masked(**more: Any) -> dict[str, Any]:
        return causal(**{"architecture": _BERT, "objective": "masked", **more})

    def digits(**more: Any) -> dict[str, Any]:
        return {
            "architecture": _BERT,
            "images": {"source": "digits", "patch": 2, "codes": 16},
            "objective": {"kind": "masked", "weighting": "maskgit"},
            "training": training,
            **more,
        }

    return SimpleNamespace(causal=causal, masked=masked, digits=digits, llama=_LLAMA, bert=_BERT)
