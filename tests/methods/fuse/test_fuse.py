"""Blocks that go leave what they knew to their neighbours, and nothing else changes."""

from __future__ import annotations

import json

import pytest
import torch
from pydantic import ValidationError

import compress
from compress.conformance.interruption import Killed, killed_at
from compress.errors import CompressError
from compress.methods.depth.fuse.learning import (
    batch_divergence,
    feature_divergence,
)
from compress.methods.depth.fuse.method import Fuse
from compress.models.anatomy import anatomy_of, find_blocks
from compress.models.outline import outline_of
from compress.models.replay import BlockCall

FAMILIES = ("llama", "gpt2", "bert")
LEARN = {"steps": 30, "batch": 2, "learning_rate": 0.01, "clip": None, "precision": "float32"}
OPTIONS = {"rank": 4, "delta_rate": 0.003}


@pytest.mark.parametrize(
    ("family", "options"),
    (
        ("llama", {}),
        ("llama", {"training": {"precision": "bfloat16"}}),
        ("llama", {"group": 1}),
        ("gpt2", {"loss": "kl"}),
        ("bert", {"loss": "kl_code", "training": {"precision": "bfloat16"}}),
    ),
)
def test_a_group_learns_what_it_returned(family, options, tiny, learned):
    found = learned(tiny(family), **options)
    assert found["fuse.after"] == min(found["fuse.after"], found["fuse.end"])
    assert found["fuse.after"] < 0.9 * found["fuse.before"]


def test_coefficients_alone_learn_something(tiny, learned):
    found = learned(tiny("llama"), delta_rate=1e-12, training={"learning_rate": 0.05})
    assert found["fuse.after"] < 0.99 * found["fuse.before"]


def test_both_types_learn_the_same(tiny, learned):
    full, half = (
        learned(tiny("llama"), training={"precision": precision})
        for precision in ("float32", "bfloat16")
    )
    assert half["fuse.before"] == full["fuse.before"]
    gained = full["fuse.before"] - full["fuse.after"]
    assert abs(half["fuse.after"] - full["fuse.after"]) < 0.1 * gained


def test_distances():
    generator = torch.Generator().manual_seed(0)
    output, target = torch.randn(2, 3, 5, 7, generator=generator)
    student, teacher = output.double(), target.double()
    for found, dim, count in (
        (feature_divergence, -1, 15),
        (batch_divergence, 0, 3),
    ):
        p, q = teacher.softmax(dim), student.softmax(dim)
        expected = float((p * (p / q).log()).sum() / count)
        assert float(found(output, target, BlockCall())) == pytest.approx(expected, rel=1e-4)
        assert float(found(target, target, BlockCall())) == pytest.approx(0, abs=1e-6)
    real = torch.ones(3, 5, dtype=torch.bool)
    real[:, 3:] = False
    real[0, 2] = False
    padded = BlockCall(real=real)
    other = output.clone()
    other[~real] = 100.0
    for found in (feature_divergence, batch_divergence):
        value = float(found(output, target, padded))
        assert value > 0.01 and float(found(other, target, padded)) == value


def test_batches_of_one_sequence_have_nothing_to_compare(tiny, learned):
    with pytest.raises(CompressError, match="calibration.batch to 8"):
        learned(tiny("llama"), size=1, loss="kl_code")


@pytest.mark.parametrize(
    ("family", "options", "message"),
    (
        ("llama", {"remove": 3}, "so that one is left"),
        ("llama", {"remove": 2, "protect_last": 2}, "protect"),
        ("albert", {"remove": 1}, "layers share one set"),
    ),
)
def test_what_cannot_be_fused_is_refused(family, options, message, tiny):
    anatomy = anatomy_of(model := tiny(family))
    with pytest.raises(CompressError, match=message):
        Fuse(**options).check(anatomy, outline_of(model, anatomy, 16))


def test_zeros_of_an_earlier_step_are_not_filled(checkpoint, text, helpers):
    steps = [{"method": "magnitude", "pattern": "2:4"}, {"method": "fuse", "remove": 1}]
    with pytest.raises(CompressError):
        compress.plan(helpers.recipe(checkpoint("llama"), steps, text))


@pytest.mark.parametrize(
    "options", ({}, {"remove": 1, "share": 0.5}, {"remove": 1, "loss": "cosine"})
)
def test_options_that_say_nothing_are_refused(options):
    with pytest.raises(ValidationError):
        Fuse(**options)


