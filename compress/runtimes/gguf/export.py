"""A checkpoint as one GGUF file, tensor by tensor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compress.errors import CompressError
from compress.linear.grid import dequantize
from compress.linear.layer import is_layer
from compress.linear.quantized import scheme_of
from compress.models.sources.source import Source
from compress.runtimes.decoder import Decoder, open_decoder
from compress.runtimes.gguf.blocks import BLOCK, FLOATS, TYPES, pack_grid, round_floats, type_for
from compress.runtimes.gguf.metadata import open_writer
from compress.runtimes.gguf.vocabulary import check_vocabulary
from compress.runtimes.weights import Matrix
from compress.system.files import new_file, refuse_existing

# Stock model type -> llama.cpp's architecture, and whether it wants the rows of queries and keys in
# pairs that are turned together next to each other.
_ARCHITECTURES = {"llama": ("llama", True), "mistral": ("llama", True),
                  "qwen2": ("qwen2", False), "qwen3": ("qwen3", False)}  # fmt: skip
FAMILIES = tuple(_ARCHITECTURES)
_NAMES = {
    "q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output",
    "gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down",
}  # fmt: skip
_NORM_NAMES = {"input": "attn_norm", "post_attention": "ffn_norm",
               "q": "attn_q_norm", "k": "attn_k_norm"}  # fmt: skip
_TABLES = {"embedding": "token_embd.weight", "head": "output.weight"}
_TORCH = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass
class GGUFExport:
    """What was written.

    Attributes:
        types: tensors by type.
        scales_changed: largest relative change of a scale by its rounding to float16; 0 where
            every weight is what it was.
        rounded: names of matrices that were rounded to nearest, since no step had quantised them.
    """

    file: Path
    bytes: int = 0
    types: dict[str, int] = field(default_factory=dict)
    scales_changed: float = 0.0
    rounded: list[str] = field(default_factory=list)

    def told(self) -> list[str]:
        """What a user should know of it, a line each."""
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.types.items()))
        lines = [f"size    {self.bytes / 1e6:.1f} MB; tensors: {kinds}"]
        if self.scales_changed:
            lines.append(
                "scales  rounded to float16, in which GGUF keeps them: the largest change is "
                f"{self.scales_changed:.3%} (codes are as they were; `scales: float16` of the step "
                "that quantised changes nothing)"
            )
        if self.rounded:
            lines.append(
                f"rounded {len(self.rounded)} matrices that no step had quantised, to the nearest "
                f"({self.rounded[0]} first)"
            )
        return lines


def export_gguf(
    source: Source,
    out: Path,
    *,
    type: str = "auto",
    embeddings: str = "auto",
    tokenizer: bool = True,
    trust_remote_code: bool = False,
) -> GGUFExport:
    """Write a model as a GGUF file.

    What a step has quantised is carried over code by code. Everything else keeps its numbers, or is
    rounded to nearest where a type asks for it.

    Args:
        source: a checkpoint of a llama-like model.
        out: the file, which must not exist; it appears whole or not at all.
        type: of the linears of the blocks: "auto" gives each grid the smallest type that holds it
            and unquantised ones the type that they are stored in.
        embeddings: the same for embedding and head.
        tokenizer: whether to write the tokenizer and chat template.

    Raises:
        CompressError: a family or a layer that llama.cpp does not have, widths that differ between
            layers, a grid that the type does not hold, a tokenizer that it cannot express, a full
            disk. All but the last before any weight is read.
    """
    refuse_existing(out, replaceable=False)
    decoder = open_decoder(source.folder, "GGUF", trust_remote_code)
    _check(decoder)
    stored = _TORCH.get(decoder.state.source.storage_dtype, "F32")
    plan = _plan(decoder, stored, type, embeddings)
    if tokenizer:
        check_vocabulary(source.folder)
    report = GGUFExport(out)
    with new_file(out, "the GGUF file") as partial:
        arch, _ = _ARCHITECTURES[decoder.family]
        writer = open_writer(decoder, arch, source, plan, partial, tokenizer)
        try:
            for array in _tensors(decoder, plan, report):
                writer.write_tensor_data(array)
        finally:
            writer.close()
    report.bytes = out.stat().st_size
    report.types = dict(Counter(kind for _, kind in plan.values()))
    return report


def _check(decoder: Decoder) -> None:
    """Refuse what llama.cpp's architectures do not have."""
    advice = "Export to onnx, or run it with transformers (compress.load)"
    if decoder.family not in _ARCHITECTURES:
        raise CompressError(
            f"a family of the GGUF exporter ({', '.join(_ARCHITECTURES)})", decoder.family, advice
        )
    if not decoder.uniform:
        raise CompressError(
            "the same widths in all layers: llama.cpp has one number of heads and neurons for them",
            "widths that differ between layers", "Prune with uniform widths, or export to onnx",
        )  # fmt: skip
    if not all(layer.attention and layer.mlp for layer in decoder.layers):
        raise CompressError("attention and FFN in every layer", "a layer without one", advice)
    for index in range(len(decoder.layers)):
        for role, module in decoder.modules(index).items():
            if is_layer(module):
                raise CompressError(
                    "plain linears", f"a {module.kind} layer at {decoder.path(index, role)}",
                    "Multiply it out first (compress materialize), or export to onnx",
                )  # fmt: skip
    kind = decoder.rope.get("rope_type", "default")
    if kind not in ("default", "linear", "llama3"):
        raise CompressError(
            "rotary positions of type default, linear or llama3", repr(kind), advice
        )


