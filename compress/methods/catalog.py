"""All methods by name. Ours have a line each here; nothing is imported until it is used.

A class says itself what it does (``summary``), in one place; the registry reads it there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from compress.methods.registry import Registry

if TYPE_CHECKING:
    from compress.methods.base import Method

M = TypeVar("M", bound=type)

BUILT_IN: dict[str, str] = {
    name: f"compress.methods.{target}"
    for name, target in (
        ("magnitude", "sparsity.magnitude:Magnitude"),
        ("wanda", "sparsity.wanda:Wanda"),
        ("sparsegpt", "sparsity.sparsegpt:SparseGPT"),
        ("maskllm", "sparsity.maskllm.method:MaskLLM"),
        ("rtn", "quantize.rtn:RoundToNearest"),
        ("gptq", "quantize.gptq:GPTQ"),
        ("w8a8", "quantize.rtn:W8A8"),
        ("shortgpt", "depth.shortgpt:ShortGPT"),
        ("sleb", "depth.sleb:SLEB"),
        ("drop_blocks", "depth.drop:DropBlocks"),
        ("flatten", "depth.flatten.method:Flatten"),
        ("fuse", "depth.fuse.method:Fuse"),
        ("ffn_width", "width.ffn:FFNWidth"),
        ("head_width", "width.heads:HeadWidth"),
        ("drop_experts", "width.experts:DropExperts"),
        ("vib", "width.vib.method:VIB"),
        ("svd", "factorize.svd:SVD"),
        ("asvd", "factorize.asvd:ASVD"),
        ("svd_llm", "factorize.svd_llm:SVDLLM"),
        ("fwsvd", "factorize.fwsvd:FWSVD"),
        ("drone", "factorize.drone:DRONE"),
        ("dense_sparse", "factorize.dense_sparse:DenseSparseMethod"),
        ("stf", "factorize.stf:STF"),
        ("distill", "distill.method:Distill"),
    )
}


def _check(target: Any) -> None:
    from compress.methods.contract import check_class  # imports torch

    check_class(target)


METHODS: Registry[type[Method]] = Registry("method", BUILT_IN, "compress.methods", _check)


def register_method(cls: M) -> M:
    """Make a method known by its ``name``, so that recipes can use it; for use as a decorator.

    ::

        @compress.register_method
        class Mine(LinearMethod): ...

    Installed packages need no such call: they declare an entry point of ``compress.methods``.

    Raises:
        CompressError: no complete method class, or a name that another one has.
    """
    return METHODS.register(cls)
