"""Embedding and head: one table for both where they are tied, in floats or in integer blocks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from compress.linear.grid import QuantScheme, find_group_qparams, quantize
from compress.runtimes.onnx.graph import MICROSOFT, Graph
from compress.runtimes.onnx.linears import Blocks, blocks_product, pack_blocks
from compress.runtimes.weights import Grid

GROUP = 32  # of a table that is rounded here


@dataclass(frozen=True)
class Table:
    """A matrix [vocabulary, hidden], read by rows or multiplied with.

    Attributes:
        name: of its constants; tied tables have one name and are written once.
        values: float32, or blocks.
    """

    name: str
    values: torch.Tensor | Blocks

    def rows(self, graph: Graph, ids: str) -> str:
        """The rows of token ids [batch, tokens]: [batch, tokens, hidden]."""
        if isinstance(self.values, torch.Tensor):
            return graph.node("Gather", self._floats(graph), ids, axis=0)
        blocks = self.values
        # A row's blocks one behind the other; the product sees the same bytes in three dimensions.
        shape = graph.constant(np.array([blocks.rows, -1]))
        inputs = [
            graph.node("Reshape", self._codes(graph, blocks), shape), ids,
            graph.node("Reshape", graph.floats(blocks.scales.reshape(-1), f"{self.name}.scales"),
                       shape),
        ]  # fmt: skip
        if blocks.zeros is not None:
            zeros = graph.constant(blocks.zeros.reshape(-1), f"{self.name}.zeros")
            inputs.append(graph.node("Reshape", zeros, shape))
        return graph.node(
            "GatherBlockQuantized", *inputs, domain=MICROSOFT, bits=blocks.bits,
            block_size=blocks.size, quantize_axis=1, gather_axis=0,
        )  # fmt: skip

    def product(self, graph: Graph, x: str, accuracy: int) -> str:
        """Logits [batch, tokens, vocabulary] of hidden states [batch, tokens, hidden]."""
        if isinstance(self.values, Blocks):
            return blocks_product(graph, x, self.name, self.values, accuracy)
        rows, width = self.values.shape
        flat = graph.node("Reshape", x, graph.constant(np.array([-1, width])))
        y = graph.node("Gemm", flat, self._floats(graph), transB=1)
        lead = graph.node("Shape", x, end=-1)
        return graph.node(
            "Reshape", y, graph.node("Concat", lead, graph.constant(np.array([rows])), axis=0)
        )

    def _floats(self, graph: Graph) -> str:
        assert isinstance(self.values, torch.Tensor)
        return graph.constant(self.values.contiguous().numpy(), self.name)

    def _codes(self, graph: Graph, blocks: Blocks) -> str:
        return graph.constant(blocks.codes, f"{self.name}.codes")


def rounded(values: torch.Tensor, bits: int, name: str) -> Blocks:
    """A float table rounded to nearest, symmetric, in groups of :data:`GROUP`."""
    group = GROUP if values.shape[1] % GROUP == 0 else None
    scheme = QuantScheme(bits=bits, group_size=group)
    scale, _ = find_group_qparams(values, scheme)
    return pack_blocks(Grid(quantize(values, scale, None, scheme), scale, None, scheme), name)
