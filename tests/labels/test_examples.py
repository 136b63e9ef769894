"""Labelled texts from files and data roots; what does not fit is told in one paragraph."""

from __future__ import annotations

import json

import pytest
import torch

from compress.data.calibration import calibration_batches
from compress.data.calibration_spec import CalibrationSpec
from compress.data.examples import load_examples
from compress.data.examples_spec import ExamplesSpec, evaluation_examples
from compress.data.given import given_examples
from compress.data.glue import GLUE
from compress.data.labelled import head_for, labelled_rows
from compress.data.labels import label_names, label_values
from compress.errors import CompressError
from compress.models.heads import Head, head_of

ROWS = [{"a": "one, two", "b": "x", "y": "no"}, {"a": "three\tfour", "b": "z", "y": "yes"}]


def spec(**fields) -> ExamplesSpec:
    return ExamplesSpec.model_validate(fields)


def write(path, rows) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".parquet"])
def test_every_kind_of_file_gives_the_same_examples(suffix, tmp_path):
    path = tmp_path / f"rows{suffix}"
    texts = [row["a"].replace("\t", " ") if suffix == ".tsv" else row["a"] for row in ROWS]
    if suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    elif suffix in (".csv", ".tsv"):
        mark, join = ('"', ",") if suffix == ".csv" else ("", "\t")
        lines = [join.join(ROWS[0])]
        for text, row in zip(texts, ROWS, strict=True):
            lines.append(join.join([f"{mark}{text}{mark}", row["b"], row["y"]]))
        path.write_text("\n".join(lines) + "\n")
    else:
        text = json.dumps(ROWS) if suffix == ".json" else "\n".join(map(json.dumps, ROWS))
        path.write_text(text)
    found = load_examples(spec(source=str(path), text="a", text_pair="b", label="y"))
    assert found.texts == tuple(texts) and found.pairs == ("x", "z")
    assert found.labels == ("no", "yes") and label_names(found) == ("no", "yes")


@pytest.mark.parametrize("name", sorted(GLUE))
def test_tasks_of_glue_by_name(name, tmp_path):
    task = GLUE[name]
    row = {column: f"text of {column}" for column in task.columns[0]} | {"label": 1, "idx": 0}
    folder = tmp_path / "nyu-mll" / "glue" / name
    folder.mkdir(parents=True)
    wanted = evaluation_examples(name)
    write(folder / f"{wanted.split}.jsonl", [row, row])
    found = load_examples(wanted, tmp_path)
    assert (found.pairs is not None) == (len(task.columns[0]) == 2)
    head = head_for(wanted, found)
    assert head.names == task.names and label_values(found, head.names) == [1, 1]
    assert head.regression == (name == "stsb")


@pytest.mark.parametrize(
    ("rows", "fields", "told"),
    [
        ([{"text": "a", "lable": 1}], {}, "the column 'label'.*Did you mean 'lable'"),
        ([{"txt": "a", "label": 1}], {"text": "texts"}, "the column 'texts'"),
        ([{"text": "a", "label": 1}], {"text_pair": "other"}, "Set text_pair"),
        ([{"text": "a", "label": None}], {}, "a label in the column 'label'"),
        ([{"text": 3, "label": 1}], {}, "a text in the column 'text'"),
        ([], {}, "labelled examples"),
    ],
)
def test_rows_that_are_no_examples(rows, fields, told, tmp_path):
    path = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(CompressError, match=told):
        load_examples(spec(source=path, **fields))


def test_a_text_file_holds_no_examples(text):
    with pytest.raises(CompressError, match="a file with rows"):
        load_examples(spec(source=str(text)))


