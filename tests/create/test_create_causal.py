"""A recipe that trains its own causal model: planned before, trained once, resumable."""

from __future__ import annotations

import json
import shutil
import time

import pytest
import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel

import compress
from compress.data.text import load_text
from compress.engine.runner import run
from compress.errors import CompressError
from compress.models.sources.source import load_config, load_model, load_tokenizer
from compress.planning.planner import plan
from compress.planning.recipe import parse_recipe, read_recipe
from compress.train.create.create import create, draft
from compress.train.create.spec import TokenizerSpec, TrainSpec
from compress.train.create.tokenizer import make_tokenizer


def recipe(section, **more):
    return parse_recipe({"name": "own", "model": {"train": section}, **more})


def make(section, tmp_path, name="model", **more):
    spec = TrainSpec.model_validate(section)
    return create(spec, tmp_path / name, tmp_path / f"{name}-work", **more)


def test_the_plan_needs_no_training_but_a_text_that_is_there(sections):
    absent = sections.causal(text={"source": "no/such.txt"})
    with pytest.raises(CompressError, match=r"no/such\.txt"):
        plan(recipe(absent, steps=[{"method": "magnitude"}]))
    made = plan(recipe(sections.causal(), steps=[{"method": "magnitude"}]))
    folder = made.source.folder
    assert made.original.parameters > 10_000 and folder.is_dir()
    assert load_config(folder).vocab_size == 259
    assert "the model is trained first: 12 steps of 4 sequences" in made.warnings
    del made
    assert not folder.exists()


def test_what_is_planned_is_what_is_trained(sections, tmp_path):
    section = sections.causal(tokenizer={"kind": "bpe", "size": 300})
    planned, trained = draft(TrainSpec.model_validate(section)), make(section, tmp_path)
    configs = [load_config(source.folder).to_dict() for source in (planned, trained)]
    for config in configs:
        del config["_name_or_path"]
    assert configs[0] == configs[1]


def test_a_run_trains_then_compresses_what_it_trained(sections, text, tmp_path, helpers):
    wanted = recipe(
        sections.causal(),
        steps=[{"method": "magnitude", "pattern": "2:4"}],
        evaluation=helpers.evaluation(text),
    )
    result = run(wanted, tmp_path / "run")
    base = load_model(tmp_path / "run" / "base")
    small = load_model(result.model)
    before = base.model.layers[0].mlp.up_proj.weight
    after = small.model.layers[0].mlp.up_proj.weight
    assert torch.equal(after[after != 0], before[after != 0])
    assert float((after == 0).float().mean()) == 0.5
    assert result.report.run.model == "llama, trained by this recipe"
    told = [finding.text for finding in result.report.findings]
    assert any(
        t.startswith("The original was trained by this run: ") and text.name in t for t in told
    )
    tokenizer, _ = load_tokenizer(result.model)
    assert tokenizer.decode(tokenizer("äé 1").input_ids) == "äé 1"
    assert not (tmp_path / "run" / "work").exists()


def test_training_lowers_the_loss_and_is_the_same_every_time(sections, tmp_path, helpers):
    first = make(sections.causal(), tmp_path, "first", seed=3)
    second = make(sections.causal(), tmp_path, "second", seed=3)
    other = make(sections.causal(), tmp_path, "other", seed=4)
    history = [json.loads(s) for s in (first.folder / "training.jsonl").read_text().splitlines()]
    assert len(history) == 12 and history[-1]["loss"] < 0.8 * history[0]["loss"]
    weights = [helpers.weights(s.folder) for s in (first, second, other)]
    assert all(torch.equal(weights[0][n], weights[1][n]) for n in weights[0])
    assert not all(torch.equal(weights[0][n], weights[2][n]) for n in weights[0])


def test_a_recipe_without_steps_only_trains(sections, tmp_path):
    run(recipe(sections.causal()), tmp_path / "run")
    assert (tmp_path / "run" / "base" / "model.safetensors").is_file()
    assert not (tmp_path / "run" / "model").exists()


def test_what_is_trained_is_not_trained_again(sections, tmp_path, helpers):
    source = make(sections.causal(), tmp_path)
    before = helpers.contents(source.folder)
    start = time.perf_counter()
    make(sections.causal(), tmp_path)
    assert time.perf_counter() - start < 0.5
    assert helpers.contents(source.folder) == before


def test_a_model_of_other_data_is_not_taken_for_it(sections, text, tmp_path):
    own = tmp_path / "own.txt"
    own.write_text(text.read_text())
    section = sections.causal(text={"source": str(own)})
    make(section, tmp_path)
    with pytest.raises(CompressError, match="the section that the model"):
        make({**section, "length": 16}, tmp_path)
    own.write_text(text.read_text() + "more")
    with pytest.raises(CompressError, match="the data that the model"):
        make(section, tmp_path)


