"""All methods by name. Adding one means adding a line; nothing is imported until it is used."""

from __future__ import annotations

from compress.methods.registry import Registry

METHODS: Registry = Registry("method")

for _name, _target, _summary in (
    ("magnitude", "sparsity.magnitude:Magnitude", "zero the smallest weights; no data needed"),
    ("wanda", "sparsity.wanda:Wanda", "zero weights with small weight x activation norm"),
    ("sparsegpt", "sparsity.sparsegpt:SparseGPT", "zero weights, update the others (OBS)"),
    (
        "maskllm",
        "sparsity.maskllm.method:MaskLLM",
        "learn N:M masks by gradients",
    ),
    ("rtn", "quantize.rtn:RoundToNearest", "round weights to 2-8 bits; no data needed"),
    ("gptq", "quantize.gptq:GPTQ", "round weights to 2-8 bits with error feedback"),
    ("w8a8", "quantize.rtn:W8A8", "int8 weights, dynamic per-token int8 activations"),
    ("shortgpt", "depth.shortgpt:ShortGPT", "remove the blocks that change their input least"),
    ("sleb", "depth.sleb:SLEB", "remove blocks one at a time by the loss without them"),
    ("ffn_width", "width.ffn:FFNWidth", "remove FFN neurons, refit the down projection"),
    ("head_width", "width.heads:HeadWidth", "remove whole KV groups, refit the output projection"),
    ("svd", "factorize.svd:SVD", "low-rank factors of each weight; no data needed"),
    ("asvd", "factorize.asvd:ASVD", "low-rank factors that favour large inputs"),
    ("svd_llm", "factorize.svd_llm:SVDLLM", "low-rank factors with the least output error"),
):
    METHODS.register(_name, f"compress.methods.{_target}", _summary)
