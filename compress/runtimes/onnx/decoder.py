"""The graph of a llama-like decoder: a cache in, logits of the last positions and the cache out."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from compress.runtimes.decoder import Decoder, Layer, LayerWeights
from compress.runtimes.onnx.graph import MICROSOFT, Graph
from compress.runtimes.onnx.linears import linear, merged
from compress.runtimes.onnx.tables import Table
from compress.runtimes.weights import Matrix


def build_decoder(
    graph: Graph, decoder: Decoder, embedding: Table, head: Table, accuracy: int
) -> None:
    """Add the whole model.

    Inputs: ``input_ids`` [batch, tokens]; ``start`` [1], the first position of them whose logits
    are wanted; ``lengths`` [batch], of cache and input together less one; ``total`` [], the largest
    of them plus one; ``past_key.i`` and ``past_value.i`` [batch, kv_heads, places, head_dim].
    Outputs: ``logits`` [batch, tokens - start, vocabulary], ``present_key.i``, ``present_value.i``.
    Where past and present are the same buffer, the cache is written in place.
    """
    ids = graph.input("input_ids", np.int64, ["batch", "tokens"])
    graph.input("start", np.int64, [1])
    graph.input("lengths", np.int32, ["batch"])
    graph.input("total", np.int32, [])
    rotary = _rotary(graph, decoder)
    stream, delta = embedding.rows(graph, ids), ""
    for index, weights in enumerate(decoder.blocks()):
        layer = decoder.layers[index]
        if layer.attention:
            norm, stream = _norm(graph, decoder, stream, delta, weights, "input", index)
            delta = _attention(graph, decoder, norm, layer, weights, rotary, index, accuracy)
        if layer.mlp:
            norm, stream = _norm(graph, decoder, stream, delta, weights, "post_attention", index)
            delta = _mlp(graph, norm, weights.maps, accuracy)
    if delta:
        stream = graph.node("Add", stream, delta)
    limits = [graph.constant(np.array([value])) for value in (np.iinfo(np.int64).max, 1)]
    last = graph.node("Slice", stream, "start", limits[0], limits[1])
    weight = graph.constant(decoder.last_norm().numpy(), "norm")
    last = graph.node("SimplifiedLayerNormalization", last, weight, epsilon=decoder.eps, axis=-1)
    logits = head.product(graph, last, accuracy)
    graph.node("Identity", logits, outputs=["logits"])
    graph.output("logits", np.float32, ["batch", "wanted", decoder.vocabulary])


def _rotary(graph: Graph, decoder: Decoder) -> list[str]:
    """Cosines and sines [positions, head_dim / 2], which the session computes when it is opened:
    as numbers in the file they would be megabytes."""
    ends = [graph.constant(np.float32(value)) for value in (0, decoder.positions, 1)]
    places = graph.node("Unsqueeze", graph.node("Range", *ends), graph.constant(np.array([1])))
    frequencies = graph.constant(decoder.frequencies.numpy(), "frequencies")
    angles = graph.node("Mul", places, frequencies)
    scale = graph.constant(np.float32(decoder.rotary_scale))
    return [graph.node("Mul", graph.node(function, angles), scale) for function in ("Cos", "Sin")]


def _norm(
    graph: Graph, decoder: Decoder, stream: str, delta: str, weights: LayerWeights, which: str,
    index: int,
) -> tuple[str, str]:  # fmt: skip
    """The norm of the stream with what the sub-layer before adds to it, and that sum."""
    weight = graph.constant(weights.norms[which].numpy(), f"{index}.{which}_norm")
    if not delta:
        norm = graph.node(
            "SimplifiedLayerNormalization", stream, weight, epsilon=decoder.eps, axis=-1
        )
        return norm, stream
    names = [f"{index}.{which}.norm", "", "", f"{index}.{which}.sum"]
    graph.node(
        "SkipSimplifiedLayerNormalization", stream, delta, weight, outputs=names,
        domain=MICROSOFT, epsilon=decoder.eps,
    )  # fmt: skip
    return names[0], names[3]


def _attention(
    graph: Graph, decoder: Decoder, x: str, layer: Layer, weights: LayerWeights, rotary: list[str],
    index: int, accuracy: int,
) -> str:  # fmt: skip
    size = decoder.head_dim
    cache = [
        graph.input(f"past_{kind}.{index}", np.float32, ["batch", layer.kv_heads, "places", size])
        for kind in ("key", "value")
    ]
    maps = weights.maps
    normed = "q" in weights.norms
    together = None if normed else merged([maps["q"], maps["k"], maps["v"]])
    if together is not None:
        inputs = [linear(graph, x, together, accuracy), "", ""]
    else:
        inputs = [linear(graph, x, maps[role], accuracy) for role in ("q", "k", "v")]
        if normed:
            for place, (role, heads) in enumerate((("q", layer.heads), ("k", layer.kv_heads))):
                inputs[place] = _head_norm(
                    graph, decoder, inputs[place], weights, role, heads, index
                )
    made = [f"{index}.attention", f"present_key.{index}", f"present_value.{index}"]
    graph.node(
        "GroupQueryAttention", *inputs, *cache, "lengths", "total",
        *(rotary if layer.rotary else ()), outputs=made, domain=MICROSOFT,
        num_heads=layer.heads, kv_num_heads=layer.kv_heads, do_rotary=int(layer.rotary),
    )  # fmt: skip
    for name in made[1:]:
        graph.output(name, np.float32, ["batch", layer.kv_heads, "places_after", size])
    return linear(graph, made[0], maps["o"], accuracy)


def _head_norm(
    graph: Graph, decoder: Decoder, x: str, weights: LayerWeights, role: str, heads: int, index: int
) -> str:
    """A norm over each head of queries or keys [batch, tokens, heads x head_dim]."""
    apart = graph.node("Reshape", x, graph.constant(np.array([0, 0, heads, decoder.head_dim])))
    weight = graph.constant(weights.norms[role].numpy(), f"{index}.{role}_norm")
    normed = graph.node("SimplifiedLayerNormalization", apart, weight, epsilon=decoder.eps, axis=-1)
    return graph.node("Reshape", normed, graph.constant(np.array([0, 0, -1])))


def _mlp(graph: Graph, x: str, maps: Mapping[str, tuple[Matrix, ...]], accuracy: int) -> str:
    together = merged([maps["gate"], maps["up"]])
    if together is not None:
        both = linear(graph, x, together, accuracy)
        gate, up = graph.node("Split", both, outputs=2, axis=-1, num_outputs=2)
    else:
        gate, up = (linear(graph, x, maps[role], accuracy) for role in ("gate", "up"))
    active = graph.node("QuickGelu", gate, domain=MICROSOFT, alpha=1.0)  # silu
    return linear(graph, graph.node("Mul", active, up), maps["down"], accuracy)
