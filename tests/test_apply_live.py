"""Steps on live models: refused before anything changes, undone when they fail, 16-bit ones too."""

from __future__ import annotations

import copy
import random
from concurrent.futures import ThreadPoolExecutor

import numpy
import pytest
import torch

import compress
from compress.engine import live_steps, transaction
from compress.errors import CompressError
from compress.models.experts import fuse_all, unfuse_all

STEPS = {
    "wanda": {"method": "wanda", "pattern": "2:4"},
    "gptq": {"method": "gptq", "bits": 4, "group_size": None},
    "ffn_width": {"method": "ffn_width", "share": 0.25},
    "head_width": {"method": "head_width", "share": 0.5},
    "svd_llm": {"method": "svd_llm", "ratio": 0.8},
    "shortgpt": {"method": "shortgpt", "remove": 1},
    "sleb": {"method": "sleb", "remove": 1},
    "maskllm": {
        "method": "maskllm",
        "training": {"steps": 2, "batch": 2, "precision": "float32"},
    },
}


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(model, before):
    after = model.state_dict()
    return after.keys() == before.keys() and all(torch.equal(after[n], before[n]) for n in before)


@pytest.mark.parametrize(
    ("method", "dtype"), [*((m, torch.bfloat16) for m in STEPS), ("gptq", torch.float16)]
)
def test_a_16_bit_model_stays_one_and_is_saved_as_it_is(
    tiny, tokens, helpers, tmp_path, method, dtype
):
    model = tiny("llama").to(dtype)
    compress.apply(model, [STEPS[method]], tokens)
    assert {p.dtype for p in model.parameters()} == {dtype}
    again = compress.load(compress.save(model, tmp_path / "x"))[0]
    expected = helpers.logits(model, tokens).float()
    assert helpers.difference(helpers.logits(again, tokens), expected) < 0.05


@pytest.mark.parametrize("atomic", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_block_stays_changed(tiny, tokens, dtype, atomic):
    model = compress.apply(tiny("llama").to(dtype), [STEPS["wanda"]], tokens, atomic=atomic)
    for block in model.model.layers:
        assert (block.mlp.up_proj.weight == 0).float().mean() == 0.5
    compress.apply(model, [STEPS["ffn_width"], STEPS["gptq"]], tokens, atomic=atomic)
    for block in model.model.layers:
        assert block.mlp.up_proj.weight.shape[0] == 48
        assert hasattr(block.mlp.up_proj, "weight_scale")


def test_16_bits_cost_only_their_rounding(tiny, tokens, helpers):
    half = tiny("llama").to(torch.bfloat16)
    full = tiny("llama").to(torch.bfloat16).float()
    for model in (half, full):
        compress.apply(model, [STEPS["wanda"]], tokens)
    full.to(torch.bfloat16)
    assert same(half, state(full))


@pytest.mark.parametrize("method", STEPS)
def test_modes_and_gradients_are_what_they_were(tiny, tokens, method):
    model = tiny("llama").train()
    model.model.norm.eval()
    quiet = model.model.layers[1].eval()
    model.model.embed_tokens.weight.requires_grad_(False)
    compress.apply(model, [STEPS[method]], tokens)
    for block in model.model.layers:
        assert {m.training for m in block.modules()} == {block is not quiet}
    assert not model.model.norm.training
    frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
    assert frozen == ["model.embed_tokens.weight"]


def test_globals_are_left_alone(tiny, tokens):
    model = tiny("llama")
    torch.manual_seed(5)
    before = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()
    with torch.no_grad():  # where something learns all the same
        compress.apply(model, [STEPS["maskllm"]], tokens)
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), numpy.random.get_state()[1].tolist()) == before[1:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_is_undone(tiny, tokens, helpers, monkeypatch, dtype, error):
    model = tiny("llama").to(dtype).train()
    before, expected = state(model), helpers.logits(model.eval(), tokens)
    model.train()
    _fail_in_last_step(monkeypatch, error("out of luck"))
    steps = [STEPS[n] for n in ("shortgpt", "head_width", "svd_llm", "gptq")]
    with pytest.raises(error, match="out of luck"):
        compress.apply(model, steps, tokens)
    assert same(model, before) and model.training and model.config.num_hidden_layers == 3
    assert all(p.requires_grad for p in model.parameters())
    assert not any("forward" in vars(m) for m in model.modules())
    assert torch.equal(helpers.logits(model.eval(), tokens), expected)


def test_what_cannot_be_undone_is_told(tiny, tokens, monkeypatch):
    model = tiny("llama")
    before = state(model)
    _fail_in_last_step(monkeypatch, RuntimeError("out of luck"))
    with pytest.raises(CompressError, match=r"out of luck.*partly compressed \(step 1 \(gptq\)"):
        compress.apply(model, [STEPS["wanda"], STEPS["gptq"]], tokens, atomic=False)
    assert not same(model, before)
    monkeypatch.undo()
    assert not any("forward" in vars(m) for m in model.modules())


def test_copies_are_made_where_they_fit(tiny, monkeypatch):
    model = tiny("llama")
    assert transaction.Transaction(model, model.model.layers, None).atomic
    monkeypatch.setattr(transaction, "_bytes", lambda _block: 10**15)
    assert not transaction.Transaction(model, model.model.layers, None).atomic


@pytest.mark.parametrize("atomic", [True, False])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError, KeyboardInterrupt])
def test_widening_that_fails_is_undone(tiny, tokens, monkeypatch, atomic, error):
    model = tiny("llama").to(torch.bfloat16)
    first, last = model.model.embed_tokens.weight, model.model.norm.weight
    before, widen = state(model), torch.Tensor.float

    def failing(tensor):
        if first.dtype == torch.float32 and tensor.data_ptr() == last.data_ptr():
            raise error("out of luck")
        return widen(tensor)

    monkeypatch.setattr(torch.Tensor, "float", failing)
    with pytest.raises(error, match="out of luck"):
        compress.apply(model, [{"method": "magnitude"}], atomic=atomic)
    monkeypatch.undo()
    assert same(model, before)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_optimizer_still_holds_the_experts(tiny, tokens, dtype):
    model = tiny("mixtral").to(dtype)
    held, before = dict(model.named_parameters()), state(model)
    experts = [n for n, p in held.items() if p.dim() == 3]
    with pytest.raises(CompressError, match="mistyped"):
        compress.apply(model, [{**STEPS["wanda"], "include": ["*.mistyped"]}], tokens)
    assert same(model, before)
    assert all(held[name] is p for name, p in model.named_parameters())
    compress.apply(model, [STEPS["wanda"]], tokens)
    found = dict(model.named_parameters())
    assert experts and all(found[name] is held[name] for name in experts)
    assert all((held[n].reshape(-1, 4) == 0).sum(1).eq(2).all() for n in experts)


