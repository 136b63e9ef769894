"""MaskLLM through the public API: frozen weights, better masks, priors, transfer, bad options."""

from __future__ import annotations

import pytest
import torch

import compress
from compress.checkpoint.mask_file import load_masks
from compress.errors import CompressError

BLOCK = {"steps": 40, "batch": 2, "learning_rate": 5e-3, "clip": None}
MODEL = {"steps": 30, "batch": 4, "learning_rate": 5e-3, "clip": None}


@pytest.fixture
def apply(tiny, sequences):
    """``apply(step, family)``: a tiny model before, and after the step."""

    def run(step, family: str = "llama", seed: int = 0):
        before, after = tiny(family), tiny(family)
        compress.apply(after, [{"method": "maskllm", **step}], sequences(family), seed=seed)
        return before, after

    return run


def linears(model):
    """Path -> weight [out, in] of the linears inside blocks."""
    from compress.linear.matrix import matrix
    from compress.models.anatomy import anatomy_of

    return {
        f"{b.path}.{n}": matrix(model.get_submodule(f"{b.path}.{n}"))
        for b in anatomy_of(model).blocks
        for n in b.linears
    }


def error(before, after, tokens) -> float:
    with torch.no_grad():
        a, b = before(input_ids=tokens).logits, after(input_ids=tokens).logits
    return float((a - b).square().mean() / a.var())


@pytest.mark.parametrize(
    ("step", "family"),
    [
        ({"training": BLOCK}, "gpt2"),
        ({"training": BLOCK}, "bert"),
        ({"scope": "model", "training": MODEL}, "llama"),
        ({"scope": "model", "training": MODEL}, "gpt2"),
        ({"training": {**BLOCK, "steps": 5}, "end_to_end": {**MODEL, "steps": 5}}, "llama"),
    ],
    ids=["block-gpt2", "block-bert", "model-llama", "model-gpt2", "both-llama"],
)
def test_kept_weights_stay_bit_for_bit(step, family, apply):
    before, after = apply(step, family)
    dense, sparse = linears(before), linears(after)
    for name, weight in sparse.items():
        groups = (weight != 0).unflatten(1, (-1, 4)).sum(-1)
        assert int(groups.max()) <= 2, name
        kept = weight != 0
        assert torch.equal(weight[kept], dense[name][kept])
    others = {n: p for n, p in before.named_parameters() if n.removesuffix(".weight") not in dense}
    for name, parameter in after.named_parameters():
        if name in others:
            assert torch.equal(parameter, others[name]) and parameter.requires_grad


def test_learning_beats_its_prior_and_one_shot_masks(apply, tiny, tokens):
    _, one_shot = apply({"training": None, "prior": "wanda"})
    dense, searched = apply({"training": None, "prior": "search"})
    _, learned = apply({"training": BLOCK, "prior": "wanda"})
    assert error(dense, searched, tokens) < error(dense, one_shot, tokens)
    assert error(dense, learned, tokens) < 0.8 * error(dense, one_shot, tokens)


@pytest.mark.parametrize("prior", ["magnitude", "wanda", "sparsegpt", "search"])
def test_a_prior_without_training_is_its_mask(prior, apply, tiny, tokens):
    _, after = apply({"training": None, "prior": prior})
    if prior in ("magnitude", "wanda"):
        other = tiny("llama")
        compress.apply(other, [{"method": prior, "pattern": "2:4"}], tokens)
        for name, weight in linears(other).items():
            assert torch.equal(weight, linears(after)[name])
    for weight in linears(after).values():
        assert bool(((weight != 0).unflatten(1, (-1, 4)).sum(-1) == 2).all())


@pytest.mark.parametrize("scope", ["block", "model"])
def test_the_seed_decides_everything(scope, apply):
    training = {**(BLOCK if scope == "block" else MODEL), "steps": 6, "learning_rate": 0.02}
    step = {"scope": scope, "prior": "magnitude", "training": training}
    first, again, other = (linears(apply(step, seed=s)[1]) for s in (1, 1, 2))
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert any(not torch.equal(first[n], other[n]) for n in first)


def test_gradients_reach_every_layer_at_the_first_step(apply):
    # Adam moves whatever has a gradient by the learning rate: far enough here to flip any mask.
    step = {"scope": "model", "prior": "magnitude", "alpha": 0.5,
            "training": {**MODEL, "steps": 1, "learning_rate": 10.0}}  # fmt: skip
    _, after = apply(step)
    _, start = apply({"prior": "magnitude", "training": None})
    for name, weight in linears(after).items():
        assert not torch.equal(weight != 0, linears(start)[name] != 0), name


TUNED = {**BLOCK, "learning_rate": 1e-3}  # of weights: logits take more
WHOLE = {
    "tuning": {**MODEL, "learning_rate": 1e-3},
    "tuning_scope": "model",
    "distillation": {"labels": 0, "logits": 1},
}