def test_labels_of_head_and_data_meet_by_name_else_by_number(tmp_path):
    rows = [{"text": "a", "label": 0}, {"text": "b", "label": 2}, {"text": "c", "label": 1}]
    path = write(tmp_path / "rows.jsonl", rows)
    known = load_examples(spec(source=path, labels=["entailment", "neutral", "contradiction"]))
    # MNLI models number the labels in an order of their own.
    assert label_values(known, ("CONTRADICTION", "ENTAILMENT", "NEUTRAL")) == [1, 0, 2]
    assert label_values(known, ("LABEL_0", "LABEL_1", "LABEL_2")) == [0, 2, 1]
    assert label_values(load_examples(spec(source=path)), ("x", "y", "z")) == [0, 2, 1]
    with pytest.raises(CompressError, match="a head of at least 3 labels"):
        label_values(known, ("no", "yes"))
    with pytest.raises(CompressError, match="labels among the 2 of the head.*2 in example 2"):
        label_values(load_examples(spec(source=path)), ("no", "yes"))


@pytest.mark.parametrize(
    "columns",
    [
        ("question", "sentence"), ("premise", "hypothesis"), ("question1", "question2"),
        ("sentence1", "sentence2"), ("text", "text_pair"),
    ],
)  # fmt: skip
def test_known_pairs_keep_both_texts(columns, tmp_path):
    row = {columns[1]: "second", columns[0]: "first", "label": 1}
    for found in (
        given_examples([row]),
        load_examples(spec(source=write(tmp_path / "rows.jsonl", [row]))),
        load_examples(spec(source=str(tmp_path / "rows.jsonl"), text_pair=columns[1])),
    ):
        assert (found.texts, found.pairs) == (("first",), ("second",))


def test_names_of_labels_that_a_data_set_tells(tmp_path):
    import datasets

    names = datasets.ClassLabel(names=["entailment", "neutral", "contradiction"])
    features = datasets.Features({"text": datasets.Value("string"), "label": names})
    rows = {"text": ["a", "b", "c"], "label": [0, 2, 1]}
    table = datasets.Dataset.from_dict(rows, features=features)
    table.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"train": table}).save_to_disk(str(tmp_path / "several"))
    for found in (
        given_examples(table),
        load_examples(spec(source=str(tmp_path / "saved"))),
        load_examples(spec(source=str(tmp_path / "several"))),
    ):
        assert label_names(found) == ("entailment", "neutral", "contradiction")
        assert label_values(found, ("CONTRADICTION", "ENTAILMENT", "NEUTRAL")) == [1, 0, 2]
        assert label_values(found, ("LABEL_0", "LABEL_1", "LABEL_2")) == [0, 2, 1]
    number = load_examples(spec(source=str(tmp_path / "saved"), labels="number"))
    assert number.names == ()
    # Of words, each of which has one.
    tags = datasets.Sequence(datasets.ClassLabel(names=["O", "B-PER"]))
    features = datasets.Features(
        {"tokens": datasets.Sequence(datasets.Value("string")), "ner_tags": tags}
    )
    words = {"tokens": [["Ada", "wrote"]], "ner_tags": [[1, 0]]}
    found = given_examples(datasets.Dataset.from_dict(words, features=features))
    assert label_values(found, ("B-PER", "O")) == [0, 1]


def test_labels_are_names_or_numbers_all_of_them(tmp_path):
    stars = ("1", "2", "3", "4", "5")

    def values(given, head=stars, **fields):
        rows = [{"text": "a", "label": label} for label in given]
        path = write(tmp_path / "rows.jsonl", rows)
        return label_values(load_examples(spec(source=path, **fields)), head)

    assert values([0, 4, 1]) == [0, 4, 1] and values(["0", "4", "1"]) == [0, 4, 1]
    assert values([1, 5, 2]) == [0, 4, 1] and values(["1", "5", "2"]) == [0, 4, 1]
    # Numbers are those of the names that the data give, even where all of them are names too.
    assert values([1, 2], labels=stars) == [1, 2] and values(["1", "2"], labels=stars) == [0, 1]
    # A data set may name labels that the head lacks, as long as none of them occurs.
    known = ["neutral", "no", "yes"]
    assert values([1, 2], head=("yes", "no"), labels=known) == [1, 0]
    with pytest.raises(CompressError, match="0 in example 2"):
        values([1, 0], head=("yes", "no"), labels=known)
    with pytest.raises(CompressError, match="5 in example 2"):
        values([0, 5])


