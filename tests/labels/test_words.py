"""Models that label each word of a text: read, scored, calibrated, trained, loaded again."""

from __future__ import annotations

import json
import random

import pytest
import torch
from transformers import AutoModelForTokenClassification, BertConfig, BertForTokenClassification

import compress
from compress.conformance.models import TINY
from compress.data.given import given_examples
from compress.data.labelled import labelled_rows
from compress.errors import CompressError
from compress.eval.quality.word_labels import entities, word_change, word_scores
from compress.models.heads import head_of
from compress.models.inputs import IGNORED

NAMES = ("O", "B-PER", "I-PER", "B-LOC")
_WORDS = {
    "O": ("the", "went", "to"),
    "B-PER": ("Ada", "Tom"),
    "I-PER": ("Lee",),
    "B-LOC": ("Rome",),
}


def sentences(count: int, seed: int = 0) -> list[dict[str, list[str]]]:
    generator = random.Random(seed)
    rows = []
    for _ in range(count):
        tags = [generator.choice(NAMES) for _ in range(generator.randint(3, 6))]
        rows.append({"tokens": [generator.choice(_WORDS[tag]) for tag in tags], "ner_tags": tags})
    return rows


@pytest.fixture(scope="module")
def tagger():
    def make(seed: int = 0) -> BertForTokenClassification:
        torch.manual_seed(seed)
        named = dict(enumerate(NAMES))
        config = BertConfig(**{**TINY["bert"][1], "id2label": named,
                               "label2id": {name: i for i, name in named.items()}})  # fmt: skip
        model = BertForTokenClassification(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)
        model.config.architectures = ["BertForTokenClassification"]
        return model

    return make


def test_entities_are_those_of_conll():
    tags = ["B-A", "I-A", "I-B", "O", "I-A", "B-A", "B-A", "I-A"]
    assert entities(tags) == {(0, 2, "A"), (2, 3, "B"), (4, 5, "A"), (5, 6, "A"), (6, 8, "A")}
    assert entities(["O"]) == set() and entities([]) == set()


def test_scores_of_words():
    right = [1, 2, 0, 3, 0, 1]  # two texts of three words: PER over two words, LOC and PER
    said = [1, 2, 0, 3, 1, 0]
    found = word_scores([3, 3], right, said, NAMES)
    assert found["entity_f1"][0] == pytest.approx(2 * 2 / (3 + 3))
    assert found["accuracy"][0] == pytest.approx(4 / 6) and next(iter(found)) == "entity_f1"
    value, (low, high) = word_change("accuracy", [3, 3], right, right, said, NAMES)
    assert value == pytest.approx(-1 / 3) and low <= value <= high
    assert set(word_scores([3, 3], right, said, ("a", "b", "c", "d"))) == {"accuracy", "f1"}
    # Two texts that are answered alike say little; texts without entities say nothing of them.
    value, (low, high) = word_change("entity_f1", [3, 3], right, said, said, NAMES)
    assert value == 0 and low < -0.1 and high > 0.1
    nothing = [0] * 6
    alike = word_change("entity_f1", [3, 3], nothing, nothing, nothing, NAMES)
    assert alike == (0, (-1, 1))


def test_the_first_token_of_a_word_has_its_label(tagger, pairing):
    model, examples = tagger(), given_examples(sentences(4))
    rows = labelled_rows(examples, head_of(model), pairing, model.config, None)
    batch = rows.get(torch.tensor([0, 1]))
    for row in (0, 1):
        given = [NAMES.index(tag) for tag in examples.labels[row]]
        kept = batch["labels"][row] != IGNORED
        assert batch["labels"][row][kept].tolist() == given
        firsts = [word[0] for word in examples.texts[row]]
        assert pairing.convert_ids_to_tokens(batch["input_ids"][row][kept].tolist()) == firsts


def test_a_run_and_python_agree(tagger, pairing, tmp_path):
    model, path = tagger(), tmp_path / "ner.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in sentences(24, seed=1)))
    model.save_pretrained(tmp_path / "base")
    pairing.save_pretrained(tmp_path / "base")
    result = compress.run(
        {
            "model": str(tmp_path / "base"),
            "calibration": {"examples": {"source": str(path)}, "samples": 8, "length": 32},
            "steps": [
                {"method": "svd", "ratio": 0.5, "round_to": 4},
                {"method": "sparsegpt", "pattern": "2:4"},
            ],
            "evaluation": {"examples": {"source": str(path)}, "latency": False, "memory": False},
        },
        tmp_path / "run",
    )
    scores = result.report.before.labels.scores
    with torch.no_grad():  # one text at a time
        hits = total = 0
        told, right = [], []
        for row in sentences(24, seed=1):
            read = pairing([row["tokens"]], is_split_into_words=True, return_tensors="pt")
            words = read.word_ids(0)
            answers = model(**read).logits[0].argmax(-1)
            first = [words.index(word) for word in range(len(row["tokens"]))]
            said = [NAMES[int(answers[place])] for place in first]
            hits += sum(a == b for a, b in zip(said, row["ner_tags"], strict=True))
            total += len(first)
            told.append(entities(said))
            right.append(entities(row["ner_tags"]))
    both = sum(len(a & b) for a, b in zip(told, right, strict=True))
    assert scores["accuracy"].value == pytest.approx(hits / total)
    assert scores["entity_f1"].value == pytest.approx(
        2 * both / (sum(map(len, told)) + sum(map(len, right)))
    )
    again = AutoModelForTokenClassification.from_pretrained(result.model)
    report = compress.evaluate(
        again, {"memory": False}, examples=sentences(24, seed=1), tokenizer=pairing
    )
    assert report.after.labels == result.report.after.labels
    assert "Entity F1" in (tmp_path / "run" / "report.html").read_text()


def test_a_tagger_is_fine_tuned(tagger, pairing, tmp_path):
    path = tmp_path / "ner.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in sentences(64, seed=2)))
    tagger().save_pretrained(tmp_path / "base")
    pairing.save_pretrained(tmp_path / "base")
    examples = {"source": str(path)}
    train = {
        "from": str(tmp_path / "base"), "examples": examples, "length": 32,
        "training": {"steps": 40, "batch": 16, "learning_rate": 5e-3},
    }  # fmt: skip
    evaluation = {"examples": examples, "latency": False, "memory": False}
    result = compress.run({"model": {"train": train}, "evaluation": evaluation}, tmp_path / "run")
    assert result.report.after.labels.scores["accuracy"].value > 0.9


def test_labels_of_the_other_kind_are_refused(tagger, pairing, classifier):
    texts = [{"text": "Ada went", "label": 1}]
    with pytest.raises(CompressError, match="a label for each word"):
        compress.evaluate(tagger(), {"memory": False}, examples=texts, tokenizer=pairing)
    with pytest.raises(CompressError, match="a label for each text"):
        compress.evaluate(classifier(), {"memory": False}, examples=sentences(2), tokenizer=pairing)
    uneven = [{"tokens": ["Ada", "went"], "label": ["O"]}]
    with pytest.raises(CompressError, match="as many labels"):
        compress.evaluate(tagger(), {"memory": False}, examples=uneven, tokenizer=pairing)
