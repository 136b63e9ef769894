"""The graph of a BERT-like masked language model: token ids and a mask in, logits out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from compress.checkpoint.records import apply_record
from compress.checkpoint.state import ModelState
from compress.errors import CompressError
from compress.linear.layer import features_of
from compress.models.loading import load_config
from compress.models.positions import positions_of
from compress.models.stream import StreamedModel
from compress.runtimes.onnx.graph import MICROSOFT, Graph
from compress.runtimes.onnx.linears import linear, merged
from compress.runtimes.onnx.tables import Table
from compress.runtimes.weights import is_removed, matrices
from compress.system.tensors import TensorIndex

FAMILIES = ("bert",)
_ACTIVATIONS = {"gelu": "Gelu", "relu": "Relu"}
_MAPS = {
    "q": "attention.self.query", "k": "attention.self.key", "v": "attention.self.value",
    "o": "attention.output.dense", "up": "intermediate.dense", "down": "output.dense",
}  # fmt: skip


@dataclass(frozen=True)
class Encoder:
    """A checkpoint of one of :data:`FAMILIES` with its masked head."""

    state: ModelState
    streamed: StreamedModel
    hidden: int
    head_dim: int
    vocabulary: int
    positions: int
    eps: float
    activation: str

    @property
    def count(self) -> int:
        return len(self.state.records)

    def modules(self, index: int) -> dict[str, nn.Module]:
        """The maps of a block by role."""
        block = self.streamed.block(index)
        return {role: block.get_submodule(path) for role, path in _MAPS.items()}

    def path(self, index: int, role: str) -> str:
        return f"{self.streamed.anatomy.blocks[index].path}.{_MAPS[role]}"

    def outer(self, name: str) -> torch.Tensor:
        return self.state.source.get(name).float()


def open_encoder(folder: Path, trust_remote_code: bool = False) -> Encoder:
    """Read what a folder holds; no weights yet.

    Raises:
        CompressError: another head, or something in it that the exporter does not know.
    """
    config = load_config(folder, trust_remote_code=trust_remote_code)
    state = ModelState.of_checkpoint(TensorIndex.open(folder), config, trust_remote_code)
    streamed = state.streamed()
    for index, record in enumerate(state.records):
        apply_record(streamed.block(index), record, streamed.anatomy.blocks[index])
    if not type(streamed.model).__name__.endswith("ForMaskedLM") or config.hidden_act not in (
        _ACTIVATIONS
    ):
        raise CompressError(
            f"a masked language model with {' or '.join(_ACTIVATIONS)}",
            f"{type(streamed.model).__name__} with {config.hidden_act}",
            "Run it with transformers (compress.load)",
        )
    return Encoder(
        state=state,
        streamed=streamed,
        hidden=config.hidden_size,
        head_dim=streamed.anatomy.blocks[0].head_dim,
        vocabulary=config.vocab_size,
        positions=positions_of(config) or 512,
        eps=config.layer_norm_eps,
        activation=_ACTIVATIONS[config.hidden_act],
    )


def build_encoder(
    graph: Graph, encoder: Encoder, embedding: Table, head: Table, accuracy: int
) -> None:
    """Add the whole model.

    Inputs: ``input_ids`` and ``attention_mask`` [batch, tokens], int64, the mask 1 where there is
    text. Output: ``logits`` [batch, tokens, vocabulary].
    """
    ids = graph.input("input_ids", np.int64, ["batch", "tokens"])
    mask = graph.input("attention_mask", np.int64, ["batch", "tokens"])
    hide = graph.node("Cast", graph.node("Equal", mask, graph.constant(np.int64(0))), to=1)
    lowest = graph.constant(np.float32(np.finfo(np.float32).min))
    bias = graph.node("Mul", hide, lowest)  # [batch, 1, 1, tokens]
    bias = graph.node("Unsqueeze", bias, graph.constant(np.array([1, 2])))
    x = _layer_norm(
        graph, encoder, _embedded(graph, encoder, embedding, ids), "bert.embeddings.LayerNorm"
    )
    for index in range(encoder.count):
        x = _block(graph, encoder, x, bias, index, accuracy)
    transform = "cls.predictions.transform"
    weight = graph.constant(encoder.outer(f"{transform}.dense.weight").t().numpy(), transform)
    x = graph.node(
        "Add", graph.node("MatMul", x, weight), _outer(graph, encoder, f"{transform}.dense.bias")
    )
    x = _layer_norm(graph, encoder, _active(graph, encoder, x), f"{transform}.LayerNorm")
    logits = head.product(graph, x, accuracy)
    graph.node("Add", logits, _outer(graph, encoder, "cls.predictions.bias"), outputs=["logits"])
    graph.output("logits", np.float32, ["batch", "tokens", encoder.vocabulary])


def _embedded(graph: Graph, encoder: Encoder, embedding: Table, ids: str) -> str:
    """Words and places; sentences are all the first."""
    places = encoder.outer("bert.embeddings.position_embeddings.weight")
    places += encoder.outer("bert.embeddings.token_type_embeddings.weight")[:1]
    zero, one = graph.constant(np.array([0])), graph.constant(np.array([1]))
    tokens = graph.node("Shape", ids, start=1, end=2)
    seen = graph.node("Slice", graph.constant(places.numpy(), "places"), zero, tokens, zero, one)
    return graph.node("Add", embedding.rows(graph, ids), seen)


def _block(graph: Graph, encoder: Encoder, x: str, bias: str, index: int, accuracy: int) -> str:
    block = encoder.streamed.block(index)
    encoder.state.load(index, block, encoder.streamed.anatomy)
    modules = encoder.modules(index)
    maps = {role: matrices(module, encoder.path(index, role)) for role, module in modules.items()}
    made = x
    if not is_removed(modules["o"]):
        together = merged([maps["q"], maps["k"], maps["v"]])
        if together is not None:
            all_three = linear(graph, x, together, accuracy)
            parts = graph.node("Split", all_three, outputs=3, axis=-1, num_outputs=3)
        else:
            parts = [linear(graph, x, maps[role], accuracy) for role in ("q", "k", "v")]
        heads = features_of(modules["q"])[0] // encoder.head_dim
        attended = _attention(graph, parts, bias, heads, encoder.head_dim)
        made = graph.node("Add", linear(graph, attended, maps["o"], accuracy), x)
    x = _layer_norm(graph, encoder, made, "attention.output.LayerNorm", block, index)
    made = x
    if not is_removed(modules["down"]):
        inner = _active(graph, encoder, linear(graph, x, maps["up"], accuracy))
        made = graph.node("Add", linear(graph, inner, maps["down"], accuracy), x)
    x = _layer_norm(graph, encoder, made, "output.LayerNorm", block, index)
    encoder.streamed.release_block(index)
    return x


def _attention(graph: Graph, parts: list[str], bias: str, heads: int, size: int) -> str:
    """Attention of queries, keys and values [batch, tokens, heads x size] over all tokens."""
    split = graph.constant(np.array([0, 0, heads, size]))
    turned = [
        graph.node("Transpose", graph.node("Reshape", part, split), perm=order)
        for part, order in zip(parts, ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3]), strict=True)
    ]
    scores = graph.node("MatMul", turned[0], turned[1])
    scores = graph.node("Mul", scores, graph.constant(np.float32(size**-0.5)))
    shares = graph.node("Softmax", graph.node("Add", scores, bias), axis=-1)
    mixed = graph.node("Transpose", graph.node("MatMul", shares, turned[2]), perm=[0, 2, 1, 3])
    return graph.node("Reshape", mixed, graph.constant(np.array([0, 0, heads * size])))


def _active(graph: Graph, encoder: Encoder, x: str) -> str:
    domain = MICROSOFT if encoder.activation == "Gelu" else ""
    return graph.node(encoder.activation, x, domain=domain)


def _layer_norm(
    graph: Graph,
    encoder: Encoder,
    x: str,
    path: str,
    block: nn.Module | None = None,
    index: int = 0,
) -> str:
    """A layer norm outside the blocks, or of one that is in memory."""
    if block is None:
        inputs = [_outer(graph, encoder, f"{path}.{name}") for name in ("weight", "bias")]
    else:
        norm = block.get_submodule(path)
        inputs = [
            graph.constant(getattr(norm, name).detach().numpy(), f"{index}.{path}.{name}")
            for name in ("weight", "bias")
        ]
    return graph.node("LayerNormalization", x, *inputs, axis=-1, epsilon=encoder.eps)


def _outer(graph: Graph, encoder: Encoder, name: str) -> str:
    return graph.constant(encoder.outer(name).numpy(), name)
