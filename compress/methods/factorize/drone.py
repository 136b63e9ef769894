"""DRONE: low rank where the inputs have low rank."""

from __future__ import annotations

from typing import ClassVar

from compress.methods.factorize.svd_llm import SVDLLM


class DRONE(SVDLLM):
    """Minimise ||(W - A B) X|| over factors of a given rank, in the whitening form.

    The paper solves it by singular value decompositions of W and of X, which for a large X do not
    fit into memory; with L L^T = X X^T the optimum is the truncated SVD of W L, and so what
    ``svd_llm`` computes. What the paper does beside it, ranks by a search with a tolerance of the
    loss, is not part of this: ranks are the same share of every matrix.
    """

    name: ClassVar[str] = "drone"
    summary: ClassVar[str] = "low-rank factors of least output error; the optimum of svd_llm"
    source: ClassVar[str] = "Chen et al. 2021, DRONE, NeurIPS 2021, section 3 (whitening form)"
