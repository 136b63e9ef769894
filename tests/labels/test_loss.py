"""The loss of a head of labels, and methods that train or look at it without knowing."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax

import compress
from compress.errors import CompressError
from compress.models.anatomy import anatomy_of
from compress.models.halves import trunk_hidden
from compress.models.hidden import narrow_block, narrow_outer
from compress.models.inputs import Rows
from compress.train.labels import LabelLoss
from compress.train.language import DistillationOptions
from compress.train.source import Order
from compress.train.whole import model_loss

HEAT = 2.0


@pytest.fixture
def rows() -> Rows:
    generator = torch.Generator().manual_seed(2)
    lengths = torch.randint(4, 20, (32,), generator=generator).tolist()
    ids = [torch.randint(7, 263, (n,), generator=generator) for n in lengths]
    return Rows({"input_ids": ids}, torch.randint(2, (32,), generator=generator))


@pytest.fixture
def batch(rows) -> dict[str, torch.Tensor]:
    return rows.get(torch.arange(6))


def logits_of(model, batch):
    return model(**{k: v for k, v in batch.items() if k != "labels"}).logits


def test_labels_and_a_teacher(classifier, batch):
    student, teacher = classifier(1), classifier(0)
    options = DistillationOptions(labels=0.5, logits=2.0, temperature=HEAT, hidden=0.3)
    seen = LabelLoss(teacher, anatomy_of(teacher), options)
    with torch.no_grad():
        lesson = seen.observe(batch)
    loss, figures = LabelLoss(student, anatomy_of(student), options)(batch, lesson)
    mine, theirs = logits_of(student, batch), logits_of(teacher, batch)
    entropy = cross_entropy(mine, batch["labels"])
    apart = kl_div(
        log_softmax(mine / HEAT, -1), log_softmax(theirs / HEAT, -1), reduction="batchmean",
        log_target=True,
    ) * HEAT**2  # fmt: skip
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    states = [trunk_hidden(m, anatomy_of(m), inputs)[0] for m in (student, teacher)]
    mine, theirs = (s[batch["attention_mask"].bool()] for s in states)
    hidden = ((mine - theirs).square().mean(-1) / theirs.square().mean(-1)).mean()
    assert figures["cross_entropy"] == pytest.approx(entropy.item(), rel=1e-5)
    assert figures["kl"] == pytest.approx(apart.item(), rel=1e-4)
    assert figures["hidden"] == pytest.approx(hidden.item(), rel=1e-4)
    wanted = 0.5 * entropy + 2 * apart + 0.3 * hidden
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-4)
    loss.backward()
    assert student.classifier.weight.grad.abs().sum() > 0


def test_the_kind_of_a_model_decides_its_loss(classifier, tiny, batch):
    model = classifier(num_labels=1, id2label=None, label2id=None)
    loss, figures = model_loss(model, anatomy_of(model))({**batch, "labels": torch.ones(6)})
    wanted = (logits_of(model, batch)[:, 0] - 1).square().mean()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5) and "squared_error" in figures
    assert not isinstance(model_loss(tiny("llama"), anatomy_of(tiny("llama"))), LabelLoss)
    bare = {k: v for k, v in batch.items() if k != "labels"}
    with pytest.raises(CompressError, match="a label for each input"):
        model_loss(model, anatomy_of(model))(bare)


def test_a_batch_without_labels_adds_nothing(classifier, batch):
    model = classifier()
    loss, figures = LabelLoss(model, anatomy_of(model))(
        {**batch, "labels": torch.full_like(batch["labels"], -100)}
    )
    loss.backward()
    assert float(loss.detach()) == 0 and figures == {"cross_entropy": 0}
    assert not model.classifier.weight.grad.any()


def test_like_lengths_come_together_and_every_example_once(rows):
    order = Order(len(rows), 3, rows.lengths, 4)
    epoch = order.indices(0, 32)
    assert sorted(epoch.tolist()) == list(range(32))
    spread = [int(rows.lengths[b].max() - rows.lengths[b].min()) for b in epoch.split(4)]
    plain = [
        int(rows.lengths[b].max() - rows.lengths[b].min())
        for b in Order(32, 3).indices(0, 32).split(4)
    ]
    assert sum(spread) < 0.4 * sum(plain)
    again = Order(len(rows), 3, rows.lengths, 4)
    assert torch.equal(
        again.indices(20, 30), torch.cat([order.indices(20, 12), order.indices(32, 18)])
    )
    uneven = Order(30, 0, rows.lengths[:30], 4)
    assert uneven.count == 28 and len(set(uneven.indices(0, 28).tolist())) == 28


def batches(rows: Rows) -> list[dict[str, torch.Tensor]]:
    return [rows.get(part) for part in torch.arange(32).split(8)]


STEPS = {
    "sparsegpt": {"pattern": "2:4"},
    "gptq": {"bits": 4, "group_size": None},
    "ffn_width": {"share": 0.25, "round_to": 1},
    "head_width": {"share": 0.25},
    "sleb": {"share": 0.34},
    "svd_llm": {"ratio": 0.6},
    "fwsvd": {"ratio": 0.6},
}


@pytest.mark.parametrize("name", sorted(STEPS))
def test_methods_leave_the_head_and_the_checkpoint_loads(name, rows, classifier, tmp_path, helpers):
    model = classifier()
    kept = {n: p.clone() for n, p in model.named_parameters() if "classifier" in n or "pooler" in n}
    compress.apply(model, [{"method": name, **STEPS[name]}], batches(rows), compute="float32")
    for path, value in kept.items():
        assert torch.equal(model.get_parameter(path), value)
    ids = rows.get(torch.arange(1))["input_ids"]
    saved = compress.save(model, tmp_path / "saved")
    loaded, _ = compress.load(saved)
    assert helpers.difference(helpers.logits(loaded, ids), helpers.logits(model, ids)) < 1e-4


def test_padding_counts_for_nothing(rows, classifier):
    padded, alone = classifier(), classifier()
    compress.apply(padded, ["wanda"], [rows.get(torch.arange(32))], compute="float32")
    each = [rows.get(torch.tensor([i])) for i in range(32)]
    compress.apply(alone, ["wanda"], each, compute="float32")
    for (name, a), b in zip(padded.named_parameters(), alone.parameters(), strict=True):
        # Sums in another order may decide a tie between two weights otherwise.
        assert float(((a == 0) != (b == 0)).float().mean()) < 2e-3, name


def test_pairs_of_texts_calibrate_a_live_model(classifier, pairing):
    pairs = [{"text": "is it far", "text_pair": "two miles"}, {"text": "why", "text_pair": "rain"}]
    named = compress.apply(classifier(), ["wanda"], pairs, tokenizer=pairing)
    texts = [[pair[name] for pair in pairs] for name in ("text", "text_pair")]
    read = pairing(*texts, padding=True, return_tensors="pt", return_token_type_ids=True)
    tokenised = compress.apply(classifier(), ["wanda"], read)
    for (name, a), b in zip(named.named_parameters(), tokenised.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_whole_models_learn_from_labels(rows, classifier):
    training = {"steps": 30, "batch": 8, "learning_rate": 3e-3}
    teacher = classifier()
    pruned = {"method": "magnitude", "sparsity": 0.6}
    taught = {"method": "distill", "scope": "model", "training": training}
    given = batches(rows)

    def apart(steps):
        model = compress.apply(classifier(), steps, given, compute="float32")
        with torch.no_grad():
            found = [log_softmax(logits_of(model, b), -1) for b in given]
            wanted = [log_softmax(logits_of(teacher, b), -1) for b in given]
        return float(
            kl_div(torch.cat(found), torch.cat(wanted), reduction="batchmean", log_target=True)
        )

    assert apart([pruned, taught]) < 0.5 * apart([pruned])
    masks = {
        "method": "maskllm", "pattern": "2:4", "scope": "model",
        "training": {"steps": 10, "batch": 8, "learning_rate": 0.05},
    }  # fmt: skip
    learned = compress.apply(classifier(), [masks], given, compute="float32")
    weight = learned.bert.encoder.layer[0].intermediate.dense.weight
    assert float((weight == 0).float().mean()) == 0.5
    with pytest.raises(CompressError, match="head of labels"):
        compress.apply(classifier(), [{**taught, "teacher": "cached"}], given, compute="float32")


@pytest.mark.parametrize("labels", [3, 32])
def test_a_narrower_stream_keeps_all_labels(labels, classifier, rows):
    """Also where there are as many labels as channels."""
    names = {"id2label": {i: f"l{i}" for i in range(labels)}, "label2id": None}
    model = classifier(**names)
    anatomy, kept = anatomy_of(model), torch.arange(32)[torch.arange(32) % 4 != 1]
    for block in anatomy.blocks:
        narrow_block(model.get_submodule(block.path), block, kept)
    narrow_outer(model, anatomy, kept)
    assert model.classifier.weight.shape == (labels, 24)
    assert model.bert.pooler.dense.weight.shape == (24, 24)


def test_gates_choose_by_the_loss_of_labels(rows, classifier, tmp_path, helpers):
    """Also channels of the stream, to which pooler and head are tied."""
    training = {"steps": 20, "batch": 8, "learning_rate": 0.2, "clip": None}
    step = {
        "method": "vib", "share": 0.3, "of": "model", "training": training,
        "tuning": {**training, "steps": 5, "learning_rate": 0.01}, "start_batches": 2,
    }  # fmt: skip
    model = compress.apply(classifier(), [step], batches(rows), compute="float32")
    assert model.classifier.weight.shape == (2, model.config.hidden_size)
    before, after = (sum(p.numel() for p in m.parameters()) for m in (classifier(), model))
    assert after < 0.75 * before
    ids = rows.get(torch.arange(1))["input_ids"]
    loaded, _ = compress.load(compress.save(model, tmp_path / "saved"))
    assert helpers.difference(helpers.logits(loaded, ids), helpers.logits(model, ids)) < 1e-4
