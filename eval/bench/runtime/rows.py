"""Where packed weights cost time: forwards of more and more tokens, the head left out."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from compress.eval.bench.masked_models import row
from compress.eval.bench.peer_material import prepare
from compress.eval.bench.rows import Row
from compress.eval.bench.runtime.inside import CODE, COMMAND, FOUR, SCALE, SMOKE, made, paired
from compress.models.loading import load_model

__all__ = ["CODE", "measure"]
TOKENS = (1, 2, 4, 8, 16, 64, 256, 1024)


def measure(work: Path, arguments: Namespace) -> list[Row]:
    torch.set_num_threads(1)
    material = prepare(work, SMOKE if arguments.smoke else SCALE, arguments.data_root)
    name, step = next(iter(FOUR.items()))
    models = [
        load_model(folder, dtype=torch.float32).base_model
        for folder in (material.model, made(work, name, step, material))
    ]
    found = []
    for tokens in TOKENS[:3] if arguments.smoke else TOKENS:
        ids = torch.arange(100, 100 + tokens)[None]

        def forward(model: PreTrainedModel, ids: torch.Tensor = ids) -> None:
            with torch.no_grad():
                model(ids, use_cache=False)

        one, other = (lambda m=m: forward(m) for m in models)
        one(), other()
        ratio = paired(other, one, 5)
        figure = f"SmolLM2 {name}: time of {tokens:,} tokens without the head / float32"
        found.append(row(COMMAND.format("rows"), figure, ratio, bar=1.05))
    return found
