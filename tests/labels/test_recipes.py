"""A recipe fine-tunes a model, compresses it and tells what that cost in accuracy."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertModel

import compress
from compress.cli.app import main
from compress.cli.evaluation import evaluation_section
from compress.engine.runner import run
from compress.errors import CompressError
from compress.eval.report import load_report
from compress.models.sources.source import load_config
from compress.planning.recipe import parse_recipe

_BERT = {
    "model_type": "bert", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip
_TRAINING = {"steps": 60, "batch": 16, "learning_rate": 3e-3, "warmup": 5, "checkpoint_every": 30}


@pytest.fixture(scope="module")
def data(reviews, columns):
    """Sections that name the examples to train, to calibrate and to evaluate on."""
    train = {"source": str(reviews(300, seed=1)), **columns}
    held_out = {"source": str(reviews(150, seed=2)), **columns}
    return train, held_out


@pytest.fixture(scope="module")
def section(data):
    def make(**more):
        return {
            "architecture": _BERT, "tokenizer": {"kind": "bpe", "size": 290}, "examples": data[0],
            "length": 32, "training": _TRAINING, **more,
        }  # fmt: skip

    return make


@pytest.fixture(scope="module")
def recipe(data, section):
    def make(**more):
        return {
            "name": "reviews",
            "model": {"train": section()},
            "calibration": {"examples": data[0], "samples": 32, "length": 32, "batch": 8},
            "steps": [{"method": "sparsegpt", "pattern": "2:4"}],
            "evaluation": {"examples": data[1], "latency": False, "memory": False},
            **more,
        }

    return make


@pytest.fixture(scope="module")
def done(recipe, tmp_path_factory):
    """One finished run that later tests look at."""
    return run(parse_recipe(recipe()), tmp_path_factory.mktemp("labels") / "run")


def test_a_run_from_fine_tuning_to_the_report(done):
    before, after = done.report.before, done.report.after
    assert before.kind == "labels" and before.labels.scores["accuracy"].value > 0.9
    assert before.labels.names == ("bad", "good") and after.labels.examples == 150
    assert load_report(done.folder / "report.json") == done.report
    told = " ".join(finding.text for finding in done.report.findings)
    assert "Accuracy went from" in told and "Matthews correlation went from" in told
    page = (done.folder / "report.md").read_text()
    assert "| Accuracy |" in page and "Cross entropy (nats an example)" in page
    assert "150 labelled examples" in (done.folder / "report.html").read_text()
    model = AutoModelForSequenceClassification.from_pretrained(done.model)
    assert model.config.id2label == {0: "bad", 1: "good"}
    weight = model.bert.encoder.layer[0].intermediate.dense.weight
    assert float((weight == 0).float().mean()) == 0.5 and bool((model.classifier.weight != 0).all())


def test_runs_compare_by_accuracy(done, data):
    alone = compress.evaluate(
        done.model, {"examples": {**data[1]}, "latency": False, "memory": False}
    )
    assert alone.after.labels == done.report.after.labels
    table = compress.compare([done.report, alone])
    assert "accuracy" in table.markdown() and table.quality.higher_is_better
    fewer = compress.evaluate(
        done.model, {"examples": {**data[1], "limit": 20}, "latency": False, "memory": False}
    )
    with pytest.raises(CompressError, match="results on the same tokens"):
        compress.compare([done.report, fewer])


def test_the_command_line_names_columns(capsys):
    options = dict.fromkeys(("text", "split", "subset", "images", "samples"))
    told = evaluation_section(
        examples="a.csv",
        columns="question, answer,verdict",
        documents=False,
        lines=False,
        tasks="",
        **options,
    )
    fields = {"text": "question", "text_pair": "answer", "label": "verdict"}
    assert told["examples"] == {"source": "a.csv", "subset": None, **fields}
    with pytest.raises(SystemExit) as left:
        main(["evaluate", "model", "--examples", "a.csv", "--fields", "mood"])
    assert left.value.code == 2 and "--fields text,label" in capsys.readouterr().err


def test_the_cache_and_live_models(done, data, tmp_path):
    section = {"examples": data[1], "latency": False, "memory": False}
    options = {"cache_dir": tmp_path}
    first = compress.evaluate(done.model, section, **options)
    second = compress.evaluate(done.model, section, **options)
    assert second.after.cached.keys() == {"labels"} and second.after.labels == first.after.labels
    model, tokenizer = compress.load(done.model)
    live = compress.evaluate(model, section, tokenizer=tokenizer)
    assert live.after.labels.predictions == first.after.labels.predictions
    macs = live.after.cost.macs
    assert macs.per_sequence == 32 * 32 + 32 * 2 and macs.head == 0
    assert macs.context == max(live.after.cost.macs.context, 1)


def test_what_is_written_is_the_same_however_often_it_was_interrupted(section, tmp_path, helpers):
    from compress.train.create.create import create
    from compress.train.create.spec import TrainSpec

    spec = TrainSpec.model_validate(
        section(training={**_TRAINING, "steps": 12, "checkpoint_every": 5})
    )
    whole = create(spec, tmp_path / "whole", tmp_path / "work")
    calls = iter(range(1000))

    def guard():
        if next(calls) == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        create(spec, tmp_path / "parts", tmp_path / "work-parts", guard=guard)
    parts = create(spec, tmp_path / "parts", tmp_path / "work-parts")
    first, second = helpers.weights(whole.folder), helpers.weights(parts.folder)
    assert all(torch.equal(first[name], second[name]) for name in first)
    # Dropout is on while it learns, and the head is in the checkpoint.
    assert load_config(whole.folder).num_labels == 2 and "classifier.weight" in first


def test_an_encoder_without_a_head_gets_one(section, done, tmp_path, data):
    """A masked or bare encoder is what one usually starts from."""
    from transformers import AutoTokenizer

    bare = BertModel.from_pretrained(done.folder / "base")
    bare.save_pretrained(tmp_path / "bare")
    AutoTokenizer.from_pretrained(done.folder / "base").save_pretrained(tmp_path / "bare")
    tuned = section(**{"from": str(tmp_path / "bare"), "training": {**_TRAINING, "steps": 2}})
    del tuned["architecture"], tuned["tokenizer"]
    wanted = {
        "name": "tuned",
        "model": {"train": tuned},
        "evaluation": {"examples": data[1], "memory": False},
    }
    planned = compress.plan(wanted)
    assert planned.original.labels == 2
    report = run(parse_recipe(wanted), tmp_path / "run").report
    assert report.run.model.endswith("fine-tuned by this recipe")
    assert report.after.labels.scores["accuracy"].value > 0.4


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"evaluation": {"text": {"source": "x.txt"}}}, "examples to evaluate a model with a head"),
        ({"evaluation": {"tasks": ["arc_easy"]}}, "examples to evaluate a model with a head"),
        ({"evaluation": {"examples": {"source": "gone.jsonl"}}}, r"gone\.jsonl"),
        ({"evaluation": {"examples": {"source": "a.csv", "lable": "x"}}}, "Did you mean 'label'"),
        ({"evaluation": {"examples": "sst2", "length": 65}}, "at most 64"),
        ({"evaluation": {"examples": "sst2", "text": {"source": "x"}}}, "one of text"),
    ],
)
def test_plans_refuse_what_does_not_fit(recipe, change, told):
    with pytest.raises(CompressError, match=told):
        compress.plan(recipe(**change))


def test_language_models_have_no_examples(checkpoint, data):
    for part in (
        {"evaluation": {"examples": data[1]}},
        {"calibration": {"examples": data[0], "length": 32}},
    ):
        with pytest.raises(CompressError, match="a model with a head of labels"):
            compress.plan(
                {"name": "x", "model": str(checkpoint("llama")), "steps": ["magnitude"], **part}
            )


@pytest.mark.parametrize("more", [{"objective": "causal"}, {"tokenizer": None}, {"length": None}])
def test_sections_that_do_not_go_together(section, recipe, more):
    with pytest.raises(CompressError):
        parse_recipe(recipe(model={"train": section(**more)}))
