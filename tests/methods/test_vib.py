"""Gates with noise: what they are, what they learn, and that the narrow model is the gated one."""

from __future__ import annotations

import copy

import pytest
import torch

import compress
from compress.errors import CompressError
from compress.linear.absent import AbsentLinear
from compress.methods.width.vib.choosing import Chooser
from compress.methods.width.vib.correcting import correct
from compress.methods.width.vib.gates import ATTENTION, FFN, KINDS, Gates
from compress.methods.width.vib.learning import (
    chooser,
    constraint,
    counts,
    expected_gone,
    gone,
    keep,
)
from compress.methods.width.vib.placing import placed
from compress.methods.width.vib.pruning import learned_of_block, narrow, narrow_outside
from compress.methods.width.vib.sizes import outer_terms, sizes_of
from compress.models.anatomy import anatomy_of
from compress.models.outline import outline_of

FAMILIES = ("llama", "gpt2", "bert")
FEW = {"steps": 30, "batch": 2, "learning_rate": 0.2, "clip": None, "precision": "float32"}
QUICK = {"training": FEW, "tuning": {**FEW, "steps": 5, "learning_rate": 0.01}, "start_batches": 4}


def sizes_and_gates(model, counted="model", kinds=KINDS):
    """The size of a model and fresh gates of all kinds for it."""
    anatomy = anatomy_of(model)
    sizes = sizes_of(outline_of(model, anatomy, 32), counted, 4.0, outer_terms(model, anatomy))
    numbers = {kind: sizes.full[kind].int().tolist() for kind in kinds}
    return anatomy, sizes, Gates(numbers, 0, torch.device("cpu"))