def test_an_interrupted_training_goes_on_to_the_same_model(sections, tmp_path, helpers):
    calls = iter(range(100))

    def stop_at_the_seventh_step():
        if next(calls) == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(sections.causal(), tmp_path, "a", guard=stop_at_the_seventh_step)
    assert any((tmp_path / "a-work").rglob("*")) and not (tmp_path / "a").exists()
    steps = []
    one = make(sections.causal(), tmp_path, "a", guard=lambda: steps.append(1)).folder
    two = make(sections.causal(), tmp_path, "b").folder
    assert len(steps) == 8  # a checkpoint every four steps: on from the fourth
    one, two = helpers.weights(one), helpers.weights(two)
    assert all(torch.equal(one[n], two[n]) for n in one)


def test_a_run_that_is_started_again_trains_on(sections, tmp_path, helpers):
    wanted = recipe(sections.causal(), steps=[{"method": "magnitude"}])
    file = tmp_path / "recipe.yaml"
    file.write_text(wanted.to_yaml())
    assert read_recipe(file) == wanted
    run(wanted, tmp_path / "whole")
    # What a run leaves that was stopped behind its training: all but the steps.
    (tmp_path / "part").mkdir()
    for name in (".lock", "lock.json", "recipe.yaml", "base"):
        source, target = tmp_path / "whole" / name, tmp_path / "part" / name
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
    run(read_recipe(file), tmp_path / "part")
    assert helpers.contents(tmp_path / "part" / "model") == helpers.contents(
        tmp_path / "whole" / "model"
    )


def test_the_api_plans_it_too(sections):
    made = compress.plan({"model": {"train": sections.causal()}, "steps": ["magnitude"]})
    assert made.result.nonzero < made.original.nonzero


def test_a_disk_that_is_full_at_the_end_costs_nothing(sections, tmp_path, monkeypatch):
    def full(*_args, **_more):
        raise SafetensorError("Error while serializing: No space left on device (os error 28)")

    with monkeypatch.context() as patched:
        patched.setattr(PreTrainedModel, "save_pretrained", full)
        with pytest.raises(CompressError, match="No space left.*last checkpoint"):
            make(sections.causal(), tmp_path)
    assert [p.name for p in tmp_path.iterdir() if "model" in p.name] == ["model-work"]
    steps = []
    made = make(sections.causal(), tmp_path, guard=lambda: steps.append(1))
    assert made.folder.is_dir() and len(steps) <= 4


@pytest.mark.parametrize("size", [259, 300])
def test_tokenizers_lose_nothing_and_end_in_the_special_ids(text, size):
    kind = {"kind": "bytes"} if size == 259 else {"kind": "bpe", "size": size}
    tokenizer = make_tokenizer(TokenizerSpec(**kind), load_text(str(text)).documents, 24)
    sample = "weights, 'größer' \n\n\tthan\x00 🙂  "
    ids = tokenizer(sample).input_ids
    assert tokenizer.decode(ids) == sample and max(ids) < size - 3
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.mask_token_id) == (
        size - 3, size - 2, size - 1,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": {"model_type": "lama"}}, "Did you mean 'llama'"),
        ({"architecture": {"model_type": "llama", "hiden_size": 8}}, "Did you mean 'hidden_size'"),
        ({"architecture": {"model_type": "llama", "vocab_size": 8}}, "Leave it out"),
        ({"architecture": {"model_type": "llama", "hidden_size": "x"}}, "expected int, got str"),
        ({"architecture": {"model_type": "vit"}}, "a causal language model"),
        ({"length": 65}, "at most 64, the model's positions"),
    ],
)
def test_architectures_that_do_not_work_are_refused_by_the_plan(sections, change, message):
    with pytest.raises(CompressError, match=message):
        plan(recipe(sections.causal(**change)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": None}, "either architecture"),
        ({"from": "some/model"}, "either architecture"),
        ({"text": None}, "one of text, images and examples"),
        ({"length": None}, "length"),
        ({"tokenizer": None}, "tokenizer"),
        ({"tokenizer": {"kind": "bpe", "size": 200}}, "a size above 259"),
        ({"objective": "causl"}, "'causal'"),
        ({"lengt": 3}, "Did you mean 'length'"),
        ({"training": {"steps": 3, "learning_rat": 1}}, "Did you mean 'learning_rate'"),
    ],
)
def test_sections_that_do_not_parse(sections, change, message):
    section = {k: v for k, v in sections.causal(**change).items() if v is not None}
    with pytest.raises(CompressError, match=message):
        recipe(section)


def test_a_model_is_either_named_or_trained(sections):
    for model in ({}, {"source": "a/b", "train": sections.causal()}):
        with pytest.raises(CompressError, match="either source"):
            parse_recipe({"model": model})


def test_texts_that_are_too_short(sections, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("a few words")
    with pytest.raises(CompressError, match="at least one sequence"):
        make(sections.causal(text={"source": str(short)}), tmp_path)
    with pytest.raises(CompressError, match="Lower tokenizer.size"):
        make(
            sections.causal(text={"source": str(short)}, tokenizer={"kind": "bpe", "size": 400}),
            tmp_path,
        )
    assert not (tmp_path / "model").exists()
