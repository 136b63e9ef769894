"""Several processes: a run under ``accelerate launch`` learns the masks that one process learns."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import compress
from compress.checkpoint.mask_file import load_masks
from compress.errors import CompressError
from compress.system import processes

ROOT = Path(__file__).parents[1]
FLAGS = "--multi_gpu --num_machines 1 --mixed_precision no --dynamo_backend no"
LAUNCH = f"-m accelerate.commands.launch {FLAGS} --main_process_port 0 --num_processes 2"


@pytest.fixture
def mask_recipe(checkpoint, text, helpers, tmp_path):
    """A pruning step, then masks learned on the whole model, as a file."""
    training = {"steps": 15, "batch": 8, "micro_batch": 4, "learning_rate": 0.05, "clip": 1.0,
                "precision": "float32"}  # fmt: skip
    steps = [
        {"method": "ffn_width", "share": 0.25, "round_to": 4},
        {"method": "maskllm", "scope": "model", "prior": "none", "training": training},
    ]
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(helpers.recipe(checkpoint("llama"), steps, text)))
    return path


def launch(recipe: Path, out: Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *LAUNCH.split(), "-m", "compress", "run", str(recipe), "--out", str(out)],
        cwd=ROOT, env=environment, text=True, capture_output=True, timeout=180,
    )  # fmt: skip


def groups(folder: Path) -> torch.Tensor:
    """Masks of all groups of four weights, bool [groups, 4]."""
    masks = dict(load_masks(folder / "model" / "masks.safetensors"))
    return torch.cat([masks[name].reshape(-1, 4) for name in sorted(masks)])


def test_two_processes_learn_the_masks_of_one(mask_recipe, tmp_path):
    compress.run(str(mask_recipe), tmp_path / "one")
    done = launch(mask_recipe, tmp_path / "two")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("model   ") == 1  # one process speaks
    for folder in ("one", "two"):
        journal = (tmp_path / folder / "journal.jsonl").read_text()
        notes = [json.loads(line).get("note") or {} for line in journal.splitlines()]
        assert max(note.get("masks.changed", 0) for note in notes) > 0.05
    one, two = groups(tmp_path / "one"), groups(tmp_path / "two")
    assert len(one) > 5000
    # Sums in another order move logits in the seventh digit: only a tie can fall the other way.
    assert float((one == two).all(-1).float().mean()) >= 0.999


def test_sharded_runs_are_refused(mask_recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")  # as the launcher does
    with pytest.raises(CompressError, match="Leave --use_fsdp out"):
        compress.run(str(mask_recipe), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_process_by_itself_is_a_world_of_one():
    assert processes.world() == processes.launched() == processes.World(0, 1)
    with processes.joined(3):
        processes.tell(None)
        processes.wait_for_all()
    assert json.dumps(processes.world().__dict__) == '{"rank": 0, "size": 1}'