@pytest.mark.parametrize("change", [{"least_squares": True}, {"tuning": TUNED}, WHOLE])
def test_weights_change_on_a_fixed_mask_only_when_asked(change, apply, tokens):
    dense, frozen = apply({"training": None})
    _, changed = apply({"training": None, **change})
    for name, weight in linears(changed).items():
        if "layers.0.self_attn.q_proj" in name:  # later masks see other inputs
            assert torch.equal(weight != 0, linears(frozen)[name] != 0)
        assert int((weight != 0).unflatten(1, (-1, 4)).sum(-1).max()) <= 2
        assert not torch.equal(weight, linears(frozen)[name])
    assert error(dense, changed, tokens) < error(dense, frozen, tokens)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_tuning_the_whole_model_changes_kept_weights_alone(family, apply):
    learned = {"training": {**BLOCK, "steps": 5}}
    dense, frozen = apply(learned, family)
    _, tuned = apply({**learned, **WHOLE}, family)
    names = {f"{n}.weight" for n in linears(dense)}
    for name, weight in linears(tuned).items():
        assert torch.equal(weight != 0, linears(frozen)[name] != 0), name
        assert not torch.equal(weight, linears(frozen)[name]), name
    before = dict(dense.named_parameters())
    for name, parameter in tuned.named_parameters():
        if name not in names:
            assert torch.equal(parameter, before[name]), name


def test_a_mask_file_starts_another_run(checkpoint, text, tmp_path, helpers):
    source = checkpoint("llama")
    first = tmp_path / "first"
    step = {"method": "maskllm", "training": {**BLOCK, "steps": 8}}
    compress.run(helpers.recipe(source, [step], text), first)
    masks = first / "model" / "masks.safetensors"
    second = tmp_path / "second"
    again = {"method": "maskllm", "prior": str(masks), "training": None}
    compress.run(helpers.recipe(source, [again], text), second)
    stored = dict(load_masks(masks))
    assert len(stored) == 21
    for name, mask in load_masks(second / "model" / "masks.safetensors"):
        assert torch.equal(mask, stored[name])
    a, b = helpers.weights(first / "model"), helpers.weights(second / "model")
    assert all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ({"pattern": "8:16"}, "70"),
        ({"prior": "wandaa"}, "wandaa"),
        ({"prior": "none", "training": None}, "chance"),
        ({"kappa": [0, 5]}, "positive"),
        ({"scope": "model", "end_to_end": MODEL}, "end_to_end"),
        ({"tuning_scope": "model"}, "needs tuning"),
        ({**WHOLE, "least_squares": True}, "undo"),
        ({"tuning": BLOCK, "distillation": {}}, "blocks always distil"),
        ({"pattern": "3:7"}, "divisible"),
        ({"pattern": "4:4"}, "nothing to learn"),
    ],
)
def test_bad_options_are_refused(step, message, apply):
    with pytest.raises(CompressError, match=message):
        apply(step)


def test_a_mask_file_of_another_model_is_refused(checkpoint, text, tmp_path, helpers):
    step = {"method": "magnitude", "pattern": "2:4"}
    compress.run(helpers.recipe(checkpoint("gpt2"), [step], text), tmp_path / "other")
    prior = str(tmp_path / "other" / "model" / "masks.safetensors")
    with pytest.raises(CompressError, match="mask of"):
        compress.plan(
            helpers.recipe(checkpoint("llama"), [{"method": "maskllm", "prior": prior}], text)
        )


def test_a_low_rank_pair_is_refused(apply, tiny, tokens):
    with pytest.raises(CompressError, match="low_rank"):
        compress.apply(tiny("llama"), [{"method": "svd", "rank": 8}, {"method": "maskllm"}], tokens)


def test_blocks_that_are_left_out_stay_dense(apply):
    before, after = apply({"training": {**BLOCK, "steps": 2}, "include": ["*.layers.1.*"]})
    dense, sparse = linears(before), linears(after)
    for name, weight in sparse.items():
        assert torch.equal(weight, dense[name]) == (".layers.1." not in name)


def test_the_prior_is_chosen_on_the_first_batches(tiny, tokens):
    def masks(ids, **options):
        model = tiny("llama")
        step = {"method": "maskllm", "prior": "search", "training": None, **options}
        compress.apply(model, [step], ids)
        return {n: w != 0 for n, w in linears(model).items()}

    few, same, all_ = (
        masks(tokens, prior_batches=3), masks(tokens[:3]), masks(tokens)
    )  # fmt: skip
    first = "model.layers.0.self_attn.q_proj"
    assert torch.equal(few[first], same[first])
    assert any(not torch.equal(few[n], all_[n]) for n in few)