@pytest.mark.parametrize("family", ("llama", "gpt2"))
def test_a_cache_changes_nothing(family, tiny, tokens, helpers):
    model = tiny(family)
    step = Fuse(remove=1, **OPTIONS, training={**LEARN, "steps": 2})
    compress.apply(model, [step], tokens, compute="float32")
    assert len(find_blocks(model)[1]) == model.config.num_hidden_layers == 2
    cached = helpers.cached_logits(model, tokens)
    assert helpers.difference(cached, helpers.logits(model, tokens)) < 1e-4


def test_a_16_bit_model_stays_one(tiny, tokens, helpers):
    model, narrow = tiny("llama"), tiny("llama").bfloat16()
    for each in (model, narrow):
        step = Fuse(remove=1, **OPTIONS, training=LEARN)
        compress.apply(each, [step], tokens, compute="float32")
    assert {p.dtype for p in narrow.parameters()} == {torch.bfloat16}
    found = helpers.logits(narrow, tokens).float()
    assert helpers.difference(found, helpers.logits(model, tokens)) < 0.2


@pytest.fixture(scope="module")
def two_rounds(checkpoint, text, helpers, tmp_path_factory):
    """A recipe that fuses two of four blocks, and an undisturbed run of it."""
    training = {"steps": 2, "batch": 2, "clip": None, "precision": "float32"}
    step = {"method": "fuse", "remove": 2, "group": 2, "rank": 4, "training": training}
    steps = [{**step, "teacher": "original"}]
    recipe = helpers.recipe(
        checkpoint("llama", num_hidden_layers=4), steps, text, compute="float32", device="cpu"
    )
    folder = tmp_path_factory.mktemp("two") / "whole"
    compress.run(recipe, folder)
    return recipe, folder


def journal(folder):
    lines = (folder / "journal.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_a_group_is_one_line_of_the_journal(two_rounds):
    _, folder = two_rounds
    told = [event for event in journal(folder) if event["event"] == "block"]
    for stage, blocks in (("solve", 3), ("solve-2", 2)):
        events = [event for event in told if event["stage"] == stage]
        (group,) = [event for event in events if event["note"]]
        assert group["blocks"] == len(group["records"]) == 2
        assert sum(event.get("blocks", 1) for event in events) == blocks
        # Nothing is run behind the group, and blocks in front of it are left where they are.
        assert all(event["activations"] is None for event in events[events.index(group) :])
        assert not any("records" in e or "record" in e for e in events if e is not group)


def test_killed_after_every_event(two_rounds, helpers, tmp_path):
    recipe, whole = two_rounds
    deaths, alive = 0, False
    while not alive:
        try:
            with killed_at(2, written=False):  # one event a life
                compress.run(recipe, tmp_path / "killed")
            alive = True
        except Killed:
            deaths += 1
    assert deaths >= len(journal(whole)) - 2
    found = helpers.contents(tmp_path / "killed" / "model")
    assert found == helpers.contents(whole / "model")


def test_the_original_teaches_what_it_has_behind_the_group(tiny, tokens):
    """The second round's group: what it returned is not what the original returned there."""
    seen = {}

    class Watched(Fuse):
        def decide(self, notes, anatomy):
            return {"removed": 1, "group": [0, 2], "influence": []}

        def learn(self, work):
            seen.setdefault(self.teacher, []).append(work.targets.read(0)[:1])

    for teacher in ("original", "compressed"):
        model = tiny("llama", num_hidden_layers=5)
        states = model(input_ids=tokens[:1], output_hidden_states=True).hidden_states
        step = Watched(remove=2, group=1, teacher=teacher)
        compress.apply(model, [step], tokens, compute="float32")
    assert torch.allclose(seen["original"][0], states[2], atol=1e-5)
    assert torch.allclose(seen["compressed"][0], states[2], atol=1e-5)
    # The first block stands for three of the original's by then, and nothing was learned.
    assert torch.allclose(seen["original"][1], states[3], atol=1e-5)
    assert not torch.allclose(seen["compressed"][1], states[3], atol=1e-2)


@pytest.mark.parametrize(("family", "gains"), (("llama", True), ("gpt2", True), ("bert", False)))
def test_the_refit_takes_what_learning_has_left(family, gains, tiny, learned):
    """In the post-norm blocks of BERT, too, a forward pass decides."""
    found = learned(tiny(family), size=1)
    assert found["refit"] <= 1
    assert not gains or found["refit"] < 0.99
