"""What a plan refuses before any work: data, tasks, patterns and lengths."""

from __future__ import annotations

import json

import pytest

import compress
from compress.errors import CompressError
from compress.eval.quality.task_names import check_task_names
from compress.eval.spec import LatencySpec


@pytest.fixture
def recipe(checkpoint, text):
    """``recipe(section={...})``: a good recipe with some sections exchanged."""

    def make(kind: str = "llama", **sections):
        good = {
            "model": str(checkpoint(kind)),
            "calibration": {"text": {"source": str(text)}, "samples": 4, "length": 16},
            "steps": [{"method": "wanda", "pattern": "2:4"}],
        }
        return {**good, **sections}

    return make


def text_of(source, **fields):
    return {"text": {"source": str(source), **fields}, "samples": 4, "length": 16}


def wanda(**options):
    return [{"method": "wanda", "pattern": "2:4", **options}]


REFUSED = {
    "no such file": ({"calibration": text_of("nowhere.txt")}, "nowhere.txt"),
    "no such module": ({"calibration": text_of("python:nothing")}, "standard library"),
    "no data set's name": ({"calibration": text_of("a/b/c/d")}, "owner/name"),
    "images for text": (
        {"calibration": {"images": {"source": "digits"}, "samples": 4}}, "calibration.text",
    ),
    "too long": ({"calibration": {**text_of(__file__), "length": 129}}, "128, the model's"),
    "too many": ({"calibration": {**text_of("{text}"), "samples": 10**9}}, "bytes"),
    "evaluated on nothing": ({"evaluation": {"text": {"source": "gone.txt"}}}, "gone.txt"),
    "no such images": ({"evaluation": {"images": {"source": "gone"}}}, "evaluation"),
    "no such task": ({"evaluation": {"tasks": ["hellaswagg"]}}, "Did you mean 'hellaswag'"),
    "a long window": (
        {"evaluation": {"text": {"source": "{text}"}, "window": 129}}, "evaluation.window",
    ),
    "gaps": (
        {"evaluation": {"text": {"source": "{text}"}, "window": 16, "stride": 17}}, "stride",
    ),
    "a long prefill": (
        {"evaluation": {"tasks": ["arc_easy"], "latency": {"prefill_tokens": 128}}},
        "128 positions",
    ),
    "include": ({"steps": wanda(include=["*", "*.qproj"])}, "include.*Did you mean 'q_proj'"),
    "exclude": ({"steps": wanda(exclude=["re:upproj$"])}, "exclude.*Did you mean 'up_proj'"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_late_refusals_come_early(recipe, text, what):
    sections, message = REFUSED[what]
    sections = json.loads(json.dumps(sections).replace("{text}", str(text)))
    with pytest.raises(CompressError, match=message):
        compress.plan(recipe(**sections))


def test_a_head_may_be_excluded(recipe):
    assert compress.plan(recipe(steps=wanda(exclude=["lm_head", "*.k_proj"]))).steps


def test_live_models_meet_the_same_checks(tiny, tokens):
    with pytest.raises(CompressError, match="Did you mean 'q_proj'"):
        compress.apply(tiny("llama"), wanda(include=["*", "*.qproj"]), tokens)


def test_a_model_of_images_answers_examples_only(recipe, tiny, tokenizer, tmp_path):
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                       num_attention_heads=2, image_size=8, patch_size=4)  # fmt: skip
    ViTForImageClassification(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    made = recipe(model=str(tmp_path), evaluation={"tasks": ["arc_easy"]})
    with pytest.raises(CompressError, match="examples to evaluate a model with a head of labels"):
        compress.plan(made)


def test_a_data_root_is_asked_and_a_silent_hub_is_a_warning(recipe, tmp_path):
    made = recipe(calibration=text_of("some/texts"))
    assert "hub did not answer" in " ".join(compress.plan(made).warnings)
    (tmp_path / "some" / "texts").mkdir(parents=True)
    (tmp_path / "some" / "texts" / "train.txt").write_text("words " * 100)
    assert "hub" not in " ".join(compress.plan(made, data_root=tmp_path).warnings)
    with pytest.raises(CompressError, match="data root"):
        compress.plan(made, data_root=tmp_path / "gone")


def test_default_latency_is_shortened_to_the_positions(recipe, text):
    evaluation = {"text": {"source": str(text)}, "window": 32}
    warnings = compress.plan(recipe(evaluation=evaluation)).warnings
    assert any("a prefill of 96 tokens and 32 decoded ones" in w for w in warnings)
    for given, positions, decodes, expected in (
        ({}, 2048, True, (512, 32)),
        ({}, None, True, (512, 32)),
        ({}, 256, True, (224, 32)),
        ({}, 20, True, (15, 5)),
        ({}, 130, False, (126, 32)),
        ({"prefill_tokens": 250}, 256, True, (250, 6)),
        ({"decode_tokens": 100}, 256, True, (156, 100)),
    ):
        fits = LatencySpec(**given).within(positions, decodes)
        assert (fits.prefill_tokens, fits.decode_tokens) == expected
    for given in ({"prefill_tokens": 257}, {"decode_tokens": 256}):
        with pytest.raises(CompressError, match="256 positions"):
            LatencySpec(**given).within(256, True)


def test_tasks_groups_and_tags_are_known():
    check_task_names(["hellaswag", "mmlu", "ai2_arc", "arc_easy", "lambada"])
    for name in ("../../etc/passwd", "evil_task"):
        with pytest.raises(CompressError, match="lm-eval task"):
            check_task_names([name])
