"""Whether a result will fit the runtimes that a recipe exports it to, from shapes and options.

The exporters check what they are given before they read a weight. A run would hear of it after
hours, so a plan asks what can be known beforehand: packages, families, options, grids, widths,
layers.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from compress.errors import CompressError
from compress.methods.base import Method
from compress.methods.quantize.base import QuantizeMethod
from compress.methods.questions import targets_of
from compress.models.anatomy import Anatomy, stock_type
from compress.models.kind import kind_of
from compress.models.outline import Outline
from compress.planning.recipe import ExportSpec, Recipe, split_evaluation
from compress.runtimes.decoder import FAMILIES as DECODERS
from compress.runtimes.gguf.blocks import ALL_TYPES, type_for
from compress.runtimes.gguf.export import FAMILIES as GGUF_FAMILIES
from compress.runtimes.onnx.encoder import FAMILIES as ENCODERS
from compress.runtimes.onnx.linears import block_size
from compress.runtimes.requirements import require

_FAMILIES = {"gguf": GGUF_FAMILIES, "onnx": (*DECODERS, *ENCODERS)}
_OPTIONS: dict[str, dict[str, tuple[str, ...]]] = {
    "gguf": {"type": ALL_TYPES, "embeddings": ALL_TYPES, "activations": ("int8",)},
    "onnx": {
        "type": ("auto",), "embeddings": ("auto", "8", "4"), "activations": ("int8", "float32"),
    },
}  # fmt: skip


def check_exports(
    recipe: Recipe, model: nn.Module, anatomy: Anatomy, after: Sequence[tuple[Method, Outline]]
) -> None:
    """Refuse exports of a run's result, and runtimes to measure it in, that cannot be.

    Args:
        model: the original on the meta device.
        after: the steps, each with what it leaves.

    Raises:
        CompressError: naming the part of the recipe.
    """
    asked = [(spec, f"output.exports ({spec.to})", False) for spec in recipe.output.exports]
    if recipe.evaluation is not None:
        _, evaluation = split_evaluation(recipe.evaluation)
        asked += [
            (ExportSpec(to=name), f"evaluation.runtimes ({name})", True)
            for name in evaluation.runtimes
        ]
    for spec, where, running in asked:
        try:
            check_options(
                spec.to, type=spec.type, embeddings=spec.embeddings, activations=spec.activations
            )
            check_runtime_of(spec.to, model, running=running)
            _check_result(spec, anatomy, after)
        except CompressError as error:
            raise error.within(where) from None


def check_runtime_of(to: str, model: nn.Module, *, running: bool) -> None:
    """Refuse a format whose packages are missing, or that does not know a model's family.

    Args:
        model: its weights are not looked at.
        running: whether it is to be run there, too.

    Raises:
        CompressError: naming the package and its pip line, or the families.
    """
    require(to, running=running)
    family, kind = stock_type(model.config), kind_of(model)
    wanted = "masked" if family in ENCODERS else "causal"
    if family not in _FAMILIES[to] or kind != wanted:
        raise CompressError(
            f"a family that the {to} exporter knows: {', '.join(_FAMILIES[to])}",
            f"one of type {family!r}" + (f" with a head of kind {kind}" * (kind != wanted)),
            "Leave the runtime out: transformers runs it",
        )  # fmt: skip


def _check_result(
    spec: ExportSpec, anatomy: Anatomy, after: Sequence[tuple[Method, Outline]]
) -> None:
    head = anatomy.blocks[0].head_dim
    if spec.to == "onnx" and head % 16:
        raise CompressError(
            "heads of a multiple of 16, as onnxruntime's attention needs them", f"head_dim {head}",
            "Leave the runtime out: transformers runs it",
        )  # fmt: skip
    if spec.to == "gguf" and after:
        _check_uniform(after[-1][1])
    for method, outline in after:
        if isinstance(method, QuantizeMethod):
            _check_grids(spec, method, outline)


def _check_uniform(outline: Outline) -> None:
    """llama.cpp has plain linears, and one number of heads and neurons for all layers."""
    shapes = set()
    for block in outline.blocks:
        for name, linear in block.linears.items():
            if linear.layer:
                raise CompressError(
                    "plain linears", f"a {linear.layer} layer at {block.anatomy.path}.{name}",
                    "Export to onnx, or drop the step",
                )  # fmt: skip
        shapes.add(
            tuple((name, y.out_features, y.in_features) for name, y in block.linears.items())
        )
    if len(shapes) > 1:
        raise CompressError(
            "the same widths in all layers: llama.cpp has one number of heads and neurons for them",
            "widths that differ between layers", "Prune with uniform widths, or export to onnx",
        )  # fmt: skip


def _check_grids(spec: ExportSpec, method: QuantizeMethod, outline: Outline) -> None:
    scheme = method.scheme
    for block in outline.blocks:
        for name in targets_of(method.passes(), block.anatomy):
            label = f"{block.anatomy.path}.{name}"
            for _, columns in block.linears[name].matrices:
                if spec.to == "gguf":
                    type_for(scheme, columns, spec.type, label)
                elif scheme.activation_bits is None:
                    block_size(scheme.group_size or columns, columns, label)
    rounded = method.embedding_scheme
    for rows, columns in outline.tables if rounded is not None else ():
        label = f"the embedding of {rows} x {columns}"
        if spec.to == "gguf":
            type_for(rounded, columns, spec.embeddings, label)
        else:
            block_size(rounded.group_size or columns, columns, label)


def check_options(to: str, **given: str) -> None:
    """Refuse options that a format does not have.

    Args:
        to: gguf or onnx.
        given: type, embeddings, activations; their defaults suit every format.

    Raises:
        CompressError: naming the option and its values.
    """
    known = _OPTIONS[to]
    for option, value in given.items():
        if value not in known[option]:
            raise CompressError(
                f"--{option} for {to} to be one of {', '.join(known[option])}", repr(value)
            )
