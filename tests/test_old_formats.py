"""What earlier versions wrote still works: checkpoints load, interrupted runs go on.

tests/fixtures/README.md says which version wrote the files and how.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

import compress
from compress.checkpoint.state import ModelState, streamed_logits
from compress.models.sources.source import load_config
from compress.system.tensors import TensorIndex

FIXTURES = Path(__file__).parent / "fixtures"
CHECKPOINTS = sorted(p.name for p in (FIXTURES / "checkpoints").iterdir() if p.is_dir())


# checkpoints -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded() -> dict[str, torch.Tensor]:
    """Logits that the version which wrote the checkpoints computed, and the tokens they are of."""
    return load_file(FIXTURES / "checkpoints" / "logits.safetensors")


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoint_loads_with_from_pretrained(name, recorded, helpers):
    folder = FIXTURES / "checkpoints" / name
    (architecture,) = AutoConfig.from_pretrained(folder).architectures
    masked = architecture.endswith("ForMaskedLM")
    auto = AutoModelForMaskedLM if masked else AutoModelForCausalLM
    model, notes = auto.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not notes["missing_keys"] and not notes["mismatched_keys"]
    logits = helpers.logits(model, recorded["input_ids"])
    assert helpers.difference(logits, recorded[name]) < 1e-4


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoint_is_inspected_and_streamed(name, recorded, helpers, tmp_path):
    folder = FIXTURES / "checkpoints" / name
    config = load_config(folder)
    assert len(compress.inspect(folder)["blocks"]) == config.num_hidden_layers
    state = ModelState.of_checkpoint(TensorIndex.open(folder), config)
    logits = streamed_logits(state, {"input_ids": recorded["input_ids"]}, tmp_path)
    assert helpers.difference(logits, recorded[name]) < 1e-4


def test_mask_file_fits_the_weights_it_was_made_of(helpers, tmp_path):
    zeros = FIXTURES / "checkpoints" / "zeros"
    base = FIXTURES / "models" / "llama"
    made = compress.apply_mask(zeros / "masks.safetensors", base, tmp_path / "made")
    assert made.base == "same"
    written, expected = helpers.weights(made.folder), helpers.weights(zeros)
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[n], expected[n]) for n in expected)