def test_experts_that_a_copy_has_are_its_own(tiny, tokens):
    model = tiny("mixtral")
    held = dict(model.named_parameters())
    unfuse_all(model)
    other = copy.deepcopy(model)
    fuse_all(other)
    fuse_all(model)
    assert not any(held[name] is p for name, p in other.named_parameters())
    assert all(held[name] is p for name, p in model.named_parameters())


def _fail_in_last_step(monkeypatch, error):
    """Let gptq fail behind its first block."""
    run_step = live_steps.run_step

    def failing(method, context):
        if method.name == "gptq":
            monkeypatch.setattr(context.sink, "store", lambda *_: (_ for _ in ()).throw(error))
        return run_step(method, context)

    monkeypatch.setattr(live_steps, "run_step", failing)


def _shared(model):
    model.model.layers[1] = model.model.layers[0]
    return model


def _poisoned(model):
    model.model.embed_tokens.weight.data[0, 0] = float("nan")
    return model


REFUSED = {
    "a name": (lambda model: "some/model", "compress.load"),
    "no transformers model": (lambda model: torch.nn.Linear(4, 4), "transformers model"),
    "compiled": (lambda model: torch.compile(model, backend="eager"), "_orig_mod"),
    "wrapped": (torch.nn.DataParallel, "model.module"),
    "no head": (lambda model: model.model, "head of a task"),
    "no weights": (lambda model: model.to("meta"), "meta device"),
    "shared layers": (_shared, "weights of their own"),
    "not finite": (_poisoned, "finite weights"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_models_that_are_refused(tiny, tokens, tmp_path, what):
    make, message = REFUSED[what]
    model = make(tiny("llama"))
    with pytest.raises(CompressError, match=message):
        compress.apply(model, ["magnitude"])
    with pytest.raises(CompressError, match=message):
        compress.save(model, tmp_path / "x")


def test_steps_and_seeds_that_are_refused(tiny):
    for steps in ("wanda", {"method": "wanda"}, None, [["wanda"]]):
        with pytest.raises(CompressError):
            compress.apply(tiny("llama"), steps)
    for seed in ("x", 2**70, -1):
        with pytest.raises(CompressError, match="seed"):
            compress.apply(tiny("llama"), ["magnitude"], seed=seed)


def test_rounded_weights_are_not_changed(tiny, tokens):
    model = compress.apply(tiny("llama"), [{"method": "rtn", "bits": 4, "group_size": 32}])
    before = state(model)
    for method in ("wanda", "ffn_width", "svd_llm"):
        with pytest.raises(CompressError, match="rounded already|has quantised"):
            compress.apply(model, [STEPS[method]], tokens)
    assert same(model, before)


def test_a_model_that_was_never_run_before_still_records_what_it_is_asked_for(tiny, tokens):
    """transformers sets its recording hooks in the first forward, here one of calibration."""
    model = compress.apply(tiny("mixtral"), [STEPS["wanda"]], tokens)
    with torch.no_grad():
        found = model(tokens, output_router_logits=True, output_hidden_states=True)
    blocks = model.config.num_hidden_layers
    assert len(found.router_logits) == blocks and len(found.hidden_states) == blocks + 1


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["gptq", "ffn_width", "svd_llm"])
def test_threads_do_not_reach_into_each_other(name, compute, tiny, tokens):
    """Nothing that a step sets holds for the whole process while others compute."""
    models = [tiny("llama") for _ in range(4)]

    def go(model):
        compress.apply(model, [STEPS[name]], tokens, compute=compute)

    go(models[0])
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(go, models[1:]))
    assert all(same(model, state(models[0])) for model in models[1:])
