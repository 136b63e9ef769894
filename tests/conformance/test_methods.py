"""What every method owes its users on every family: it loads again, repeats, streams, harms not."""

from __future__ import annotations

import torch

import compress
from compress.linear.matrix import matrix
from compress.methods.catalog import BUILT_IN
from compress.models.anatomy import anatomy_of


def test_every_method_is_in_the_suite(methods):
    missing, gone = set(BUILT_IN) - methods, methods - set(BUILT_IN)
    assert not missing, f"give {missing} an entry in tests/conformance/conftest.py"
    assert not gone


def test_saved_checkpoint_is_the_model_in_memory(method, family, compressed, tokens, helpers):
    made = compressed(method, family)
    again = helpers.auto(family).from_pretrained(made.folder)
    expected = helpers.logits(made.model, tokens)
    assert helpers.difference(helpers.logits(again, tokens), expected) < 1e-4


def test_it_does_something(method, family, compressed, tiny, tokens, helpers):
    before = helpers.logits(tiny(family), tokens)
    after = helpers.logits(compressed(method, family).model, tokens)
    assert torch.isfinite(after).all()
    assert helpers.difference(after, before) > 1e-3


def test_streamed_equals_live(method, family, compressed, ran, helpers):
    live = helpers.weights(compressed(method, family).folder)
    streamed = helpers.weights(ran(method, family) / "model")
    assert streamed.keys() == live.keys()
    for name, tensor in live.items():
        assert tensor.dtype == streamed[name].dtype, name
        torch.testing.assert_close(streamed[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


def test_same_seed_same_bytes(
    method, family, ran, checkpoint, step, text, helpers, tmp_path_factory
):
    again = tmp_path_factory.mktemp("again")
    compress.run(helpers.recipe(checkpoint(family), [step(method)], text), again)
    first = helpers.contents(ran(method, family) / "model")
    assert helpers.contents(again / "model") == first
    assert any(name.endswith(".safetensors") for name in first)


def test_nothing_to_do_changes_nothing(
    method, family, cases, step, tiny, calibration, tokens, helpers
):
    case = cases[method]
    model = tiny(family)
    if case.low_rank:
        lower_rank(model, case.low_rank)
    before = helpers.logits(model, tokens)
    idle = {"method": step(method)["method"], **case.idle}
    model = compress.apply(model, [idle], calibration(family))
    assert helpers.difference(helpers.logits(model, tokens), before) <= case.tolerance


@torch.no_grad()
def lower_rank(model, rank: int) -> None:
    """Give all linears in blocks a low rank, so that a factorisation loses nothing."""
    for block in anatomy_of(model).blocks:
        for name in block.linears:
            weight = matrix(model.get_submodule(f"{block.path}.{name}"))
            left, values, right = torch.linalg.svd(weight, full_matrices=False)
            weight.copy_(left[:, :rank] * values[:rank] @ right[:rank])
