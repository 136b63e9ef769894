"""Models that label images: read from everywhere, scored, calibrated, fine-tuned, loaded again."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification

import compress
from compress.data.examples import load_examples
from compress.data.examples_spec import ExamplesSpec
from compress.data.given import given_examples
from compress.data.labelled import labelled_rows
from compress.data.pictures import picture
from compress.data.processor import FILE, ImageProcessor
from compress.errors import CompressError
from compress.eval.cost import macs_per_token
from compress.eval.quality.agreement import change_of_hits, image_scores
from compress.eval.quality.stats import share_interval
from compress.models.heads import head_of

SIDE, CLASSES = 8, 10
PROCESSOR = {
    "image_processor_type": "ViTImageProcessor", "size": {"height": SIDE, "width": SIDE},
    "image_mean": [0.4], "image_std": [0.3],
}  # fmt: skip
NAMES = tuple("abcdefghij")


@pytest.fixture(scope="module")
def seen() -> tuple[np.ndarray, np.ndarray]:
    """Images [40, 8, 8], uint8, and their labels."""
    generator = np.random.default_rng(0)
    return generator.integers(0, 256, (40, SIDE, SIDE), np.uint8), generator.integers(
        0, CLASSES, 40
    )


@pytest.fixture(scope="module")
def vit() -> ViTForImageClassification:
    torch.manual_seed(0)
    named = dict(enumerate(NAMES))
    config = ViTConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        image_size=SIDE, patch_size=2, num_channels=1, id2label=named,
        label2id={name: i for i, name in named.items()},
    )  # fmt: skip
    model = ViTForImageClassification(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.config.architectures = ["ViTForImageClassification"]
    return model


@pytest.fixture(scope="module")
def base(vit, tmp_path_factory) -> Path:
    """The model with its image processor."""
    folder = tmp_path_factory.mktemp("vit") / "base"
    vit.save_pretrained(folder)
    (folder / FILE).write_text(json.dumps(PROCESSOR))
    return folder


@pytest.fixture(scope="module")
def arrays(seen, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("arrays") / "mine.npz"
    np.savez(path, images=seen[0], labels=seen[1])
    return path


def pixels(images: np.ndarray) -> torch.Tensor:
    """What the processor says of images of its own size."""
    return ((torch.from_numpy(images).float() / 255 - 0.4) / 0.3)[:, None]


def test_the_same_images_from_everywhere(seen, arrays, tmp_path):
    import datasets

    images, labels = seen
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        folder = tmp_path / "classes" / "train" / NAMES[label]
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / f"{number:03d}.npy", image)
    rows = [{"image": i, "label": int(y)} for i, y in zip(images, labels, strict=True)]
    table = datasets.Dataset.from_dict({"image": images.tolist(), "label": labels.tolist()})
    table.save_to_disk(str(tmp_path / "saved"))
    found = {
        "arrays": load_examples(ExamplesSpec(source=str(arrays))),
        "saved": load_examples(ExamplesSpec(source=str(tmp_path / "saved"))),
        "memory": given_examples(rows),
        "channels first": given_examples([{**row, "image": row["image"][None]} for row in rows]),
        "fractions": given_examples([{**row, "image": row["image"] / 255.0} for row in rows]),
        "table": given_examples(table),
    }
    for examples in found.values():
        assert len(examples) == 40 and list(examples.labels) == labels.tolist()
        made = [picture(image) for image in examples.images]
        assert np.allclose(np.stack(made)[..., 0], images, atol=1e-3)
    folders = load_examples(ExamplesSpec(source="classes"), tmp_path)  # a data root
    assert folders.names == tuple(sorted({NAMES[label] for label in labels}))
    counts = np.bincount(labels, minlength=CLASSES)
    assert [folders.labels.count(name) for name in NAMES] == counts.tolist()


def test_a_place_without_splits_is_no_validation_split(seen, base, arrays, tmp_path):
    images, labels = seen
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        for folder in ("whole", "split/train"):
            path = tmp_path / folder / NAMES[label] / f"{number:03d}.npy"
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, image)
    np.savez(tmp_path / "own.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    np.savez(tmp_path / "named.npz", a=images, b=labels)
    for source in (arrays, tmp_path / "whole", tmp_path / "own.npz", tmp_path / "split"):
        for split in ("validation", "other"):
            with pytest.raises(CompressError, match=r"a split of the images.*(split: all|train)"):
                load_examples(ExamplesSpec(source=str(source), split=split))
    for source in (arrays, tmp_path / "whole"):
        for split in ("train", "all"):
            found = load_examples(ExamplesSpec(source=str(source), split=split))
            assert found.description == f"40 images of {source}"
    for source in ("own.npz", "split"):
        found = load_examples(ExamplesSpec(source=source), tmp_path)
        assert found.description == f"40 images of {source} train"
    named = ExamplesSpec(source="named.npz", split="all", image="a", label="b", part="tail:0.2")
    assert load_examples(named, tmp_path).labels == tuple(labels[-8:].tolist())
    # By default an evaluation reads the split validation; a plan tells.
    recipe = {"model": str(base), "evaluation": {"examples": {"source": str(arrays)}}}
    with pytest.raises(CompressError, match="evaluation.*'validation'.*split: all"):
        compress.plan(recipe)
    assert load_examples(ExamplesSpec(source="digits", split="validation")).description.endswith(
        "digits test"
    )
    with pytest.raises(CompressError, match="train or test of digits"):
        load_examples(ExamplesSpec(source="digits", split="all"))


def test_images_of_a_folder_come_with_their_classes_mixed(tmp_path):
    for name in "abcd":
        for number in range(20):
            path = tmp_path / "sorted" / name / f"{number:03d}.npy"
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, np.full((SIDE, SIDE), number, np.uint8))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "sorted").rename(tmp_path / "elsewhere" / "moved")
    found = load_examples(ExamplesSpec(source=str(tmp_path / "elsewhere" / "moved")))
    assert sorted(found.labels) == [name for name in "abcd" for _ in range(20)]
    for fields in ({"limit": 20}, {"part": "head:0.25"}, {"part": "tail:0.25"}):
        few = load_examples(ExamplesSpec(source=str(tmp_path / "elsewhere" / "moved"), **fields))
        assert set(few.labels) == set("abcd") and len(few) == 20
        start = 60 if "tail" in fields.get("part", "") else 0
        assert few.labels == found.labels[start : start + 20]
    # The order is that of the names below the folder, wherever it lies.
    (tmp_path / "elsewhere").rename(tmp_path / "other")
    again = load_examples(ExamplesSpec(source=str(tmp_path / "other" / "moved")))
    assert again.labels == found.labels


def test_the_processor_does_what_its_file_says(seen):
    made = ImageProcessor(PROCESSOR).pixels(seen[0][0][..., None])
    assert torch.allclose(made, pixels(seen[0][:1])[0], atol=1e-6)
    wide = np.zeros((20, 40, 3), np.uint8)
    wide[:, 20:] = 200
    fields = {"do_resize": True, "size": {"shortest_edge": 10}, "resample": 3,
              "do_center_crop": True, "crop_size": {"height": 8, "width": 8},
              "do_normalize": False}  # fmt: skip
    made = ImageProcessor(fields).pixels(wide)
    # 20 x 40 becomes 10 x 20; the middle 8 columns are 6 to 13, half of them dark.
    assert made.shape == (3, 8, 8)
    assert made[:, :, :3].max() < 0.1 and (made[:, :, 5:] - 200 / 255).abs().max() < 0.05
    square = ImageProcessor({"feature_extractor_type": "DeiTFeatureExtractor", "size": 9,
                             "crop_size": 8})  # fmt: skip
    assert (square.size, square.crop, square.filter) == ((9, 9), (8, 8), "bicubic")
    for fields, told in (
        ({**PROCESSOR, "do_pad": True}, "do_pad"),
        ({"do_resize": True, "size": {"longest_edge": 9}}, "longest_edge"),
        ({**PROCESSOR, "resample": 1}, "resample"),
    ):
        with pytest.raises(CompressError, match=told):
            ImageProcessor(fields)


def test_scores_of_images():
    found = image_scores([1, 2, 3, 4], [1, 2, 0, 0], [True, True, True, False])
    assert found["accuracy"] == (0.5, share_interval(2, 4))
    assert found["top5"] == (0.75, share_interval(3, 4))
    assert "top5" not in image_scores([1, 0], [1, 1], None)
    value, (low, high) = change_of_hits([True, True, False], [True, False, False])
    assert value == pytest.approx(-1 / 3) and low < value < high


def test_a_run_and_python_agree(vit, base, seen, arrays, tmp_path, helpers):
    images, labels = seen
    steps = [{"method": "ffn_width", "share": 0.25}, {"method": "wanda", "pattern": "2:4"}]
    recipe = {
        "model": str(base), "compute": "float32", "steps": steps,
        "calibration": {"examples": {"source": str(arrays)}, "samples": 8, "batch": 4},
        "evaluation": {"examples": {"source": str(arrays), "split": "all"}, "memory": False},
    }  # fmt: skip
    result = compress.run(recipe, tmp_path / "run")
    before, after = result.report.before, result.report.after
    with torch.no_grad():
        logits = vit(pixels(images)).logits
    right = torch.from_numpy(labels)
    among = (logits.topk(5).indices == right[:, None]).any(-1).float().mean()
    scores = before.labels.scores
    assert before.labels.task == "image" and list(scores) == ["accuracy", "top5"]
    assert scores["accuracy"].value == pytest.approx(float((logits.argmax(-1) == right).sum()) / 40)
    assert scores["top5"].value == pytest.approx(float(among))
    loss = torch.nn.functional.cross_entropy(logits, right)
    assert before.labels.loss == pytest.approx(float(loss), rel=1e-5)
    assert before.latency is None and after.latency.prefill_tokens == 17  # patches, and one more
    assert "Top-5 accuracy" in (tmp_path / "run/report.md").read_text()
    # Live, through the processor that loading gives.
    model, processor = compress.load(base)
    rows = [{"image": image, "label": int(y)} for image, y in zip(images, labels, strict=True)]
    compress.apply(model, steps, rows[:8], tokenizer=processor, compute="float32")
    again, _ = compress.load(result.model)
    difference = helpers.difference(again(pixels(images)).logits, model(pixels(images)).logits)
    assert difference < 1e-4
    live = compress.evaluate(model, {"memory": False}, examples=rows, tokenizer=processor)
    assert live.after.labels.predictions == after.labels.predictions
    loaded = AutoModelForImageClassification.from_pretrained(result.model)
    assert loaded.config.intermediate_size == 48


def test_work_of_an_image_is_counted(vit):
    macs = macs_per_token(vit)
    linear = 3 * (4 * 32 * 32 + 2 * 32 * 64)
    assert macs.context == 17 and macs.per_token_and_position == 3 * 2 * 32
    assert macs.per_token == linear + 17 * macs.per_token_and_position
    assert macs.per_sequence == 16 * 4 * 32 + 32 * CLASSES  # patches, labels


def test_fine_tuning_gives_a_head_for_the_images(base, seen, tmp_path):
    images, labels = seen
    # Bright and dark images, told apart within some steps.
    marks = (labels % 2).astype(np.uint8)
    np.savez(tmp_path / "two.npz", x=images // 4 + 160 * marks[:, None, None], y=marks)
    recipe = {
        "model": {"train": {
            "from": str(base), "examples": {"source": str(tmp_path / "two.npz")},
            "training": {"steps": 30, "batch": 16, "learning_rate": 0.003},
        }},
        "evaluation": {"examples": {"source": str(tmp_path / "two.npz"), "split": "all"},
                       "latency": False, "memory": False},
    }  # fmt: skip
    assert compress.plan(recipe).original.labels == 2
    report = compress.run(recipe, tmp_path / "run").report
    assert report.after.labels.scores["accuracy"].value > 0.9
    assert (tmp_path / "run/base" / FILE).is_file()


def test_what_does_not_fit_is_refused(vit, base, seen, arrays, tmp_path):
    processor = ImageProcessor(PROCESSOR)
    examples = load_examples(ExamplesSpec(source=str(arrays)))
    small = ImageProcessor({**PROCESSOR, "size": {"height": 6, "width": 6}})
    with pytest.raises(CompressError, match="8 x 8 pixels"):
        labelled_rows(examples, head_of(vit), small, vit.config, None)
    colours = given_examples([{"image": np.zeros((8, 8, 3), np.uint8), "label": 0}])
    with pytest.raises(CompressError, match="images of 1 channel"):
        labelled_rows(colours, head_of(vit), processor, vit.config, None)
    texts = given_examples([{"text": "a stone", "label": 0}])
    with pytest.raises(CompressError, match="labelled images"):
        labelled_rows(texts, head_of(vit), processor, vit.config, None)
    with pytest.raises(CompressError, match="from 0 to 1"):
        picture(np.full((4, 4), 7.5))
    (tmp_path / "one.png").write_bytes(b"no image")
    with pytest.raises(CompressError, match=r"Pillow|decoded"):
        picture(tmp_path / "one.png")
    bare = tmp_path / "bare"
    vit.save_pretrained(bare)
    section = {"examples": {"source": str(arrays), "split": "all"}}
    with pytest.raises(CompressError, match=FILE):
        compress.plan({"model": str(bare), "evaluation": section})
    with pytest.raises(CompressError, match="Use evaluation.examples"):
        compress.plan({"model": str(base), "evaluation": {"text": {"source": str(arrays)}}})
