"""Distillation through the public API: what is won back, what stays, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import kl_div
from transformers.pytorch_utils import Conv1D

import compress
from compress.conformance import check
from compress.errors import CompressError
from compress.generators.description import MaskedGeneration
from compress.linear.layer import parts_of
from compress.linear.matrix import matrix
from compress.methods.catalog import METHODS
from compress.methods.distill.lora import Adapter, LoraOptions, adapters
from compress.methods.work import SiteWork
from compress.models.anatomy import anatomy_of
from compress.planning.recipe import parse_step
from compress.train.whole import ModelWork

PRECISIONS = ("float32", "bfloat16")
FIRST = {
    "zeros": {"method": "magnitude", "pattern": "2:4"},
    "unstructured": {"method": "magnitude", "sparsity": 0.5},
    "low rank": {"method": "svd", "ratio": 0.5},
    "width": {"method": "ffn_width", "share": 0.5},
    "depth": {"method": "shortgpt", "remove": 1},
    "rounded": {"method": "rtn", "bits": 3, "group_size": 16},
}
STEPS = {
    "block": {},
    "model": {"scope": "model"},
    "hidden": {"scope": "model", "teacher": "live", "distillation": {"labels": 0, "hidden": 1}},
    "adapters": {"train": "lora"},
    "adapters, model": {"scope": "model", "train": "lora", "teacher": "cached"},
}


def step(name: str, precision: str = "float32", steps: int = 15, **options) -> dict:
    rate = 5e-3 if "adapters" in name else 1e-3
    training = {"steps": steps, "batch": 4, "learning_rate": rate, "precision": precision}
    return {"method": "distill", **STEPS[name], "training": training, **options}


@pytest.fixture
def run(tiny, sequences):
    """``run(steps, family)``: a tiny model after steps."""

    def make(steps: list[dict], family: str = "llama", seed: int = 0) -> nn.Module:
        return compress.apply(tiny(family), steps, sequences(family), seed=seed, compute="float32")

    return make


@pytest.fixture
def apart(tiny, tokens):
    """``apart(model, family)``: KL(uncompressed || model) a token."""

    def measure(model: nn.Module, family: str = "llama") -> float:
        with torch.no_grad():
            wanted, mine = (m(input_ids=tokens).logits.float() for m in (tiny(family), model))
        pair = mine.log_softmax(-1).flatten(0, 1), wanted.log_softmax(-1).flatten(0, 1)
        return float(kl_div(*pair, reduction="batchmean", log_target=True))

    return measure


def linears(model: nn.Module) -> dict[str, nn.Module]:
    """Plain linears inside blocks, those of layers among them."""
    return {
        path: model.get_submodule(path)
        for block in anatomy_of(model).blocks
        for name in block.linears
        for path in parts_of(model.get_submodule(f"{block.path}.{name}"), f"{block.path}.{name}")
    }


@pytest.mark.parametrize(("first", "precision"), [("low rank", "float32"), ("depth", "bfloat16")])
@pytest.mark.parametrize("name", STEPS)
def test_what_was_lost_is_won_back(first, name, precision, run, apart):
    lost = apart(run([FIRST[first]]))
    assert apart(run([FIRST[first], step(name, precision)])) < 0.97 * lost


@pytest.mark.parametrize("family", ["gpt2", "bert"])
@pytest.mark.parametrize("name", ["block", "adapters", "adapters, model"])
def test_other_families(name, family, run, apart):
    lost = apart(run([FIRST["zeros"]], family), family)
    assert apart(run([FIRST["zeros"], step(name)], family), family) < 0.8 * lost


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize(("first", "family"), [("zeros", "gpt2"), ("unstructured", "llama")])
def test_zeros_stay_and_all_others_learn(family, first, name, run):
    decayed = step(name)
    decayed["training"] |= {"weight_decay": 0.1, "ema": 0.5}
    before, after = run([FIRST[first]], family), run([FIRST[first], decayed], family)
    old = linears(before)
    for path, linear in linears(after).items():
        zeros = matrix(old[path]) == 0
        assert torch.equal(matrix(linear) == 0, zeros), path
        assert linear.zeros == old[path].zeros
        assert not torch.equal(matrix(linear), matrix(old[path])), path


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("first", ["width", "low rank", "depth"])
def test_shapes_and_modules_stay(first, name, run):
    before, after = run([FIRST[first]]), run([FIRST[first], step(name, steps=2)])
    assert {n: p.shape for n, p in before.named_parameters()} == {
        n: p.shape for n, p in after.named_parameters()
    }
    assert [type(m) for m in before.modules()] == [type(m) for m in after.modules()]
    assert all(p.requires_grad for p in after.parameters())


@pytest.mark.parametrize("name", ["block", "model"])
def test_rounded_weights_stay_to_the_bit_and_norms_learn(name, run, apart):
    before = run([FIRST["rounded"]])
    after = run([FIRST["rounded"], step(name)])
    old = before.state_dict()
    for path, tensor in after.state_dict().items():
        learned = "norm" in path and ".layers." in path
        assert torch.equal(tensor, old[path]) != learned, path
    assert apart(after) < apart(before)


def test_a_norm_in_front_of_rounded_inputs_learns(run):
    rounded = {"method": "w8a8"}
    before, after = run([rounded]), run([rounded, step("model", steps=1)])
    for index in range(3):
        name = f"model.layers.{index}.input_layernorm.weight"
        assert not torch.equal(after.state_dict()[name], before.state_dict()[name])


def test_only_what_the_patterns_reach_learns(run):
    reached = step("model", steps=2, include=["*.layers.1.mlp.*"], norms=False)
    before, after = run([FIRST["zeros"]]).state_dict(), run([FIRST["zeros"], reached]).state_dict()
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name]) != (".layers.1.mlp." in name), name


def test_what_lies_outside_the_blocks_learns_where_it_is_told(run, apart):
    first, within = [FIRST["zeros"]], step("model")
    before, after = run(first), run([*first, {**within, "outer": True}])
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert not torch.equal(after.state_dict()[name], before.state_dict()[name]), name
    assert apart(after) < apart(run([*first, within]))


def test_a_run_keeps_what_was_learned_outside_the_blocks():
    """In files of its own, tied embeddings once; interrupted, and in a fresh process."""
    options = step("model", steps=3, outer=True, teacher="live")
    del options["method"]
    check(METHODS.get("distill"), options, ("gpt2",), first=[parse_step(FIRST["zeros"])])


def test_a_masked_generator_learns_from_the_uncompressed_one(tiny, tokens):
    model = tiny("bert")
    MaskedGeneration(mask_id=6).store(model.config)
    teacher = copy.deepcopy(model)
    inputs = [{"input_ids": row} for row in tokens.split(1)]
    narrow = compress.apply(model, [FIRST["width"]], inputs)
    before = narrow.bert.encoder.layer[0].output.dense.weight.clone()
    compress.apply(narrow, [step("model")], inputs, teacher=teacher)
    assert not torch.equal(before, narrow.bert.encoder.layer[0].output.dense.weight)
    with pytest.raises(CompressError, match="live"):
        compress.apply(narrow, [step("model", teacher="cached")], inputs, teacher=teacher)


def test_a_teacher_of_other_depth_is_refused(tiny, tokens):
    short = compress.apply(tiny("llama"), [FIRST["depth"]], tokens)
    for unknown in (step("block"), step("hidden")):
        with pytest.raises(CompressError, match="as many blocks"):
            compress.apply(short, [unknown], tokens, teacher=tiny("llama"))


def test_a_whole_model_learns_from_one_of_another_depth(tiny, tokens, helpers):
    teacher = tiny("llama")
    short = compress.apply(tiny("llama"), [FIRST["depth"]], tokens)
    wanted = helpers.logits(teacher, tokens)
    before = helpers.difference(helpers.logits(short, tokens), wanted)
    compress.apply(short, [step("model", steps=20)], tokens, teacher=teacher)
    assert helpers.difference(helpers.logits(short, tokens), wanted) < before


def test_the_seed_decides_everything(run):
    steps = [FIRST["zeros"], step("adapters, model", steps=4)]
    first, again, other = (run(steps, seed=s).state_dict() for s in (1, 1, 2))
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert any(not torch.equal(first[n], other[n]) for n in first)


def test_the_seed_decides_where_adapters_start(tiny):
    method = METHODS.get("distill")(train="lora")

    def started(seed: int) -> list[torch.Tensor]:
        model = tiny("llama")
        place = anatomy_of(model).blocks[0]
        block = model.get_submodule(place.path)
        for site in place.sites:
            method.solve(SiteWork(block, place, site, site.linears, seed=seed))
        return [next(iter(a.learned().values())) for a in adapters(block).values()]

    first, again, other = map(started, (1, 1, 2))
    assert first and all(map(torch.equal, first, again))
    assert not any(map(torch.equal, first, other))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_training_that_was_interrupted_ends_with_the_same_bytes(
    precision, tiny, tokens, tmp_path
):
    options = step("model", precision, teacher="cached")
    options["training"] |= {"steps": 6, "checkpoint_every": 2}
    method = METHODS.get("distill")(**{k: v for k, v in options.items() if k != "method"})

    def train(folder: Path, last: int | None = None) -> dict[str, torch.Tensor]:
        guarded = iter(range(1000))

        def guard() -> None:
            if next(guarded) == last:
                raise KeyboardInterrupt

        student = tiny("llama", seed=1).requires_grad_(False)
        work = ModelWork(
            student, anatomy_of(student), [{"input_ids": tokens}], torch.device("cpu"), folder, 0,
            guard=guard, teacher=lambda: tiny("llama").requires_grad_(False),
            origins=[(i, i + 1) for i in range(3)],
        )  # fmt: skip
        method.learn_model(work)
        return student.state_dict()

    undisturbed = train(tmp_path / "one")
    for last in (3, 8):  # amidst the eight windows of the teacher; in a step of the training
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "two", last)
    resumed = train(tmp_path / "two")
    assert all(torch.equal(undisturbed[name], resumed[name]) for name in resumed)


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
@pytest.mark.parametrize("zeros", [False, True])
def test_a_merged_adapter_is_what_learned(kind, zeros):
    linear = nn.Linear(8, 6) if kind is nn.Linear else Conv1D(6, 8)
    if zeros:
        linear.weight.data[::2] = 0
    before = linear.weight.detach().clone()
    adapter = Adapter(linear, LoraOptions(rank=2, alpha=6), seed=1)
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    start = adapter(x)
    a, b = adapter.learned().values()
    b.data.normal_(generator=torch.Generator().manual_seed(2))
    learned = adapter(x)
    assert not torch.allclose(learned, start)
    added = 3 * (b @ a if kind is nn.Linear else (b @ a).t())
    assert torch.allclose(adapter.merge().weight, before + added * (before != 0), atol=1e-6)
    assert torch.allclose(linear(x), learned, atol=1e-5)
    assert torch.equal(linear.weight == 0, before == 0)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"outer": True}, "scope: model"),
        ({"distillation": {"logits": 1}}, "scope: model"),
        ({"lora": {"rank": 4}}, "train: lora"),
        ({"scope": "model", "distillation": {"logits": 0}}, "logits or hidden"),
        ({"scope": "model", "teacher": "cached", "distillation": {"hidden": 1}}, "hidden states"),
    ],
)
def test_options_that_contradict_each_other(options, match, tiny, tokens):
    with pytest.raises(CompressError, match=match):
        compress.apply(tiny("llama"), [{"method": "distill", **options}], tokens)


def test_adapters_are_not_merged_into_a_grid(run):
    with pytest.raises(CompressError, match="on a grid"):
        run([FIRST["rounded"], step("adapters")])


def test_a_step_in_which_nothing_could_learn_is_refused(run):
    with pytest.raises(CompressError, match="something that can learn"):
        run([FIRST["rounded"], step("block", norms=False)])


def test_blocks_are_those_of_the_compressed_model(run):
    hidden = step("hidden", distillation={"hidden": 1, "layers": [2]})
    with pytest.raises(CompressError, match="from 0 to 1"):
        run([FIRST["depth"], hidden])
