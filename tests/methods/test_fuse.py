"""Blocks that go leave what they knew to their neighbours, and nothing else changes."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from pydantic import ValidationError

import compress
from compress.conformance.interruption import Killed, killed_at
from compress.engine.context import StepContext
from compress.engine.steps import run_step
from compress.errors import CompressError
from compress.linear.matrix import matrix
from compress.methods.depth.fuse.choosing import fusible, losable, window
from compress.methods.depth.fuse.grafting import grafts, hold_exactly, merge_grafts
from compress.methods.depth.fuse.learning import (
    batch_divergence,
    feature_divergence,
    graft,
    learn_group,
)
from compress.methods.depth.fuse.method import Fuse
from compress.models.anatomy import ATTENTION_OUT, DOWN, anatomy_of
from compress.models.groups import set_blocks
from compress.models.outline import outline_of
from compress.models.replay import BlockCall
from compress.models.stream import StreamedModel, capture_inputs
from compress.system.activations import Activations
from compress.train.options import TrainingOptions
from compress.train.reconstruction import BlockWork

FAMILIES = ("llama", "gpt2", "bert")
LEARN = {"steps": 30, "batch": 2, "learning_rate": 0.01, "clip": None, "precision": "float32"}
OPTIONS = {"rank": 4, "delta_rate": 0.003}
CPU = torch.device("cpu")


def blocks_of(model):
    return [model.get_submodule(b.path) for b in anatomy_of(model).blocks]


def without(model, *gone):
    """A copy with the other blocks only."""
    shorter, path = copy.deepcopy(model), anatomy_of(model).blocks_path
    set_blocks(shorter, path, [b for i, b in enumerate(blocks_of(shorter)) if i not in gone])
    return shorter


@pytest.fixture
def group(tokens, tmp_path):
    """``group(model, removed)``: all blocks of a model but one, and what all of them return."""

    def make(model, removed, size=2):
        anatomy, blocks = anatomy_of(model), blocks_of(model)
        batches = [{"input_ids": part} for part in tokens.split(size)]
        inputs, targets = Activations(tmp_path / "inputs"), Activations(tmp_path / "targets")
        calls = capture_inputs(model, anatomy, batches, inputs)
        with torch.no_grad():
            for batch in range(len(batches)):
                states = inputs.read(batch)
                for block, call in zip(blocks, calls, strict=True):
                    states = call[batch](block, states)
                targets.write(batch, states)
        stay = [i for i in range(len(blocks)) if i != removed]
        model.requires_grad_(False)
        return BlockWork(
            [blocks[i] for i in stay], [anatomy.blocks[i] for i in stay], inputs, targets,
            [calls[i] for i in stay], CPU, 0, dropped=[blocks[removed]],
        )  # fmt: skip

    return make


def run_group(work):
    with torch.no_grad():
        states = work.inputs.read(0)
        for block, calls in zip(work.blocks, work.calls, strict=True):
            states = calls[0](block, states)
        return states


def scatter(work):
    """Give all that learns random values."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for block in work.blocks:
            for linear in grafts(block).values():
                for parameter in (*linear.coefficients, *linear.deltas):
                    parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    hold_exactly([linear for block in work.blocks for linear in grafts(block).values()])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_start_is_plain_removal(family, tiny, group):
    work = group(tiny(family), 1)
    before = run_group(work)
    assert len(graft(work, 4)) == sum(len(a.linears) for a in work.anatomies)
    assert torch.equal(run_group(work), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_coefficients_of_one_add_the_other_weights(family, tiny, group):
    work = group(tiny(family), 1)
    linears = [(b, n) for b, a in zip(work.blocks, work.anatomies, strict=True) for n in a.linears]
    expected = []
    for block, name in linears:
        mine, other = block.get_submodule(name), work.dropped[0].get_submodule(name)
        bias = None if mine.bias is None else mine.bias + other.bias
        expected.append((matrix(mine) + matrix(other), bias))
    graft(work, 1)
    with torch.no_grad():
        for block in work.blocks:
            for linear in grafts(block).values():
                for parameter in linear.coefficients:
                    parameter.fill_(1)
            merge_grafts(block)
    for (block, name), (weight, bias) in zip(linears, expected, strict=True):
        assert torch.equal(matrix(block.get_submodule(name)), weight)
        assert bias is None or torch.equal(block.get_submodule(name).bias, bias)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_merged_computes_what_was_learned(family, tiny, group):
    work = group(tiny(family), 1)
    plain = run_group(work)
    graft(work, 4)
    scatter(work)
    unmerged = run_group(work)
    with torch.autocast("cpu", torch.bfloat16):
        for block in work.blocks:
            for linear in grafts(block).values():
                linear.hold()
        rounded = run_group(work)
    for block in work.blocks:
        merge_grafts(block)
        assert not grafts(block)
    merged, size = run_group(work), unmerged.abs().max()
    assert (merged - unmerged).abs().max() <= 1e-5 * size
    assert (rounded - unmerged).abs().max() <= 0.05 * size
    assert (merged - plain).abs().max() > 0.01 * size


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_grafted_from_and_onto_stays_as_it_is_while_it_is_learned(family, tiny, group):
    work = group(tiny(family), 1)
    gone = {n: t.clone() for n, t in work.dropped[0].state_dict().items()}
    weights = [
        matrix(b.get_submodule(n))
        for b, a in zip(work.blocks, work.anatomies, strict=True)
        for n in a.linears
    ]
    before = [weight.clone() for weight in weights]
    norms = [p.clone() for b in work.blocks for p in b.parameters() if p.dim() == 1]
    learn_group(work, TrainingOptions(**{**LEARN, "steps": 3}), 4, 0.003, "mse")
    after = work.dropped[0].state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in gone.items())
    assert all(torch.equal(a, b) for a, b in zip(weights, before, strict=True))
    for block in work.blocks:
        merge_grafts(block)
    assert not any(torch.equal(a, b) for a, b in zip(weights, before, strict=True))
    learned = [p for b in work.blocks for p in b.parameters() if p.dim() == 1]
    assert not all(torch.equal(a, b) for a, b in zip(learned, norms, strict=True))


