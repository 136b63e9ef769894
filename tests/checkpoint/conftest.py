"""Tiny random models of each family, and the changes that methods make to blocks, by hand."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from compress.checkpoint.hooks import install_hooks
from compress.linear.grid import QuantScheme
from compress.linear.low_rank import LowRankLinear
from compress.linear.matrix import as_linear, features, slice_linear
from compress.linear.quantized import QuantizedLinear
from compress.models.anatomy import anatomy_of
from compress.models.widths import linear_sizes, set_width_attributes

install_hooks()
torch.set_num_threads(1)

VOCABULARY = 64
_SMALL = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_BERT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}

# family -> (config class, its fields, model class)
FAMILIES: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama": ("LlamaConfig", _LLAMA, "LlamaForCausalLM"),
    "qwen3": ("Qwen3Config", {**_LLAMA, "head_dim": 16}, "Qwen3ForCausalLM"),
    "gpt2": (
        "GPT2Config",
        {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64},
        "GPT2LMHeadModel",
    ),
    "opt": (
        "OPTConfig",
        {
            "hidden_size": 32,
            "ffn_dim": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 32,
        },
        "OPTForCausalLM",
    ),
    "bert": ("BertConfig", _BERT, "BertForMaskedLM"),
    "distilbert": (
        "DistilBertConfig",
        {"dim": 32, "hidden_dim": 64, "n_layers": 3, "n_heads": 4, "max_position_embeddings": 64},
        "DistilBertForMaskedLM",
    ),
    "modernbert": (
        "ModernBertConfig",
        {**_BERT, "cls_token_id": 1, "sep_token_id": 2},
        "ModernBertForMaskedLM",
    ),
}


def build(family: str, seed: int = 0, **fields: Any) -> PreTrainedModel:
    config_name, base, class_name = FAMILIES[family]
    config = getattr(transformers, config_name)(**{**_SMALL, **base, **fields})
    torch.manual_seed(seed)
    model = getattr(transformers, class_name)(config).eval()
    with torch.no_grad():
        # Random initialisation leaves biases at zero and norms at one: mix-ups would not show.
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def auto_class(family: str) -> Any:
    """Return the Auto class that users open the family's checkpoints with."""
    masked = FAMILIES[family][2].endswith("MaskedLM")
    return transformers.AutoModelForMaskedLM if masked else transformers.AutoModelForCausalLM


def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, VOCABULARY, (2, 9), generator=generator)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**inputs()).logits


def narrow(model: PreTrainedModel, index: int, *, ffn: int = 0, kv_heads: int = 0) -> None:
    """Cut the last FFN neurons and the last key/value groups of a block, down to the given."""
    anatomy = anatomy_of(model).blocks[index]
    block = model.get_submodule(anatomy.path)
    before = anatomy.widths
    after = dict(before)
    if ffn:
        after["ffn"] = ffn
    if kv_heads:
        after["kv_heads"] = kv_heads
        after["heads"] = kv_heads * before["heads"] // before["kv_heads"]
    hd = anatomy.head_dim
    q, kv = (torch.arange(after[k] * hd) for k in ("heads", "kv_heads"))
    q_all, kv_all = before["heads"] * hd, before["kv_heads"] * hd
    for name, (rows, columns) in linear_sizes(anatomy, after).items():
        module = block.get_submodule(name)
        kind = next(site.kind for site in anatomy.sites if name in site.linears)
        keep_rows = torch.arange(rows) if rows else None
        if kind == "qkv" and anatomy.family.qkv_layout == "concatenated":
            keep_rows = torch.cat([q, q_all + kv, q_all + kv_all + kv])
        if kind == "up" and anatomy.family.up_layout == "concatenated":
            half = torch.arange(after["ffn"])
            keep_rows = torch.cat([half, before["ffn"] + half])
        slice_linear(module, keep_rows, torch.arange(columns) if columns else None)
    set_width_attributes(block, anatomy, after)


def linear_name(model: PreTrainedModel, index: int, kind: str) -> str:
    anatomy = anatomy_of(model).blocks[index]
    return f"{anatomy.path}.{anatomy.site(kind).linears[0]}"


def low_rank(model: PreTrainedModel, name: str, rank: int) -> None:
    linear = as_linear(model.get_submodule(name))
    out_features, in_features = features(linear)
    left, values, right = torch.linalg.svd(linear.weight.data, full_matrices=False)
    pair = LowRankLinear(in_features, out_features, rank, linear.bias is not None)
    pair.first.weight.data = right[:rank].contiguous()
    pair.second.weight.data = left[:, :rank] * values[:rank]
    if linear.bias is not None:
        pair.second.bias = linear.bias
    model.set_submodule(name, pair.eval())


def quantize_blocks(model: PreTrainedModel, scheme: QuantScheme) -> None:
    for anatomy in anatomy_of(model).blocks:
        block = model.get_submodule(anatomy.path)
        for path in anatomy.linears:
            module = block.get_submodule(path)
            leaves = [path]
            if isinstance(module, LowRankLinear):
                leaves = [f"{path}.first", f"{path}.second"]
            for leaf in leaves:
                linear = as_linear(block.get_submodule(leaf))
                block.set_submodule(leaf, QuantizedLinear.from_linear(linear, scheme))


CHANGES = (
    "nothing",
    "ffn in one layer",
    "heads in one layer",
    "ffn everywhere",
    "ffn and heads everywhere",
    "low rank",
    "W4",
    "W4 asymmetric",
    "W8A8",
    "narrower, low rank, W4",
)


def change(model: PreTrainedModel, what: str) -> PreTrainedModel:
    """Change a model in place the way steps do."""
    layers = range(len(anatomy_of(model).blocks))
    fewer = anatomy_of(model).blocks[0].kv_heads // 2
    if what == "ffn in one layer":
        narrow(model, 1, ffn=40)
    elif what == "heads in one layer":
        narrow(model, 1, kv_heads=fewer)
    elif what == "ffn everywhere":
        for index in layers:
            narrow(model, index, ffn=40)
    elif what == "ffn and heads everywhere":
        for index in layers:
            narrow(model, index, ffn=40, kv_heads=fewer)
    elif what == "low rank":
        low_rank(model, linear_name(model, 0, "down"), 5)
    elif what == "W4":
        quantize_blocks(model, QuantScheme(bits=4, group_size=8))
    elif what == "W4 asymmetric":
        quantize_blocks(model, QuantScheme(bits=4, group_size=16, symmetric=False))
    elif what == "W8A8":
        quantize_blocks(model, QuantScheme(bits=8, activation_bits=8))
    elif what == "narrower, low rank, W4":
        narrow(model, 1, ffn=40)
        low_rank(model, linear_name(model, 0, "down"), 8)
        quantize_blocks(model, QuantScheme(bits=4, group_size=8))
    else:
        assert what == "nothing"
    return model


@pytest.fixture(scope="session")
def tiny() -> SimpleNamespace:
    """The helpers of this file, for tests (which cannot import a conftest)."""
    helpers: dict[str, Callable[..., Any]] = {
        f.__name__: f
        for f in (
            build,
            auto_class,
            change,
            inputs,
            logits,
            narrow,
            linear_name,
            low_rank,
            quantize_blocks,
        )
    }
    return SimpleNamespace(families=tuple(FAMILIES), changes=CHANGES, **helpers)
