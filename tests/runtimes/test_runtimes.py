"""A run that ends in other runtimes: exported, measured there, told in the report."""

from __future__ import annotations

import pytest

import compress

pytest.importorskip("onnxruntime")

RTN = {"method": "rtn", "bits": 4, "group_size": 32}
TIMED = {"prefill_tokens": 8, "decode_tokens": 2, "repeats": 3}


@pytest.fixture(scope="module")
def ran(checkpoint, text, helpers, tmp_path_factory):
    """A complete run with an export, its recipe and its folder."""
    section = {
        "text": {"source": str(text)}, "max_tokens": 256, "window": 64, "memory": False,
        "latency": TIMED, "runtimes": ["onnx"], "cache": False,
    }  # fmt: skip
    source = checkpoint("llama", head_dim=16)
    recipe = helpers.recipe(source, [RTN], evaluation=section, output={"exports": ["onnx"]})
    folder = tmp_path_factory.mktemp("runs") / "run"
    return recipe, folder, compress.run(recipe, folder)


def test_a_run_ends_in_an_exported_model_that_runs(ran, tokens):
    _, folder, result = ran
    assert result.exports == {"onnx": folder / "onnx"}
    model, tokenizer = compress.load(folder / "onnx", runtime="onnx")
    assert tokenizer is not None
    assert model.generate(tokens[:1, :8], max_new_tokens=3, eos_token_id=[]).shape == (1, 11)
    card = (folder / "onnx" / "README.md").read_text()
    assert 'runtime="onnx"' in card and "library_name: onnxruntime" in card
