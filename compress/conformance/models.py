"""Tiny random models of many families, a tokenizer and a text: all that a check needs, no network.

A model has three blocks of width 32 and weights in float32; building one takes milliseconds.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

SPECIAL = ("[PAD]", "[BOS]", "[EOS]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
VOCABULARY = 264  # 256 bytes, the special tokens, one to spare
HIDDEN, FFN, LAYERS, HEADS, KV_HEADS, POSITIONS = 32, 64, 3, 4, 2, 128

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": POSITIONS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {**_COMMON, "num_key_value_heads": KV_HEADS}
_ROUTED = {"num_experts": 4, "moe_intermediate_size": 32}
_IDS = {k: _COMMON[k] for k in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")}

# model type -> (config class, fields, model class)
TINY: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama": ("LlamaConfig", _GROUPED, "LlamaForCausalLM"),
    "mistral": ("MistralConfig", {**_GROUPED, "head_dim": 8}, "MistralForCausalLM"),
    "qwen2": ("Qwen2Config", _GROUPED, "Qwen2ForCausalLM"),
    "qwen3": ("Qwen3Config", {**_GROUPED, "head_dim": 16}, "Qwen3ForCausalLM"),
    "gemma2": ("Gemma2Config", {**_GROUPED, "head_dim": 8}, "Gemma2ForCausalLM"),
    "phi3": ("Phi3Config", _GROUPED, "Phi3ForCausalLM"),
    "gpt2": (
        "GPT2Config",
        {
            **_IDS,
            "n_embd": HIDDEN,
            "n_layer": LAYERS,
            "n_head": HEADS,
            "n_inner": FFN,
            "n_positions": POSITIONS,
        },
        "GPT2LMHeadModel",
    ),
    "gpt_neox": ("GPTNeoXConfig", {**_COMMON, "rotary_pct": 0.5}, "GPTNeoXForCausalLM"),
    "opt": (
        "OPTConfig",
        {**_COMMON, "ffn_dim": FFN, "word_embed_proj_dim": HIDDEN},
        "OPTForCausalLM",
    ),
    "bert": ("BertConfig", _COMMON, "BertForMaskedLM"),
    "roberta": (
        "RobertaConfig",
        {**_COMMON, "max_position_embeddings": POSITIONS + 2, "type_vocab_size": 1},
        "RobertaForMaskedLM",
    ),
    "distilbert": (
        "DistilBertConfig",
        {
            **_IDS,
            "dim": HIDDEN,
            "hidden_dim": FFN,
            "n_layers": LAYERS,
            "n_heads": HEADS,
            "max_position_embeddings": POSITIONS,
        },
        "DistilBertForMaskedLM",
    ),
    "albert": ("AlbertConfig", {**_COMMON, "embedding_size": 16}, "AlbertForMaskedLM"),
    "modernbert": (
        "ModernBertConfig",
        {
            **_COMMON,
            "cls_token_id": 4,
            "sep_token_id": 5,
            "local_attention": 16,
            "global_attn_every_n_layers": 2,
        },
        "ModernBertForMaskedLM",
    ),
    **{
        kind: (
            f"{name}Config",
            {**_GROUPED, "head_dim": 8, "num_experts_per_tok": 2, **fields},
            f"{name}ForCausalLM",
        )
        for kind, name, fields in (
            ("mixtral", "Mixtral", {"num_local_experts": 4}),
            ("qwen2_moe", "Qwen2Moe", {**_ROUTED, "shared_expert_intermediate_size": 32}),
            ("qwen3_moe", "Qwen3Moe", {**_ROUTED, "norm_topk_prob": True}),
        )
    },
    "mamba": (
        "MambaConfig",
        {**_IDS, "hidden_size": 32, "state_size": 4, "num_hidden_layers": LAYERS},
        "MambaForCausalLM",
    ),
}

_WORDS = (
    "the of a to and in model weight layer small large sum row column was is gives takes every "
    "other under over with without block token text light river stone measure slow quick quiet"
)


def build(model_type: str, seed: int = 0, **fields: Any) -> PreTrainedModel:
    """A tiny model of a family of :data:`TINY`, the same one every time.

    Args:
        fields: of the config, beside or instead of those of the table.
    """
    config_name, base, class_name = TINY[model_type]
    config = getattr(transformers, config_name)(**{**base, **fields})
    torch.manual_seed(seed)
    model = getattr(transformers, class_name)(config).eval()
    with torch.no_grad():
        # Random initialisation leaves biases at zero and norms at one: mix-ups would not show.
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.config.architectures = [class_name]
    return model


def auto_class(model_type: str) -> Any:
    """The auto class of transformers that loads a family's tiny model."""
    masked = TINY[model_type][2].endswith("MaskedLM")
    return transformers.AutoModelForMaskedLM if masked else transformers.AutoModelForCausalLM


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A token a byte, and special tokens with a mask among them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {token: i for i, token in enumerate((*SPECIAL, *alphabet))}
    tokenizer = Tokenizer(models.BPE(ids, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    pad, bos, eos, unk, cls, sep, mask = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        unk_token=unk,
        cls_token=cls,
        sep_token=sep,
        mask_token=mask,
        clean_up_tokenization_spaces=False,
    )


def prose(count: int, seed: int) -> str:
    """At least ``count`` characters of words in lines."""
    generator = torch.Generator().manual_seed(seed)
    words, lines = _WORDS.split(), []
    while count > 0:
        picks = torch.randint(len(words), (12,), generator=generator).tolist()
        lines.append(" ".join(words[i] for i in picks) + ".\n")
        count -= len(lines[-1])
    return "".join(lines)


def token_ids() -> torch.Tensor:
    """Token ids [8, 24], none of them special."""
    generator = torch.Generator().manual_seed(3)
    return torch.randint(len(SPECIAL), VOCABULARY - 1, (8, 24), generator=generator)
