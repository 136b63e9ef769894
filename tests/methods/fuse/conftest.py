"""What tests of fusing share: a group of blocks before its training, and one after it."""

from __future__ import annotations

import pytest
import torch

from compress.engine.context import StepContext
from compress.engine.steps import run_step
from compress.methods.depth.fuse.method import Fuse
from compress.models.anatomy import anatomy_of, find_blocks
from compress.models.calls import capture_inputs
from compress.models.stream import StreamedModel
from compress.system.activations import Activations
from compress.train.reconstruction import BlockWork

LEARN = {"steps": 30, "batch": 2, "learning_rate": 0.01, "clip": None, "precision": "float32"}
OPTIONS = {"rank": 4, "delta_rate": 0.003}
CPU = torch.device("cpu")


@pytest.fixture
def group(tokens, tmp_path):
    """``group(model, removed)``: all blocks of a model but one, and what all of them return."""

    def make(model, removed, size=2):
        anatomy, blocks = anatomy_of(model), find_blocks(model)[1]
        batches = [{"input_ids": part} for part in tokens.split(size)]
        inputs, targets = Activations(tmp_path / "inputs"), Activations(tmp_path / "targets")
        calls = capture_inputs(model, anatomy, batches, inputs)
        with torch.no_grad():
            for batch in range(len(batches)):
                states = inputs.read(batch)
                for block, call in zip(blocks, calls, strict=True):
                    states = call[batch](block, states)
                targets.write(batch, states)
        stay = [i for i in range(len(blocks)) if i != removed]
        model.requires_grad_(False)
        return BlockWork(
            [blocks[i] for i in stay], [anatomy.blocks[i] for i in stay], inputs, targets,
            [calls[i] for i in stay], CPU, 0, dropped=[blocks[removed]],
        )  # fmt: skip

    return make


@pytest.fixture
def learned(tokens, tmp_path):
    """``learned(model, **options)``: figures of the first group that is fused."""

    def run(model, size=2, **options):
        notes = []
        batches = [{"input_ids": part} for part in tokens.split(size)]
        context = StepContext(
            StreamedModel(model), batches, tmp_path,
            report=lambda stage, index, count, note: notes.append(note),
        )  # fmt: skip
        training = {**LEARN, **options.pop("training", {})}
        run_step(Fuse(remove=1, **{**OPTIONS, **options}, training=training), context)
        (found,) = [note for note in notes if note and "fuse.before" in note]
        return found

    return run
