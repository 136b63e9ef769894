"""How alike the hidden states in front of the blocks are: a matrix, measured block after block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from compress.methods.passes import Survey
from compress.methods.work import BlockSurvey
from compress.models.anatomy import Anatomy
from compress.models.outline import Outline

# Tokens, drawn evenly from all batches. The mean of a cosine over so many is known to about 0.001.
SAMPLE = 4096

Similarity = list[list[float]]  # [i][j]: mean cosine of what enters the blocks i and j <= i


def similarity_survey(decide: Callable[[Similarity, Anatomy], Any]) -> Survey:
    """A pass that compares what enters each block with what entered all blocks before it.

    Memory holds the states in front of two blocks; those in front of all of them are in files while
    the step lasts.

    Args:
        decide: turns the matrix, lower triangle with the diagonal, into the decision.
    """
    return Survey(observe_similarity, decide, memory=_memory, disk=_disk)


def observe_similarity(survey: BlockSurvey) -> list[float]:
    """Mean cosine similarity, over a sample of tokens, of the block's inputs and those of each
    block up to it: [index + 1], the last one 1."""
    states = _sample(survey)
    survey.kept["inputs"] = states
    row = []
    for index in range(survey.anatomy.index):
        earlier = survey.earlier(index)["inputs"].to(states.device)
        row.append(float(torch.dot(earlier.flatten(), states.flatten()) / len(states)))
    return [*row, 1.0]


def _sample(survey: BlockSurvey) -> torch.Tensor:
    """Normalised hidden states [tokens, hidden] of every so-many-th token that is no padding."""
    inputs, calls = survey.inputs, survey.calls
    total = sum(torch.Size(shape[:-1]).numel() for shape in inputs.shapes)
    stride = -(-total // SAMPLE)
    chosen, seen = [], 0
    for batch in range(len(inputs)):
        states = calls[batch].tokens(inputs.read(batch)).flatten(0, -2)
        chosen.append(states[(-seen) % stride :: stride].clone())
        seen += len(states)
    return functional.normalize(torch.cat(chosen), dim=-1)


def _memory(outline: Outline) -> int:
    return 3 * _state_bytes(outline)


def _disk(outline: Outline) -> int:
    return len(outline.blocks) * _state_bytes(outline)


def _state_bytes(outline: Outline) -> int:
    return 4 * SAMPLE * outline.hidden_size
