"""What a model can be asked: the next token (causal), a hidden one (masked), a label (labels)."""

from __future__ import annotations

import inspect
from typing import Literal

import torch
from torch import nn

from compress.errors import CompressError
from compress.models.heads import head_of

Kind = Literal["causal", "masked", "labels", "other"]


def kind_of(model: nn.Module) -> Kind:
    """Return what the head of ``model`` predicts, from the class tables of transformers.

    Classes that transformers does not list (our own model types, remote code) are told by the
    ending of their name, which the library's naming rule makes reliable. A causal class whose
    config says ``is_causal=False`` sees all tokens: it is a masked model.
    """
    if head_of(model) is not None:
        return "labels"
    kind = _kind_of_class(model)
    bidirectional = getattr(getattr(model, "config", None), "is_causal", None) is False
    return "masked" if kind == "causal" and bidirectional else kind


def _kind_of_class(model: nn.Module) -> Kind:
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    for cls in type(model).__mro__:
        if cls.__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
            return "causal"
        if cls.__name__ in MODEL_FOR_MASKED_LM_MAPPING_NAMES.values():
            return "masked"
    name = type(model).__name__
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return "causal"
    return "masked" if name.endswith("ForMaskedLM") else "other"


def require_causal(model: nn.Module, where: str) -> None:
    """Refuse a model that does not predict the next token from the past alone.

    Names do not settle it: ``BertLMHeadModel`` with ``is_decoder=False`` sees the future and would
    get a perplexity close to 1. So the model is also asked: changing the last of eight tokens must
    leave the hidden states of the first seven alone.

    Raises:
        CompressError: masked LM, other head, or a model that looks ahead.
    """
    kind = kind_of(model)
    name = type(model).__name__
    if kind == "masked":
        raise CompressError(
            "a causal language model",
            f"the masked language model {name}",
            "Use masked scores (compress.eval.quality.masked), which predict hidden tokens",
            where=where,
        )
    if kind != "causal":
        raise CompressError(
            "a causal language model (...ForCausalLM)",
            name,
            "Load it with AutoModelForCausalLM, or AutoModelForMaskedLM for masked scores",
            where=where,
        )
    if _looks_ahead(model):
        raise CompressError(
            "a model whose predictions depend on the past alone",
            f"{name}, whose hidden states change when a later token changes",
            "Set is_decoder=True in its config, or use compress.eval.quality.masked",
            where=where,
        )


def require_masked(model: nn.Module, where: str) -> None:
    """Refuse a model whose head does not predict masked tokens.

    Raises:
        CompressError: the model is causal or has another head.
    """
    kind = kind_of(model)
    if kind != "masked":
        raise CompressError(
            "a masked language model (...ForMaskedLM)",
            f"the {'causal ' if kind == 'causal' else ''}model {type(model).__name__}",
            "Use perplexity (compress.eval.quality.perplexity) for a causal model",
            where=where,
        )


def takes_key_values(model: nn.Module) -> bool:
    """Whether a model's class goes on from keys and values that it is handed (weights unseen)."""
    return "past_key_values" in inspect.signature(type(model).forward).parameters


@torch.no_grad()
def has_key_value_cache(model: nn.Module) -> bool:
    """Whether ``model`` hands back keys and values to go on from, asked with one token.

    State-space models (Mamba, RWKV) keep a state under other names, older ones (OpenAI GPT) keep
    nothing, and RecurrentGemma takes a cache that it does not return.
    """
    if not takes_key_values(model):
        return False
    training = model.training
    model.eval()
    try:
        first = torch.zeros(1, 1, dtype=torch.long, device=model.device)
        answer = model(input_ids=first, use_cache=True)
    finally:
        model.train(training)
    return getattr(answer, "past_key_values", None) is not None


@torch.no_grad()
def _looks_ahead(model: nn.Module) -> bool:
    from compress.models.split_forward import SplitForward

    vocab = model.get_input_embeddings().weight.shape[0]
    ids = torch.arange(8).remainder(max(1, vocab - 1)).repeat(2, 1)
    ids[1, -1] = vocab - 1
    with SplitForward(model) as split:
        hidden = split.hidden(input_ids=ids.to(model.device))[:, :-1].float()
    scale = hidden.abs().max().clamp_min(1e-6)
    # Rounding may differ between the rows (experts batch them differently); real leaks are larger.
    # A NaN compares false here; the measurement itself reports it with a better message.
    noise = torch.finfo(model.dtype).eps ** 0.5
    return bool((hidden[0] - hidden[1]).abs().max() > noise * scale)
