"""Two steps after one another: what the first one made is still there, on disk and live."""

from __future__ import annotations

import pytest
import torch

import compress

GROUPED = {"bits": 4, "group_size": 16}
PAIRS = {
    "width then gptq": [{"method": "ffn_width", "share": 0.25}, {"method": "gptq", **GROUPED}],
    "heads then wanda": [
        {"method": "head_width", "share": 0.5},
        {"method": "wanda", "pattern": "2:4"},
    ],
    "wanda 2:4 then gptq": [
        {"method": "wanda", "pattern": "2:4"},
        {"method": "gptq", **GROUPED},
    ],
    "depth then rtn": [{"method": "shortgpt", "remove": 1}, {"method": "rtn", **GROUPED}],
    "svd then rtn": [
        {"method": "svd", "rank": 8},
        {"method": "rtn", "bits": 4, "group_size": 8},
    ],
    "svd_llm then sparsegpt": [
        {"method": "svd_llm", "rank": 8},
        {"method": "sparsegpt", "pattern": "2:4"},
    ],
}


# Two families a pair and each family in turn: gated, transposed, bidirectional blocks.
FAMILIES = {
    "width then gptq": ["llama", "gpt2"],
    "heads then wanda": ["llama", "gpt2"],
    "wanda 2:4 then gptq": ["gpt2", "bert"],
    "depth then rtn": ["llama", "bert"],
    "svd then rtn": ["gpt2", "bert"],
    "svd_llm then sparsegpt": ["llama", "gpt2"],
}


@pytest.mark.parametrize(
    ("pair", "model_type"), [(pair, family) for pair in PAIRS for family in FAMILIES[pair]]
)
def test_two_steps(
    pair, model_type, checkpoint, tiny, calibration, text, tokens, helpers, tmp_path
):
    steps = PAIRS[pair]
    live = compress.apply(tiny(model_type), steps, calibration(model_type))
    run = compress.run(helpers.recipe(checkpoint(model_type), steps, text), tmp_path / "run")
    opened = helpers.auto(model_type).from_pretrained(run.model)
    expected = helpers.logits(live, tokens)
    # The run stores the first step's result before the second one reads it; in float32 that is
    # the same numbers, so a live model and a run must agree.
    assert helpers.difference(helpers.logits(opened, tokens), expected) < 1e-4
    if "2:4" in pair:
        assert_pattern(opened)
    if pair.startswith("depth"):
        assert len(compress.inspect(run.model)["blocks"]) == 2


def assert_pattern(model) -> None:
    """At most two nonzero weights in every four, in all linears of blocks."""
    from compress.linear.matrix import matrix
    from compress.models.anatomy import anatomy_of

    for block in anatomy_of(model).blocks:
        for name in block.linears:
            weight = matrix(model.get_submodule(f"{block.path}.{name}"))
            kept = (weight != 0).reshape(weight.shape[0], -1, 4).sum(-1)
            assert int(kept.max()) == 2, name


def test_three_steps_on_a_compressed_checkpoint(checkpoint, text, tokens, helpers, tmp_path):
    """What a run wrote is a source like any other."""
    first = compress.run(
        helpers.recipe(checkpoint("llama"), [{"method": "ffn_width", "share": 0.25}], text),
        tmp_path / "first",
    )
    steps = [{"method": "magnitude", "pattern": "4:8"}, {"method": "rtn", **GROUPED}]
    second = compress.run(helpers.recipe(first.model, steps), tmp_path / "second")
    model, _ = compress.load(second.model)
    assert model.config.intermediate_size == 48
    # The reader of packed weights unpacks them in the first forward.
    assert torch.isfinite(helpers.logits(model, tokens)).all()
    weight = model.model.layers[0].mlp.up_proj.weight
    assert int((weight != 0).reshape(-1, 8).sum(1).max()) <= 4


def test_flatten_then_sparsegpt_then_gptq(
    checkpoint, tiny, calibration, text, tokens, helpers, tmp_path
):
    steps = [
        {"method": "flatten", "remove": 1},
        {"method": "sparsegpt", "pattern": "2:4"},
        {"method": "gptq", **GROUPED},
    ]
    live = compress.apply(tiny("llama"), steps, calibration("llama"), compute="float32")
    recipe = helpers.recipe(checkpoint("llama"), steps, text, compute="float32")
    run = compress.run(recipe, tmp_path / "run")
    model, _ = compress.load(run.model)
    assert helpers.difference(helpers.logits(model, tokens), helpers.logits(live, tokens)) < 1e-4
    assert model.config.num_hidden_layers == 2
    assert_pattern(live)
    expected, found = compress.plan(recipe).result, compress.inspect(run.model)
    assert found["parameters"] == expected.parameters
    for late in ([steps[1], steps[0]], [steps[2], steps[0]]):
        with pytest.raises(compress.CompressError, match="Put flatten before"):
            compress.plan(helpers.recipe(checkpoint("llama"), late, text))


def test_quantised_source_is_not_quantised_again(checkpoint, helpers, tmp_path):
    rtn = {"method": "rtn", **GROUPED}
    first = compress.run(helpers.recipe(checkpoint("llama"), [rtn]), tmp_path / "first")
    with pytest.raises(compress.CompressError, match="quantised"):
        compress.run(helpers.recipe(first.model, [rtn]), tmp_path / "second")
