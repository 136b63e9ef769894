"""A checkpoint as a folder for onnxruntime: graph, weights, config, tokenizer, and what it is."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from compress.checkpoint.embeddings import read_embeddings
from compress.checkpoint.export import companions
from compress.checkpoint.save import require_empty
from compress.errors import CompressError
from compress.linear.quantized import scheme_of
from compress.models.loading import load_config
from compress.models.sources.source import Source
from compress.runtimes.decoder import TABLES, Decoder, open_decoder
from compress.runtimes.onnx.decoder import build_decoder
from compress.runtimes.onnx.description import DESCRIPTION, OnnxDescription
from compress.runtimes.onnx.encoder import FAMILIES as ENCODERS
from compress.runtimes.onnx.encoder import Encoder, build_encoder, open_encoder
from compress.runtimes.onnx.graph import Graph
from compress.runtimes.onnx.linears import block_size, pack_blocks
from compress.runtimes.onnx.tables import Table, rounded
from compress.runtimes.weights import table
from compress.system.files import content_digest, new_folder
from compress.system.shards import write_json

CARD = "README.md"
FLOATS, INTEGERS = 1, 4  # accuracy levels of MatMulNBits
DECODER_TABLES = (TABLES["embedding"], TABLES["head"])
ENCODER_TABLES = ("bert.embeddings.word_embeddings", "cls.predictions.decoder")


@dataclass
class OnnxExport:
    """What was written."""

    folder: Path
    bytes: int
    description: OnnxDescription

    def told(self) -> list[str]:
        """What a user should know of it, a line each."""
        return [
            f"size    {self.bytes / 1e6:.1f} MB; inputs of weight-only integers are multiplied in "
            f"{self.description.activations}",
            f'load    compress.load("{self.folder}", runtime="onnx")',
        ]


def export_onnx(
    source: Source,
    out: Path,
    *,
    embeddings: str = "auto",
    activations: str = "int8",
    trust_remote_code: bool = False,
) -> OnnxExport:
    """Write a model as an ONNX graph for onnxruntime.

    Args:
        source: a checkpoint of a llama-like model, or of BERT with its masked head.
        out: new or empty folder; it appears whole or not at all.
        embeddings: "8" or "4" rounds embedding and head to so many bits, to nearest, in groups of
            32; "auto" leaves them as they are.
        activations: what MatMulNBits multiplies the integers with: "float32", or "int8", its inputs
            rounded block by block, which is faster.

    Raises:
        CompressError: a family or a grid that the exporter does not have, before any weight is
            read; a folder that holds something; a full disk.
    """
    require_empty(out)
    family = load_config(source.folder, trust_remote_code=trust_remote_code).model_type
    masked = family.removeprefix("compress_") in ENCODERS
    opened = open_encoder if masked else partial(open_decoder, runtime="ONNX", more=ENCODERS)
    model = opened(source.folder, trust_remote_code=trust_remote_code)
    _check(model, embeddings)
    description: dict[str, Any] = {"kind": "masked" if masked else "causal"}
    if isinstance(model, Decoder):
        layers = {i: y.kv_heads for i, y in enumerate(model.layers) if y.attention}
        description |= {"head_dim": model.head_dim, "kv_heads": layers}
    with new_folder(out, "the ONNX model") as folder:
        graph = Graph(folder)
        try:
            accuracy = INTEGERS if activations == "int8" else FLOATS
            build: Any = build_encoder if masked else build_decoder
            build(graph, model, *_tables(model, embeddings), accuracy)
            graph.save("compress")
        finally:
            graph.close()
        files = {name: folder / name for name in ("model.onnx", "model.onnx.data")}
        described = OnnxDescription(
            **description, positions=model.positions, vocabulary=model.vocabulary,
            activations=activations,
            files={n: (path.stat().st_size, content_digest(path)) for n, path in files.items()},
        )  # fmt: skip
        write_json(folder / DESCRIPTION, described.model_dump(mode="json"))
        shutil.copyfile(source.folder / "config.json", folder / "config.json")
        for path in companions(source, trust_remote_code):
            _copy(path, folder / path.name)
        if source.kind == "folder" and (source.folder / CARD).is_file():
            shutil.copyfile(source.folder / CARD, folder / CARD)
    size = sum(path.stat().st_size for path in out.iterdir())
    return OnnxExport(out, size, described)


def _copy(path: Path, out: Path) -> None:
    """Copy a file; a tokenizer's without its indentation, which can be more than its content."""
    if path.name == "tokenizer.json":
        with suppress(ValueError):
            content = json.loads(path.read_text(encoding="utf-8"))
            text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
            out.write_text(text, encoding="utf-8")
            return
    shutil.copyfile(path, out)


def _check(model: Decoder | Encoder, embeddings: str) -> None:
    """Refuse grids that no operator holds, before any weight is read."""
    for index in range(model.count):
        for role, module in model.modules(index).items():
            for name, inner in module.named_modules():
                scheme = scheme_of(inner)
                if scheme is not None and scheme.activation_bits is None:
                    columns = inner.in_features
                    label = ".".join(filter(None, (model.path(index, role), name)))
                    block_size(scheme.group_size or columns, columns, label)
    if isinstance(model, Decoder) and model.head_dim % 16:
        raise CompressError(
            "heads of a multiple of 16, as onnxruntime's attention needs them",
            f"head_dim {model.head_dim}", "Run it with transformers (compress.load)",
        )  # fmt: skip
    rounded_already = read_embeddings(model.state.config)
    if embeddings != "auto" and (rounded_already or model.hidden % 16):
        raise CompressError(
            "an embedding in floats with rows of a multiple of 16 to round",
            f"{model.hidden} columns" + (", rounded by a step" if rounded_already else ""),
            "Use --embeddings auto",
        )
    for path, scheme in rounded_already.items():
        block_size(scheme.group_size or model.hidden, model.hidden, path)


def _tables(model: Decoder | Encoder, embeddings: str) -> tuple[Table, Table]:
    """Embedding and head; the same one where they are tied."""
    names = ENCODER_TABLES if isinstance(model, Encoder) else DECODER_TABLES
    if f"{names[1]}.weight" not in model.state.readable.names():
        names = names[:1] * 2

    @cache
    def made(path: str) -> Table:
        found = table(model.state, path)
        if found.grid is not None:
            return Table(path, pack_blocks(found.grid, path))
        assert found.dense is not None
        if embeddings == "auto":
            return Table(path, found.dense)
        return Table(path, rounded(found.dense, int(embeddings), path))

    return made(names[0]), made(names[1])
