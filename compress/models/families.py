"""What cannot be read off a module tree: one small table a family, and a guess for the others.

Names of linears, their roles and their widths are inferred (see :mod:`compress.models.anatomy`). A
family needs an entry here only where its config fields have other names, where projections are
fused, or where its attention modules keep a size in an attribute that a narrower layer must change.
Adding a family means adding an entry, not code.

A type without an entry gets one inferred from its config (:func:`inferred_family`). What rests on
such a guess is rehearsed on a miniature before a plan accepts it
(:mod:`compress.planning.rehearsal`); the table is vouched for by the conformance suite.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

SEPARATE = "separate"  # one linear a projection
CONCATENATED = "concatenated"  # one linear, rows are [q | k | v] or [gate | up]
INTERLEAVED = "interleaved"  # one linear, rows are [head, (q, k, v), head_dim] (GPT-NeoX)


@dataclass(frozen=True)
class Family:
    """How a model type names things in its config, and how it fuses projections.

    Attributes:
        layers: config field that holds the number of blocks.
        heads, kv_heads: config fields for attention and key/value heads (None: as many as heads).
        head_dim: config field that fixes the head width independently of the number of heads, or
            None where the class computes ``hidden_size // heads``; with None a stock config cannot
            describe a block with fewer heads.
        ffn: config field that holds the FFN width.
        experts: config field that holds the number of routed experts of a layer; None without.
        qkv_layout, up_layout: how the producers of attention and FFN are fused.
        attributes: module path inside a block -> {attribute: expression}, sizes that the block's
            ``forward`` reads and that must follow the pruned widths. Expressions: ``heads``,
            ``kv_heads``, ``attention_width`` (heads x head_dim), ``ffn``. A name ``config.X``
            stands for a field X of the module's config, for classes whose forward reads the config.
        shared_blocks: all layers are the same module (ALBERT), so no layer can differ or go.
        fixed_first: number of layers at the start that the class builds unlike all others
            (ModernBERT's first has no norm before its attention), so none can take their place.
        fixed_heads: the class reads the number of heads outside its blocks too (for rotary
            frequencies, say), so that no layer can have another.
        fixed_layers: a weight outside the blocks has a row for each layer, so none can go.
        blocks: name of the list of blocks, for models with several lists that could be meant.
        roles: regular expressions of the ends of linears' paths by role, in front of those that
            :mod:`compress.models.anatomy` knows.
    """

    layers: str = "num_hidden_layers"
    heads: str = "num_attention_heads"
    kv_heads: str | None = None
    head_dim: str | None = None
    ffn: str = "intermediate_size"
    experts: str | None = None
    qkv_layout: str = SEPARATE
    up_layout: str = SEPARATE
    attributes: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    shared_blocks: bool = False
    fixed_first: int = 0
    fixed_heads: bool = False
    fixed_layers: bool = False
    blocks: str | None = None
    roles: Mapping[str, str] = field(default_factory=dict)


_LLAMA = Family(
    kv_heads="num_key_value_heads",
    head_dim="head_dim",
    attributes={"self_attn": {"num_heads": "heads", "num_key_value_heads": "kv_heads"}},
)
_BERT = Family(
    attributes={
        "attention.self": {"num_attention_heads": "heads", "all_head_size": "attention_width"}
    }
)

FAMILIES: dict[str, Family] = {
    **dict.fromkeys(
        [
            "llama",
            "mistral",
            "qwen2",
            "qwen3",
            "gemma",
            "gemma2",
            "gemma3_text",
            "smollm3",
            "olmo",
            "olmo2",
            "granite",
            "cohere",
            "cohere2",
            "starcoder2",
        ],
        _LLAMA,
    ),
    # Their output projection is as wide as the hidden size, whatever the fields say.
    **dict.fromkeys(("helium", "stablelm"), replace(_LLAMA, head_dim=None)),
    **dict.fromkeys(("glm", "glm4"), replace(_LLAMA, up_layout=CONCATENATED)),
    "phi3": Family(
        kv_heads="num_key_value_heads",
        head_dim="head_dim",
        qkv_layout=CONCATENATED,
        up_layout=CONCATENATED,
        attributes={
            "self_attn": {"num_key_value_heads": "kv_heads", "config.num_attention_heads": "heads"}
        },
    ),
    "gpt2": Family(
        layers="n_layer",
        heads="n_head",
        ffn="n_inner",
        qkv_layout=CONCATENATED,
        attributes={"attn": {"num_heads": "heads", "split_size": "attention_width"}},
    ),
    "gpt_neox": Family(
        qkv_layout=INTERLEAVED,
        attributes={"attention": {"num_attention_heads": "heads"}},
        fixed_heads=True,
    ),
    "opt": Family(ffn="ffn_dim", attributes={"self_attn": {"num_heads": "heads"}}),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra"), _BERT),
    # Its contact head weighs the attention maps of all heads of all layers.
    "esm": replace(_BERT, fixed_heads=True, fixed_layers=True),
    "distilbert": Family(
        layers="n_layers",
        heads="n_heads",
        ffn="hidden_dim",
        attributes={"attention": {"n_heads": "heads"}},
    ),
    "albert": Family(shared_blocks=True),
    "modernbert": Family(
        qkv_layout=CONCATENATED,
        up_layout=CONCATENATED,
        attributes={"attn": {"num_heads": "heads", "all_head_size": "attention_width"}},
        fixed_first=1,
    ),
    "uvit2d": Family(blocks="transformer_layers"),
    **dict.fromkeys(
        ("vit", "deit"), Family(attributes={"attention": {"num_attention_heads": "heads"}})
    ),
}

# Fields that hold the FFN width, and attributes in which attention modules keep their sizes, under
# the names that transformers' model files use for them.
_FFN_FIELDS = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "hidden_dim", "d_ff")
_EXPERT_FIELDS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_SIZES = {
    "num_heads": "heads",
    "num_attention_heads": "heads",
    "n_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "num_kv_heads": "kv_heads",
    "all_head_size": "attention_width",
}
_ATTENTIONS = ("self_attn", "attn", "attention", "self_attention", "attention.self")


def inferred_family(config: Any) -> Family:
    """Guess the entry of a model type outside the table from the fields that its config has.

    Args:
        config: a transformers config; one that covers several models (text and vision) is read by
            its own fields only.
    """

    def named(field: str) -> str:
        return (getattr(config, "attribute_map", None) or {}).get(field, field)

    fields = vars(config)
    kv_heads = named("num_key_value_heads")
    head_dim = named("head_dim")
    ffn = next((named(f) for f in _FFN_FIELDS if named(f) in fields), "intermediate_size")
    experts = next((named(f) for f in _EXPERT_FIELDS if named(f) in fields), None)
    return Family(
        layers=named("num_hidden_layers"),
        heads=named("num_attention_heads"),
        kv_heads=kv_heads if kv_heads in fields else None,
        head_dim=head_dim if head_dim in fields else None,
        ffn=ffn,
        experts=experts,
        attributes=dict.fromkeys(_ATTENTIONS, _SIZES),
    )
