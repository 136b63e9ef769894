"""The chunked loss is the plain one; a model has nothing to learn from itself."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from compress.errors import CompressError
from compress.models.anatomy import anatomy_of
from compress.train import TokenSource, TrainingOptions, fit, language
from compress.train.language import DistillationOptions, LanguageLoss
from compress.train.teacher import ModelTeacher

HEAT = 2.0


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(language, "_LOGIT_BYTES", 4 * 264 * 8 * 5)  # five positions of eight rows


@pytest.fixture
def batch(tokens, sequences):
    """``batch(family)``: padded where the model is causal, labelled where it is masked."""

    def make(family: str) -> dict[str, torch.Tensor]:
        if family == "bert":
            rows = sequences(family)
            return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
        mask = torch.ones_like(tokens)
        mask[2, 15:] = 0
        return {"input_ids": tokens, "attention_mask": mask}

    return make


def gradients(model, loss) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def predicted(family, batch, logits) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and targets of the predicted positions, from whole logits."""
    if family == "bert":
        labels = batch["labels"]
    else:
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)[:, 1:]
        logits = logits[:, :-1]
    return logits[labels != -100], labels[labels != -100]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "bert"])
def test_chunks_give_the_plain_loss_and_gradient(family, tiny, batch):
    model, given = tiny(family), batch(family)
    loss, figures = LanguageLoss(model, anatomy_of(model))(given)
    mine = gradients(model, loss)
    inputs = {k: v for k, v in given.items() if k != "labels"}
    plain = cross_entropy(*predicted(family, given, model(**inputs).logits))
    theirs = gradients(model, plain)
    assert float(loss.detach()) == pytest.approx(float(plain.detach()), rel=1e-5)
    assert figures["cross_entropy"] == pytest.approx(float(plain.detach()), rel=1e-5)
    assert mine.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert torch.allclose(mine[name], gradient, rtol=1e-3, atol=1e-6), name


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_batch_with_nothing_to_predict_adds_nothing(family, tiny, tokens):
    model = tiny(family)
    given = {"input_ids": tokens[:, :1]}  # a document of one token
    if family == "bert":
        given = {"input_ids": tokens, "labels": torch.full_like(tokens, -100)}
    measured = LanguageLoss(model, anatomy_of(model), DistillationOptions())
    for lesson in (None, measured.observe(given)):
        loss, figures = measured(given, lesson)
        assert float(loss.detach()) == 0 and not any(figures.values())
        assert not any(gradient.any() for gradient in gradients(model, loss).values())


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_distillation_is_the_plain_divergence(family, tiny, batch):
    student, teacher, given = tiny(family, seed=1), tiny(family), batch(family)
    options = DistillationOptions(labels=0.0, logits=0.5, temperature=HEAT)
    with torch.no_grad():
        seen = LanguageLoss(teacher, anatomy_of(teacher), options).observe(given)
    # The teacher's states go through the student's head: they share it in all methods.
    student.get_output_embeddings().load_state_dict(teacher.get_output_embeddings().state_dict())
    if family == "llama":
        student.model.norm.load_state_dict(teacher.model.norm.state_dict())
    else:
        student.cls.load_state_dict(teacher.cls.state_dict())
    loss, _ = LanguageLoss(student, anatomy_of(student), options)(given, seen)
    inputs = {k: v for k, v in given.items() if k != "labels"}
    mine, _ = predicted(family, given, student(**inputs).logits)
    theirs, _ = predicted(family, given, teacher(**inputs).logits.detach())
    pair = log_softmax(mine / HEAT, -1), log_softmax(theirs / HEAT, -1)
    plain = 0.5 * HEAT**2 * kl_div(*pair, reduction="batchmean", log_target=True)
    assert float(loss.detach()) == pytest.approx(float(plain.detach()), rel=1e-4)
    a, b = gradients(student, loss), gradients(student, plain)
    for name, gradient in b.items():
        assert torch.allclose(a[name], gradient, rtol=1e-3, atol=1e-6), name


def test_a_model_has_nothing_to_learn_from_itself(tiny, batch):
    model, given = tiny("llama"), batch("llama")
    options = DistillationOptions(labels=0.0, logits=1.0, hidden=1.0, layers=(0, 2))
    apart = LanguageLoss(model, anatomy_of(model), options)
    with torch.no_grad():
        seen = apart.observe(given)
        loss, figures = apart(given, seen)
        assert abs(float(loss)) < 1e-6
        model.model.layers[1].mlp.down_proj.weight.mul_(1.5)
        _, changed = apart(given, seen)
    assert figures["hidden"] == 0 and changed["kl"] > 1e-4
    # Block 0 lies before the change, block 2 behind it: half of what block 2 shows alone.
    alone = LanguageLoss(model, anatomy_of(model), options.model_copy(update={"layers": (2,)}))
    with torch.no_grad():
        _, last = alone(given, seen)
    assert changed["hidden"] == pytest.approx(last["hidden"] / 2, rel=1e-4)


def test_padding_has_no_hidden_states_to_learn(tiny, tokens):
    student, teacher = tiny("llama", seed=1), tiny("llama")
    options = DistillationOptions(labels=0.0, logits=0.0, hidden=1.0)
    taught = ModelTeacher(teacher, anatomy_of(teacher), {2: 2})
    measured = LanguageLoss(student, anatomy_of(student), options, taught)

    def learned(ids, mask=None):
        given = {"input_ids": ids} if mask is None else {"input_ids": ids, "attention_mask": mask}
        with torch.no_grad():
            lesson = measured.observe(given)
        loss = measured(given, lesson)[0]
        return loss.detach(), gradients(student, loss)

    value, plain = learned(tokens)
    again, masked = learned(tokens, torch.ones_like(tokens))
    assert torch.equal(again, value) and all(torch.equal(masked[n], g) for n, g in plain.items())
    padded = torch.cat([tokens, torch.full_like(tokens, 9)], 1)
    mask = torch.cat([torch.ones_like(tokens), torch.zeros_like(tokens)], 1)
    assert float(learned(padded, mask)[0]) == pytest.approx(float(value), rel=1e-5)


def test_recomputed_blocks_learn_the_same(tiny, tokens):
    states = []
    for wanted in (False, True):
        model = tiny("llama")
        language_loss = LanguageLoss(model, anatomy_of(model))
        fit(
            model, lambda _module, batch, _moment, loss=language_loss: loss(batch),
            TokenSource(tokens),
            TrainingOptions(steps=2, batch=4, gradient_checkpointing=wanted, eps=1e-4),
        )  # fmt: skip
        states.append(model.state_dict())
    for name, value in states[0].items():
        assert torch.allclose(states[1][name], value, rtol=1e-4, atol=1e-6), name


def test_masked_models_need_labels(tiny, tokens):
    model = tiny("bert")
    with pytest.raises(CompressError, match="labels in each batch"):
        LanguageLoss(model, anatomy_of(model))({"input_ids": tokens})