def scattered(gates, seed=0):
    """Spread the gates over the threshold, as learning does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for gate in gates.kinds.values():
            gate.mean.copy_(1 + 0.3 * torch.randn(gate.mean.shape, generator=generator))
            gate.log_variance.copy_(3 * torch.randn(gate.mean.shape, generator=generator) - 2)


def parameters(model):
    return sum(p.numel() for p in model.parameters())


@pytest.fixture
def calibrated(tiny, tokens):
    """``calibrated(family, step, seed)``: a tiny model after a ``vib`` step."""

    def make(family="llama", seed=0, dtype=torch.float32, **step):
        inputs = [{"input_ids": row} for row in tokens.split(2)]
        if family == "bert":
            chosen = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(1)) < 0.3
            masked = tokens.masked_fill(chosen, 6).split(2)
            labels = tokens.masked_fill(~chosen, -100).split(2)
            inputs = [{"input_ids": a, "labels": b} for a, b in zip(masked, labels, strict=True)]
        options = {"method": "vib", "share": 0.3, "of": "model", **QUICK, **step}
        return compress.apply(tiny(family).to(dtype), [options], inputs, seed=seed)

    return make


@pytest.mark.parametrize("family", FAMILIES)
def test_fresh_gates_barely_change_the_loss(family, tiny, tokens):
    model = tiny(family)
    anatomy, sizes, gates = sizes_and_gates(model)

    def loss():
        return float(model(input_ids=tokens, labels=tokens).loss.detach())

    before = loss()
    with placed(model, anatomy, gates), torch.no_grad():
        assert loss() == before  # open
        gates.draw(10.0)
        torch.manual_seed(0)
        assert loss() == pytest.approx(before, rel=0.03)
    assert loss() == before
    assert not any("vib" in name for name, _ in model.named_modules())
    assert float(expected_gone(gates, sizes, 10.0)) == pytest.approx(0, abs=1e-6)


def test_divergence_is_that_from_the_best_prior():
    gates = Gates({"neurons": [50]}, 0, torch.device("cpu"))
    gate = gates["neurons"]
    scattered(gates)
    found = gate.divergence().detach()
    assert bool((found >= 0).all())
    # KL(N(m, s^2) || N(0, xi)) with xi = m^2 + s^2, by torch's own.
    mean, deviation = gate.mean.detach(), (gate.log_variance.detach() / 2).exp()
    best = torch.distributions.Normal(0, (mean.square() + deviation.square()).sqrt())
    wanted = torch.distributions.kl_divergence(torch.distributions.Normal(mean, deviation), best)
    assert torch.allclose(found, wanted, atol=1e-4)
    with torch.no_grad():
        gate.log_variance += 0.5
    assert bool((gate.divergence() < found).all())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("counted", ["blocks", "model"])
def test_sizes_are_those_of_the_narrow_model(family, counted, tiny, tokens, helpers):
    """And it computes what the gated one does: all kinds of units at once, norms included."""
    model = tiny(family)
    anatomy, sizes, gates = sizes_and_gates(model, counted)
    scattered(gates, seed=3)
    choice = chooser(gates, sizes, 0.6 * sizes.whole(), {}, False, 1).choose()
    # A sub-layer of each kind goes in any case.
    choice.kept[ATTENTION][1][:] = False
    choice.kept[FFN][2][:] = False
    keep(gates, choice)
    with placed(model, anatomy, gates), torch.no_grad():
        gates.harden()
        expected = model(input_ids=tokens).logits
    with torch.no_grad():
        for block in anatomy.blocks:
            learned = learned_of_block(gates, choice, block.index)
            narrow(model.get_submodule(block.path), block, learned)
        narrow_outside(model, anatomy, {k: v for k, v in learned.items() if "hidden" in k})
    assert helpers.difference(model(input_ids=tokens).logits, expected) < 1e-4
    hard = {kind: torch.cat(rows).float() for kind, rows in choice.kept.items()}
    lost = sum(isinstance(m, AbsentLinear) for m in model.modules())
    assert lost >= 2
    counted_now = (
        parameters(model) if counted == "model"
        else sum(parameters(model.get_submodule(b.path)) for b in anatomy.blocks)
    )  # fmt: skip
    assert float(sizes.amount(counts(gates, hard))) == counted_now


def test_expected_size_tracks_the_hard_one(tiny):
    _, sizes, gates = sizes_and_gates(tiny("llama"))
    scattered(gates)
    hard = gone(gates, sizes)
    far = [abs(float(expected_gone(gates, sizes, s)) - hard) for s in (1.0, 10.0, 1000.0)]
    assert far[0] > far[1] > far[2] < 0.001
    assert 0.1 < hard < 0.9


def test_multipliers_climb_towards_the_target():
    gates = Gates({"neurons": [4]}, 0, torch.device("cpu"))
    optimiser = torch.optim.SGD([gates.multipliers], lr=1.0)
    for gap in (-0.5, 0.5):
        with torch.no_grad():
            gates.multipliers.zero_()
        share = torch.tensor(0.3 + gap, requires_grad=True)
        for _ in range(2):  # lambda1 gets the sign of the gap, lambda2 only grows
            optimiser.zero_grad()
            constraint(gates, share - 0.3).backward()
            optimiser.step()
        assert gates.multipliers[0] * gap > 0
        assert gates.multipliers[1] > 0
        share.grad = None
        constraint(gates, share - 0.3).backward()
        assert float(share.grad) * gap > 0  # descent closes the gap


@pytest.mark.parametrize("uniform", [False, True])
def test_the_threshold_meets_the_target(uniform, tiny):
    kinds = KINDS[:3] if uniform else KINDS
    _, sizes, gates = sizes_and_gates(tiny("llama", num_hidden_layers=6), kinds=kinds)
    scattered(gates)
    for share in (0.2, 0.5, 0.7):
        target = (1 - share) * sizes.whole()
        choice = chooser(gates, sizes, target, {}, uniform, 2).choose()
        assert choice.amount <= target
        slack = 6 * 96 / sizes.whole() if uniform else 96 / sizes.whole()  # a neuron, or one each
        assert choice.amount / target > 1 - max(0.005, slack)
        for row in (*choice.kept["heads"], *choice.kept["neurons"], *choice.kept["hidden"]):
            assert int(row.sum()) >= 1
        if uniform:
            assert len({int(row.sum()) for row in choice.kept["neurons"]}) == 1
            assert len({int(row.sum()) for row in choice.kept["heads"]}) == 1


def test_widths_are_multiples(tiny):
    _, sizes, gates = sizes_and_gates(tiny("llama"), kinds=KINDS[:3])
    scattered(gates)
    multiples = {"neurons": 16, "hidden": 8, "heads": 1}
    choice = chooser(gates, sizes, 0.6 * sizes.whole(), multiples, False, 2).choose()
    assert all(int(row.sum()) % 16 == 0 for row in choice.kept["neurons"])
    assert int(choice.kept["hidden"][0].sum()) % 8 == 0


def test_heads_that_stay_divide_the_channels_where_all_blocks_are_alike(tiny):
    _, sizes, gates = sizes_and_gates(tiny("gpt2", n_embd=48, n_head=6), kinds=KINDS[:3])
    for seed in range(30):
        scattered(gates, seed)
        choice = chooser(gates, sizes, 0.9 * sizes.whole(), {}, True, 1).choose()
        channels = int(choice.kept["hidden"][0].sum())
        assert channels % int(choice.kept["heads"][0].sum()) == 0


def test_what_comes_through_least_goes_first():
    score = [torch.tensor([-3.0, 2.0, -1.0, 0.5]).double()]
    full = {"hidden": [1], "heads": [1], "neurons": [4], "attention": [1], "ffn": [1]}
    sizes = sizes_of_neurons(full)
    chosen = Chooser({"neurons": score}, sizes, 2.0, {}).choose()
    assert chosen.kept["neurons"][0].tolist() == [True, False, True, False]
    assert chosen.amount == 2


def sizes_of_neurons(full):
    """A size that counts neurons."""
    from compress.methods.width.vib.sizes import Sizes

    zero = torch.zeros(1, dtype=torch.float64)
    both = torch.zeros(2, 1, dtype=torch.float64)
    single = both.clone()
    single[1] = 1
    full = {k: torch.tensor(v, dtype=torch.float64) for k, v in full.items()}
    return Sizes(full, both, single, both, zero, zero, (0.0, 0.0, 0.0))


@pytest.mark.parametrize(
    ("family", "step"),
    [
        ("llama", {}),
        ("gpt2", {}),
        ("bert", {}),
        ("llama", {"of": "macs", "units": ["heads", "neurons", "layers"]}),
        (
            "gpt2",
            {
                "mode": "full",
                "fine_tune": {**FEW, "steps": 2, "learning_rate": 1e-3},
                "distillation": {"hidden": 1.0},
            },
        ),
        ("llama", {"uniform": True, "units": ["hidden", "heads", "neurons"]}),
        ("llama", {"training": None, "tuning": None, "correction": True}),
        ("bert", {"mode": "fast", "data_share": 0.5, "distillation": None, "fine_tune": None}),
    ],
)
def test_a_model_of_the_size_that_was_asked_for(family, step, calibrated, tiny, tokens):
    model = calibrated(family, **step)
    before, after = tiny(family), model
    if step.get("of") == "macs":
        sizes = [outline_of(m, anatomy_of(m), 32).macs_per_token for m in (before, after)]
    else:
        sizes = [parameters(before), parameters(after)]
    slack = 0.04 if step.get("uniform") else 0.005
    assert 0.7 * (1 - slack) * sizes[0] <= sizes[1] <= 0.7 * sizes[0]
    assert bool(torch.isfinite(model(input_ids=tokens).logits).all())


@pytest.mark.parametrize(
    ("family", "kinds", "better"),
    [
        ("llama", KINDS[1:3], 0.7),
        ("gpt2", KINDS, 0.8),
        # Its norms stand behind the sums: what a lost channel carried on, no linear brings back.
        ("bert", KINDS[1:3], 0.4),
    ],
)
def test_what_stays_is_fitted_to_what_was(family, kinds, better, tiny, tokens, helpers):
    """Closer to the model with all units than without the fit; the same where none has gone."""
    model = tiny(family)
    anatomy, sizes, gates = sizes_and_gates(model, kinds=kinds)
    scattered(gates)
    given, batches = copy.deepcopy(model.state_dict()), [{"input_ids": tokens}]

    def decide(share):
        keep(gates, chooser(gates, sizes, share * sizes.whole(), {}, False, 1).choose())

    def difference(share, fitted, learned):
        """Of the logits from those with all units, gates open or, if weights learned, at means."""
        model.load_state_dict(given)
        decide(1.0)
        with placed(model, anatomy, gates), torch.no_grad():
            gates.harden() if learned else gates.pass_all()
            wanted = model(input_ids=tokens).logits
            decide(share)
            if fitted:
                correct(model, anatomy, gates, batches, 1e-3, learned=learned)
            gates.harden()
            return helpers.difference(model(input_ids=tokens).logits, wanted)

    for learned in (False, True):
        first, last = (difference(0.8, fitted, learned) for fitted in (False, True))
        assert last < better * first
    assert difference(1.0, True, True) < 1e-4


def test_learning_beats_the_start(calibrated, tokens):
    def loss(model):
        with torch.no_grad():
            return float(model(input_ids=tokens, labels=tokens).loss)

    units = {"units": ["neurons", "heads"], "of": "blocks", "share": 0.5, "correction": False}
    start = loss(calibrated(**units, training=None, tuning=None))
    learned = loss(calibrated(**units))
    assert learned < start


def test_means_learn_from_the_model_as_it_was(calibrated, tiny, tokens, helpers):
    """Behind the fit, too, which changes the weights with which the model was its own teacher."""
    wanted = helpers.logits(tiny("llama"), tokens)
    step = {"units": ["neurons", "heads"], "training": None, "distillation": {"labels": 0.0}}

    def difference(**tuning):
        return helpers.difference(helpers.logits(calibrated(**step, **tuning), tokens), wanted)

    fitted, tuned = difference(tuning=None), difference(tuning={**FEW, "learning_rate": 0.02})
    assert tuned < fitted < difference(tuning=None, correction=False)


def test_a_rerun_is_identical_and_a_seed_is_not(calibrated):
    first, again, other = calibrated(), calibrated(), calibrated(seed=1)
    shapes = [[p.shape for p in m.parameters()] for m in (first, again, other)]
    assert shapes[0] == shapes[1]
    pairs = zip(first.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert shapes[2] != shapes[0] or not torch.equal(other.lm_head.weight, first.lm_head.weight)


def test_gates_stay_in_float32_beside_16_bits(calibrated, tokens):
    training = {**FEW, "precision": "bfloat16"}
    model = calibrated(dtype=torch.bfloat16, training=training, tuning=None)
    assert model.dtype == torch.bfloat16
    assert bool(torch.isfinite(model(input_ids=tokens).logits).all())


def test_a_size_in_bytes_counts_what_is_stored(calibrated, tiny):
    whole = 4 * parameters(tiny("llama"))
    model = calibrated(of="bytes", share=None, size=whole // 2)
    assert 0.995 * whole / 2 <= 4 * parameters(model) <= whole / 2


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_a_narrow_stream_with_heads_of_their_size(family, calibrated, tokens, tmp_path, helpers):
    """26 channels for 4 heads of 8: no stock config can say that, ours can."""
    model = calibrated(family, units=["hidden"], share=0.2)
    folder = compress.save(model, tmp_path / "saved")
    again = helpers.auto(family).from_pretrained(folder)
    assert again.config.hidden_size < 32
    assert anatomy_of(again).blocks[0].head_dim == 8
    assert helpers.difference(helpers.logits(again, tokens), helpers.logits(model, tokens)) < 1e-4


def test_a_sublayer_that_is_gone_is_stored_and_shown(tiny, tokens, tmp_path, helpers, capsys):
    from compress.cli.commands import print_anatomy

    model = tiny("llama")
    with torch.no_grad():  # worth nothing
        model.model.layers[1].self_attn.o_proj.weight.zero_()
        model.model.layers[2].mlp.down_proj.weight.zero_()
    step = {"method": "vib", "share": 0.4, "units": ["layers", "neurons"], **QUICK}
    step["multiple"] = {"neurons": 8}
    step |= {"training": None, "tuning": None}
    inputs = [{"input_ids": row} for row in tokens.split(2)]
    compress.apply(model, [step], inputs)
    folder = compress.save(model, tmp_path / "saved")
    again = helpers.auto("llama").from_pretrained(folder)
    assert helpers.difference(helpers.logits(again, tokens), helpers.logits(model, tokens)) < 1e-4
    found = compress.inspect(folder)["blocks"]
    assert "attention" in found[1]["absent"] and "ffn" in found[2]["absent"]
    assert all(p.numel() for p in again.parameters())
    print_anatomy(str(folder), None, False, as_json=False)
    drawn = [line for line in capsys.readouterr().out.splitlines() if "|" in line]
    assert "gone" in drawn[1] and "#" in drawn[0]
    # Later steps find nothing to do there.
    later = [{"method": "wanda", "pattern": "2:4"}, {"method": "gptq", "bits": 4, "group_size": 8}]
    compress.apply(copy.deepcopy(again), later[:1], inputs)


@pytest.mark.parametrize(
    ("family", "step", "words"),
    [
        ("llama", {"share": None}, "share"),
        ("llama", {"uniform": True}, "layers"),
        ("llama", {"training": None, "start": "fresh"}, "start"),
        ("llama", {"share": 0.99, "units": ["heads"]}, "at least"),
        ("llama", {"share": None, "size": 10**9}, "below"),
        ("gemma2", {}, "residual stream"),
        ("gpt_neox", {}, "heads"),
        ("llama", {"distillation": {"hidden": 1, "layers": [9]}}, "distillation.layers from 0"),
    ],
)
def test_what_is_refused(family, step, words, tiny, tokens):
    options = {"method": "vib", "share": 0.2, "of": "model", **QUICK, **step}
    with pytest.raises(CompressError, match=words):
        compress.apply(tiny(family), [options], tokens)
