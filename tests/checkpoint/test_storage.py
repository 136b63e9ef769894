"""Single tensors that a checkpoint in half precision keeps in float32 stay what they are."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

import compress

INSIDE, OUTSIDE = "model.layers.1.input_layernorm.weight", "model.norm.weight"
FINE = 1 + 2**-20  # bfloat16 would make one of it


@pytest.fixture
def mixed(own_checkpoint):
    """A checkpoint in bfloat16 but for a norm of a block and the last one."""
    folder = own_checkpoint("llama", dtype="bfloat16")
    file = folder / "model.safetensors"
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(file).items()}
    for name in (INSIDE, OUTSIDE):
        tensors[name] = torch.full(tensors[name].shape, FINE)
    save_file(tensors, file, {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    "steps",
    [
        ["magnitude"],
        [{"method": "ffn_width", "share": 0.25}],
        [{"method": "drop_blocks", "blocks": [0]}],
        [{"method": "rtn", "group_size": 16, "embeddings": 8}],
    ],
    ids=["zeros", "width", "depth", "embeddings"],
)
def test_results_keep_them(mixed, helpers, text, tmp_path, steps):
    result = compress.run(helpers.recipe(mixed, steps, text), tmp_path / "run")
    found = helpers.weights(result.model)
    inside = INSIDE.replace(".1.", ".0.") if "blocks" in steps[0] else INSIDE
    for name in (inside, OUTSIDE):
        assert found[name].dtype == torch.float32 and (found[name] == FINE).all()
    wide = {name for name, tensor in found.items() if tensor.dtype == torch.float32}
    assert {n for n in wide if not n.startswith("model.layers.")} == {OUTSIDE}
    assert all(n.endswith("input_layernorm.weight") for n in wide - {OUTSIDE})


def test_a_stated_type_is_the_type_of_all(mixed, helpers, tmp_path):
    recipe = helpers.recipe(mixed, ["magnitude"], output={"dtype": "bfloat16"})
    found = helpers.weights(compress.run(recipe, tmp_path / "run").model)
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}


def test_live_models_are_saved_as_they_are(tiny, helpers, tmp_path):
    model = tiny.build("llama").to(torch.bfloat16)
    model.get_submodule("model.layers.1.input_layernorm").float().weight.data.fill_(FINE)
    compress.apply(model, ["magnitude"])
    compress.save(model, tmp_path / "out")
    found = helpers.weights(tmp_path / "out")
    assert found[INSIDE].dtype == torch.float32 and (found[INSIDE] == FINE).all()
    assert {t.dtype for n, t in found.items() if n != INSIDE} == {torch.bfloat16}