@pytest.fixture
def learned(tokens, tmp_path):
    """``learned(model, **options)``: figures of the first group that is fused."""

    def run(model, size=2, **options):
        notes = []
        batches = [{"input_ids": part} for part in tokens.split(size)]
        context = StepContext(
            StreamedModel(model), batches, tmp_path,
            report=lambda stage, index, count, note: notes.append(note),
        )  # fmt: skip
        training = {**LEARN, **options.pop("training", {})}
        run_step(Fuse(remove=1, **{**OPTIONS, **options}, training=training), context)
        (found,) = [note for note in notes if note and "fuse.before" in note]
        return found

    return run


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


def last_states(model, ids):
    found = []
    hook = blocks_of(model)[-1].register_forward_hook(
        lambda _m, _a, out: found.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        model(input_ids=ids)
    hook.remove()
    return found[0]


@pytest.fixture
def influence(tmp_path):
    """``influence(model, batches, **options)``: what a round would find."""

    class Asked(Fuse):
        def passes(self):
            (rounds,) = super().passes()
            return rounds.passes[:1]

    def run(model, batches, **options):
        found = run_step(
            Asked(remove=1, **options), StepContext(StreamedModel(model), batches, tmp_path)
        )
        assert list(tmp_path.iterdir()) == []
        return found["influence"]

    return run


@pytest.mark.parametrize("family", FAMILIES)
def test_influence_is_what_the_last_states_miss(family, tiny, tokens, influence):
    model = tiny(family)
    batches = [{"input_ids": part} for part in tokens.split(3)]
    found = influence(model, batches, protect_first=1)
    assert found[0] is None
    whole = last_states(model, tokens)
    for index in (1, 2):
        states = last_states(without(model, index), tokens)
        cosine = torch.cosine_similarity(whole, states, dim=-1)
        assert found[index] == pytest.approx(1 - float(cosine.mean()), abs=1e-5)
    few = influence(model, batches, influence_batches=1)
    assert few[1:] == pytest.approx(influence(model, batches[:1])[1:], abs=1e-6)
    assert few[1:] != pytest.approx(found[1:], abs=1e-6)


def test_padding_has_no_influence(tiny, tokens, influence):
    model = tiny("llama")
    mask = torch.ones_like(tokens)
    mask[:, 16:] = 0
    padded = influence(model, [{"input_ids": tokens, "attention_mask": mask}])
    assert padded == pytest.approx(influence(model, [{"input_ids": tokens[:, :16]}]), abs=1e-5)


def test_a_block_that_adds_nothing_goes_first_and_is_missed_by_nobody(
    tiny, tokens, influence, helpers
):
    model = tiny("llama", num_hidden_layers=4)
    for kind in (ATTENTION_OUT, DOWN):
        block = anatomy_of(model).blocks[2]
        matrix(model.get_submodule(f"{block.path}.{block.site(kind).linears[0]}")).zero_()
    before = helpers.logits(model, tokens)
    found = influence(model, [{"input_ids": tokens}])
    assert min(found) == found[2] == pytest.approx(0, abs=1e-6)
    step = Fuse(remove=1, **OPTIONS, training=LEARN)
    compress.apply(model, [step], tokens, compute="float32")
    assert len(blocks_of(model)) == 3
    assert helpers.difference(helpers.logits(model, tokens), before) < 1e-4


def test_influence_is_measured_anew_after_each_fusion(tiny, tokens, influence):
    once, twice = (tiny("llama", num_hidden_layers=5) for _ in range(2))
    options = {"group": 2, **OPTIONS, "training": LEARN}
    seen = []

    class Watched(Fuse):
        def decide(self, notes, anatomy):
            seen.append(super().decide(notes, anatomy))
            return seen[-1]

    compress.apply(once, [Fuse(remove=1, **options)], tokens, compute="float32")
    compress.apply(twice, [Watched(remove=2, **options)], tokens, compute="float32")
    expected = influence(once, [{"input_ids": tokens}])
    first, second = (decision["influence"] for decision in seen)
    assert second == pytest.approx(expected, abs=1e-5)
    stale = [value for i, value in enumerate(first) if i != seen[0]["removed"]]
    assert second != pytest.approx(stale, abs=1e-3)


def test_the_group_is_around_the_block(tiny):
    def found(count, removed, neighbours, **fields):
        blocks = anatomy_of(tiny("llama", num_hidden_layers=count, **fields)).blocks
        return window(blocks, removed, neighbours)

    assert found(12, 6, 7) == (2, 10)  # the released code: three before the one in front of it
    assert found(12, 0, 7) == (0, 8)
    assert found(12, 11, 7) == (4, 12)
    assert found(12, 5, 1) == (4, 6)
    assert found(12, 0, 1) == (0, 2)
    assert found(12, 5, 2) == (4, 7)
    assert found(4, 2, 7) == (0, 4)


def test_layers_of_different_types_stay_apart(tiny, tokens):
    model = tiny("modernbert", num_hidden_layers=7, global_attn_every_n_layers=3)
    types = model.config.layer_types
    anatomy = anatomy_of(model)
    assert types[1] == types[2] != types[3] != types[4] == types[5] != types[6]
    assert fusible(anatomy.blocks, range(7)) == losable(anatomy.blocks, range(7)) == [2, 5]
    assert window(anatomy.blocks, 5, 7) == (4, 6)
    with pytest.raises(CompressError, match="at most 2 blocks .* layer type"):
        Fuse(remove=3).check(anatomy, outline_of(model, anatomy, 16))
    step = Fuse(remove=2, **OPTIONS, training={**LEARN, "steps": 1})
    compress.apply(model, [step], tokens, compute="float32")
    assert model.config.layer_types == [types[i] for i in (0, 1, 3, 4, 6)]


def test_what_may_go(tiny):
    blocks = anatomy_of(tiny("llama", num_hidden_layers=5)).blocks
    assert fusible(blocks, range(5)) == [0, 1, 2, 3, 4]
    assert losable(blocks, range(5)) == [1, 2, 3, 4]
    assert fusible(blocks, [2, 3]) == losable(blocks, [2, 3]) == [2, 3]


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
    assert len(blocks_of(model)) == model.config.num_hidden_layers == 2
    expected = helpers.logits(model, tokens)
    with torch.no_grad():
        first = model(input_ids=tokens[:, :10], use_cache=True)
        steps = [first.logits]
        for position in range(10, tokens.shape[1]):
            first = model(
                input_ids=tokens[:, position : position + 1],
                past_key_values=first.past_key_values, use_cache=True,
            )  # fmt: skip
            steps.append(first.logits)
    assert helpers.difference(torch.cat(steps, 1), expected) < 1e-4


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