def test_labels_of_training_data(tmp_path):
    def names(*labels, **fields):
        rows = [{"text": "a", "label": label} for label in labels]
        return label_names(load_examples(spec(source=write(tmp_path / "x.jsonl", rows), **fields)))

    assert names("b", "a", "b") == ("a", "b") and names(2, "0", 1) == ("0", "1", "2")
    assert names(1, 0, labels=["bad", "good"]) == ("bad", "good")
    for labels, told in (
        ((0.5, 1.0), "labels: number"),
        ((-1, -1), "test splits"),
        ((0, 0), "two"),
    ):
        with pytest.raises(CompressError, match=told):
            names(*labels)
    numbers = load_examples(
        spec(source=write(tmp_path / "n.jsonl", [{"text": "a", "label": "2.5"}]))
    )
    assert label_values(numbers, ()) == [2.5]
    with pytest.raises(CompressError, match="a number as the label"):
        label_values(
            load_examples(spec(source=write(tmp_path / "s.jsonl", [{"text": "a", "label": "up"}]))),
            (),
        )


def test_rows_are_what_the_tokenizer_gives_and_padding_is_hidden(
    reviews, columns, pairing, classifier
):
    model = classifier()
    given = spec(source=str(reviews(12)), **columns, text_pair="reply")
    examples = load_examples(given)
    rows = labelled_rows(examples, head_of(model), pairing, model.config, None)
    batch = rows.get(torch.arange(12))
    plain = pairing(
        list(examples.texts),
        list(examples.pairs),
        padding=True,
        return_tensors="pt",
        return_token_type_ids=True,
    )
    for name in ("input_ids", "token_type_ids", "attention_mask"):
        assert torch.equal(batch[name], plain[name]), name
    assert batch["token_type_ids"].max() == 1
    assert batch["labels"].tolist() == [int(mood == "good") for mood in examples.labels]
    short = labelled_rows(examples, head_of(model), pairing, model.config, 8)
    assert int(short.lengths.max()) == 8
    with pytest.raises(CompressError, match="at most 128, the model's positions"):
        labelled_rows(examples, head_of(model), pairing, model.config, 129)


def test_calibration_on_examples(reviews, columns, pairing, classifier, tiny):
    source = str(reviews(40))
    wanted = CalibrationSpec.model_validate(
        {"examples": {"source": source, **columns}, "samples": 10, "length": 64, "batch": 4}
    )
    found = calibration_batches(wanted, pairing, classifier().config)
    assert [len(batch["input_ids"]) for batch in found.batches] == [4, 4, 2]
    assert all("labels" not in batch and "attention_mask" in batch for batch in found.batches)
    assert torch.cat(found.labels).shape == (10,) and "examples of" in found.description
    drawn = wanted.model_copy(update={"selection": "random"})
    other = calibration_batches(drawn, pairing, classifier().config, seed=1)
    assert other.digest != found.digest
    with pytest.raises(CompressError, match="a model with a head of labels"):
        calibration_batches(wanted, pairing, tiny("bert").config)
    with pytest.raises(CompressError, match="at least 41 examples"):
        calibration_batches(wanted.model_copy(update={"samples": 41}), pairing, classifier().config)


def test_heads(classifier, tiny):
    assert (
        head_of(classifier()) == Head("sequence", ("bad", "good")) and head_of(tiny("bert")) is None
    )
    assert head_of(classifier(num_labels=1, id2label=None, label2id=None)).regression
    with pytest.raises(CompressError, match="one label, or a number"):
        head_of(classifier(problem_type="multi_label_classification"))