def _plan(
    decoder: Decoder, stored: str, asked: str, embeddings: str
) -> dict[str, tuple[tuple[int, ...], str]]:
    """GGUF's name of every tensor -> its shape and type, in the order of the file."""
    size, hidden = decoder.vocabulary, decoder.hidden
    plan = {}
    for role, name in _TABLES.items():
        if role == "embedding" or not decoder.tied:
            shape, scheme = (size, hidden), decoder.table_scheme(role)
            if scheme is not None:
                kind = type_for(scheme, hidden, embeddings, role)
            elif embeddings == "auto":
                kind = _float_type(shape, asked if asked in (*FLOATS, "Q8_0") else stored, role)
            else:
                kind = _float_type(shape, embeddings, role)
            plan[name] = (shape, kind)
    plan["output_norm.weight"] = ((hidden,), "F32")
    if decoder.rope.get("rope_type") == "llama3":
        plan["rope_freqs.weight"] = ((decoder.head_dim // 2,), "F32")
    for index in range(len(decoder.layers)):
        block = decoder.streamed.block(index)
        for name, width in (("input", hidden), ("post_attention", hidden)):
            plan[f"blk.{index}.{_NORM_NAMES[name]}.weight"] = ((width,), "F32")
        if hasattr(block.self_attn, "q_norm"):
            for name in ("q", "k"):
                plan[f"blk.{index}.{_NORM_NAMES[name]}.weight"] = ((decoder.head_dim,), "F32")
        for role, module in decoder.modules(index).items():
            shape = tuple(module.weight.shape)
            scheme, label = scheme_of(module), decoder.path(index, role)
            if scheme is None:
                kind = _float_type(shape, stored if asked == "auto" else asked, label)
            else:
                kind = type_for(scheme, shape[1], asked, label)
            plan[f"blk.{index}.{_NAMES[role]}.weight"] = (shape, kind)
            if module.bias is not None:
                plan[f"blk.{index}.{_NAMES[role]}.bias"] = ((shape[0],), "F32")
    return plan


def _float_type(shape: tuple[int, int], asked: str, label: str) -> str:
    if asked in TYPES and shape[1] % BLOCK:
        raise CompressError(
            f"rows of a multiple of {BLOCK} weights for {asked}", f"{shape[1]} at {label}",
            "Use --type F16, or round widths to a multiple of it",
        )  # fmt: skip
    return asked


def _tensors(decoder: Decoder, plan: dict[str, Any], report: GGUFExport) -> Iterator[np.ndarray]:
    """The values in the order of the plan, a block in memory at a time."""
    for role, name in _TABLES.items():
        if name in plan:
            yield _values(decoder.table(role), plan[name][1], report)
    yield decoder.last_norm().numpy()
    if "rope_freqs.weight" in plan:
        steps = torch.arange(0, decoder.head_dim, 2, dtype=torch.float32) / decoder.head_dim
        plain = 1.0 / decoder.theta**steps
        yield (plain / decoder.frequencies).numpy()
    _, paired = _ARCHITECTURES[decoder.family]
    for index, weights in enumerate(decoder.blocks()):
        for name in _NORM_NAMES:
            if name in weights.norms:
                yield weights.norms[name].numpy()
        for role, parts in weights.maps.items():
            (matrix,) = parts
            if paired and role in ("q", "k"):
                matrix = _paired(matrix, decoder.head_dim)
            name = f"blk.{index}.{_NAMES[role]}"
            yield _values(matrix, plan[f"{name}.weight"][1], report)
            if matrix.bias is not None:
                yield matrix.bias.numpy()


def _paired(matrix: Matrix, head_dim: int) -> Matrix:
    """The rows of each head in the order 0, half, 1, half + 1, ...: whole rows, exactly."""
    order = torch.arange(matrix.shape[0]).view(-1, 2, head_dim // 2).transpose(1, 2).flatten()
    grid = matrix.grid
    if grid is not None:
        zero = None if grid.zero_point is None else grid.zero_point[order]
        grid = replace(grid, codes=grid.codes[order], scale=grid.scale[order], zero_point=zero)
    return replace(
        matrix,
        dense=None if matrix.dense is None else matrix.dense[order],
        grid=grid,
        bias=None if matrix.bias is None else matrix.bias[order],
    )


def _values(matrix: Matrix, kind: str, report: GGUFExport) -> np.ndarray:
    if matrix.grid is None:
        assert matrix.dense is not None
        return _floats(matrix.dense, kind, matrix.name, report)
    if kind == "F32":
        return dequantize(matrix.grid.codes, matrix.grid.scale, matrix.grid.zero_point).numpy()
    packed, change = pack_grid(matrix.grid, kind)
    report.scales_changed = max(report.scales_changed, change)
    return packed


def _floats(values: torch.Tensor, kind: str, name: str, report: GGUFExport) -> np.ndarray:
    array = round_floats(values, kind)
    if kind in TYPES:
        report.rounded.append(name)
    elif kind == "F16" and not np.isfinite(array).all():
        raise CompressError(
            "weights within the reach of float16",
            f"larger ones in {name}",
            "Use --type F32 or BF16",
        )
    return array
