"""All methods by name. Adding one means adding a line; nothing is imported until it is used."""

from __future__ import annotations

from compress.registry import Registry

METHODS: Registry = Registry("method")

for _name, _target, _summary in (
    ("magnitude", "sparsity.magnitude:Magnitude", "zero the smallest weights; no data needed"),
    ("wanda", "sparsity.wanda:Wanda", "zero weights with small weight x activation norm"),
    ("sparsegpt", "sparsity.sparsegpt:SparseGPT", "zero weights, update the others (OBS)"),
    ("rtn", "quantize.rtn:RoundToNearest", "round weights to 2-8 bits; no data needed"),
    ("gptq", "quantize.gptq:GPTQ", "round weights to 2-8 bits with error feedback"),
    ("w8a8", "quantize.rtn:W8A8", "int8 weights, dynamic per-token int8 activations"),
):
    METHODS.register(_name, f"compress.methods.{_target}", _summary)
