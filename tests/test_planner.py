"""Plans: no weight is read, what cannot work is refused, what is predicted is what is written."""

from __future__ import annotations

import struct

import pytest

import compress
from compress.conformance.tiny import TinyFamily
from compress.conformance.trial import Trial
from compress.errors import CompressError
from compress.methods.quantize.rtn import RoundToNearest

RTN = {"method": "rtn", "bits": 4, "group_size": 16}


def test_no_weight_is_read(own_checkpoint, text, helpers):
    folder = own_checkpoint("llama")
    path = folder / "model.safetensors"
    data = path.read_bytes()
    start = 8 + struct.unpack("<Q", data[:8])[0]
    path.write_bytes(data[:start] + b"\xff" * (len(data) - start))  # NaN throughout
    steps = [{"method": "ffn_width", "share": 0.25}, {"method": "sparsegpt"}, RTN]
    made = compress.plan(helpers.recipe(folder, steps, text))
    assert [s.method.name for s in made.steps] == ["ffn_width", "sparsegpt", "rtn"]
    with pytest.raises(CompressError, match="NaN"):
        compress.load(folder)


def test_prediction_goes_from_step_to_step(checkpoint, text, helpers):
    steps = [{"method": "ffn_width", "share": 0.25}, {"method": "wanda", "pattern": "2:4"}, RTN]
    made = compress.plan(helpers.recipe(checkpoint("llama"), steps, text))
    width, zeros, precision = (s.after for s in made.steps)
    assert made.original.parameters > width.parameters == zeros.parameters == precision.parameters
    assert width.nonzero > zeros.nonzero == precision.nonzero
    assert width.bytes == zeros.bytes > precision.bytes == made.result.bytes
    assert 4 < precision.effective_bits < 8 and width.effective_bits == 32
    assert made.peak_bytes > 0 and made.seconds > 0
    assert [s.macs > 0 for s in made.steps] == [True, True, False]


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (RoundToNearest, {"group_size": 16, "symmetric": False}),
        (RoundToNearest, {"bits": 3, "group_size": None}),
    ],
)
def test_predicted_size_is_what_is_written(method, options, tmp_path):
    """Of grids that the conformance suite does not use; it asks the same of every method."""
    Trial(method(**options), TinyFamily("bert", tmp_path), tmp_path).predicts_sizes()


@pytest.mark.parametrize(
    ("first", "second", "why"),
    [
        (RTN, {"method": "wanda"}, "rounded already"),
        (RTN, {"method": "ffn_width", "share": 0.5}, "rounded already"),
        ({**RTN, "group_size": 8}, {"method": "svd", "rank": 8}, "rounded already"),
        ({"method": "magnitude"}, {"method": "svd", "ratio": 0.5}, "fill the zeros"),
    ],
    ids=["zeros", "width", "low-rank", "filled"],
)
def test_wrong_order(first, second, why, checkpoint, text, helpers):
    with pytest.raises(CompressError) as caught:
        compress.plan(helpers.recipe(checkpoint("llama"), [first, second], text))
    assert why in str(caught.value)
    assert f"Put {second['method']} before {first['method']}" in str(caught.value)
    compress.plan(helpers.recipe(checkpoint("llama"), [second, first], text))


def test_same_layers_quantised_twice(checkpoint, helpers):
    source = checkpoint("llama")
    with pytest.raises(CompressError, match="steps.1 .rtn.*quantised"):
        compress.plan(helpers.recipe(source, [RTN, RTN]))
    shared_out = [{**RTN, "include": ["*mlp*"]}, {**RTN, "bits": 8, "exclude": ["*mlp*"]}]
    compress.plan(helpers.recipe(source, shared_out))


@pytest.mark.parametrize(
    ("step", "words"),
    [
        ({"method": "rtn", "group_size": 128}, ["32", "group_size", "q_proj", "16"]),
        ({"method": "magnitude", "pattern": "2:5"}, ["divisible by 5", "q_proj"]),
        ({"method": "magnitude", "include": ["*nothing*"]}, ["match none", "model.layers.0"]),
        ({"method": "svd", "rank": 32}, ["rank", "Lower"]),
        ({"method": "shortgpt", "remove": 3}, ["at most 2"]),
        ({"method": "ffn_width", "keep": 4096}, ["at most 64"]),
    ],
    ids=["group", "pattern", "include", "rank", "depth", "width"],
)
def test_sizes_that_do_not_fit(step, words, checkpoint, text, helpers):
    with pytest.raises(CompressError) as caught:
        compress.plan(helpers.recipe(checkpoint("llama"), [step], text))
    for word in ["steps.0", *words]:
        assert word in str(caught.value)


def test_missing_calibration(checkpoint, helpers):
    steps = ["magnitude", "wanda"]
    with pytest.raises(CompressError, match="steps.1 .wanda.*calibration: "):
        compress.plan(helpers.recipe(checkpoint("llama"), steps))


def test_memory_limit(checkpoint, text, helpers):
    recipe = helpers.recipe(checkpoint("llama"), ["wanda"], text)
    with pytest.raises(CompressError, match="max-memory.*wanda [0-9.]+ GB.*calibration.length"):
        compress.plan(recipe, max_memory=10_000_000)
    assert compress.plan(recipe, max_memory=10**12).peak_bytes < 10**12


@pytest.mark.parametrize(
    ("step", "word"),
    [
        ({"method": "ffn_width", "share": 0.5}, "layers"),
        ({"method": "shortgpt", "remove": 1}, "layers"),
        ({"method": "wanda"}, "layers"),
        ({"method": "maskllm"}, "layers"),
    ],
)
def test_shared_layers_are_refused(step, word, checkpoint, text, helpers):
    with pytest.raises(CompressError, match=f"albert.*{word}"):
        compress.plan(helpers.recipe(checkpoint("albert"), [step], text))
    assert "share one set" in compress.inspect(checkpoint("albert"))["methods"][step["method"]]


def test_shared_layers_take_data_free_steps(checkpoint, helpers, tmp_path):
    result = compress.run(helpers.recipe(checkpoint("albert"), [RTN]), tmp_path / "run")
    model, _ = compress.load(result.model)
    assert model.config.model_type == "albert"


def test_notes(checkpoint, text, helpers):
    made = compress.plan(helpers.recipe(checkpoint("llama"), [{"method": "magnitude"}]))
    assert any("no evaluation" in w for w in made.warnings)
    idle = compress.plan(
        helpers.recipe(checkpoint("llama"), [{"method": "magnitude", "sparsity": 0}])
    )
    assert any("neither size nor" in w for w in idle.warnings)


def test_time_follows_what_is_computed_and_moved(checkpoint, text, helpers):
    def seconds(*steps, **calibration):
        recipe = helpers.recipe(checkpoint("llama"), list(steps), text)
        recipe["calibration"] = {**recipe["calibration"], **calibration}
        return compress.plan(recipe).steps[-1].seconds

    wanda = {"method": "wanda", "pattern": "2:4"}
    assert seconds({"method": "drop_blocks", "blocks": [1]}) == 0  # nothing is read or written
    assert seconds(wanda, samples=64) > seconds(wanda, samples=8) > seconds(RTN)
    # Gradients are taken of as many sequences as there are.
    few, many = ({"method": "fwsvd", "ratio": 0.5, "windows": n} for n in (8, 4096))
    assert seconds(many, samples=8) == seconds(few, samples=8)
