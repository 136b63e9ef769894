"""Recipes: what is refused, with which hint; overrides; names, paths, YAML."""

from __future__ import annotations

import pytest
import yaml

from compress.errors import CompressError
from compress.planning.recipe import parse_recipe, parse_size, read_recipe
from compress.planning.recipe_files import find_recipe, shipped_recipes

TEXT = {"source": "words.txt"}
FULL = {
    "version": 1,
    "name": "full",
    "model": {"source": "some/model", "revision": "abc"},
    "seed": 3,
    "calibration": {"text": TEXT, "samples": 4, "length": 16},
    "steps": [{"method": "wanda", "pattern": "2:4"}, "magnitude"],
    "evaluation": {"text": TEXT, "window": 16, "latency": {"repeats": 3}},
    "output": {"dtype": "bfloat16", "max_shard_size": "1GB"},
}


def edited(path: str, value) -> dict:
    data = yaml.safe_load(yaml.safe_dump(FULL))
    if path.startswith("steps.") and path.count(".") == 1:
        return {**data, "steps": [value]}
    *parents, last = path.split(".")
    target = data
    for part in parents:
        target = target[int(part)] if isinstance(target, list) else target[part]
    target[last] = value
    return data


@pytest.mark.parametrize(
    ("place", "hint"),
    [
        ("modle", "model"),
        ("model.sorce", "source"),
        ("calibration.sampels", "samples"),
        ("calibration.text.splitt", "split"),
        ("steps.0.patern", "pattern"),
        ("evaluation.windw", "window"),
        ("evaluation.text.sourc", "source"),
        ("evaluation.latency.repeat", "repeats"),
        ("output.dtyp", "dtype"),
    ],
)
def test_unknown_key_proposes_the_closest(place, hint):
    with pytest.raises(CompressError) as caught:
        parse_recipe(edited(place, 1), "my.yaml")
    message = str(caught.value)
    assert place.rpartition(".")[2] in message and f"'{hint}'" in message
    assert "Did you mean" in message and "my.yaml" in message and "\n" not in message


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        ("version", 2, ["version"]),
        ("seed", "many", ["seed", "integer", "'many'"]),
        ("model", 3, ["model"]),
        ("calibration", "text", ["calibration"]),
        ("calibration.samples", 0, ["calibration.samples", "greater than 0"]),
        ("calibration.selection", "tail", ["head", "random"]),
        ("calibration.text.part", "middle", ["head:F"]),
        ("steps", "wanda", ["list"]),
        ("steps.0", 3, ["method: NAME"]),
        ("steps.0.method", "wandda", ["steps.0", "'wanda'"]),
        ("steps.0.pattern", "3:2", ["N:M", "'3:2'"]),
        ("steps.0.sparsity", 0.5, ["leave sparsity out"]),
        ("evaluation.window", "wide", ["window"]),
        ("evaluation.latency", "often", ["latency"]),
        ("output.dtype", "int4", ["float32"]),
        ("output.max_shard_size", "big", ["512MB"]),
    ],
)
def test_wrong_value(place, value, words):
    with pytest.raises(CompressError) as caught:
        parse_recipe(edited(place, value))
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("data", [None, [], "wanda", 3])
def test_not_a_mapping(data):
    with pytest.raises(CompressError, match="a mapping"):
        parse_recipe(data)


def test_dump_parses_to_the_same_recipe():
    recipe = parse_recipe(FULL)
    assert [s.name for s in recipe.steps] == ["wanda", "magnitude"]
    again = parse_recipe(yaml.safe_load(recipe.to_yaml()))
    assert again.dump() == recipe.dump() and again.steps == recipe.steps


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**FULL, "model": "some/model"}))
    return path


def test_overrides(file):
    recipe = read_recipe(
        file,
        [
            "steps.0.pattern=4:8",
            "seed=7",
            "model.revision=main",
            "calibration.text.split=test",
            "output.dtype=null",
            "evaluation.latency=false",
            "steps.1={method: rtn, bits: 3}",
        ],
    )
    assert recipe.steps[0].pattern == "4:8" and recipe.steps[1].bits == 3
    assert recipe.model.source == "some/model" and recipe.model.revision == "main"
    assert (recipe.seed, recipe.output.dtype) == (7, None)
    assert recipe.calibration.text.split == "test" and recipe.evaluation["latency"] is False


def test_override_makes_a_section_that_was_not_there(tmp_path):
    path = tmp_path / "short.yaml"
    path.write_text("model: some/model\n")
    recipe = read_recipe(path, ["calibration.text.source=words.txt", "model=other/model"])
    assert recipe.calibration.text.source == "words.txt"
    assert recipe.model.source == "other/model"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("seed", "KEY.PATH=VALUE"),
        ("=3", "KEY.PATH=VALUE"),
        ("steps.2.pattern=2:4", "index from 0 to 1"),
        ("steps.x.pattern=2:4", "index from 0 to 1"),
        ("seed.deep.er=1", "name a place"),
        ("steps.0.patern=2:4", "'pattern'"),
        ("seed=[1", "--set"),
    ],
)
def test_bad_override(file, override, words):
    with pytest.raises(CompressError, match=words.replace("[", r"\[")):
        read_recipe(file, [override])


def test_expected_figures_are_checked_when_the_recipe_is_read(file):
    stated = "expected={original.perplexity: {value: 23.9, within: 0.1}}"
    recipe = read_recipe(file, [stated])
    assert recipe.expected["original.perplexity"].within == 0.1
    assert parse_recipe(recipe.dump()) == recipe
    for wrong, words in (
        ("expected={perplexty: {value: 1, within: 0}}", "perplexity"),
        ("expected={tasks.piqa.acc: {value: 1, within: 0}}", "a figure of the report"),
        ("expected={perplexity: {value: 1}}", "within"),
        ("expected={perplexity: {value: .nan, within: 0}}", "number"),
    ):
        with pytest.raises(CompressError, match=words):
            read_recipe(file, [wrong])
    with pytest.raises(CompressError, match="an evaluation that measures"):
        read_recipe(file, [stated, "evaluation=null"])


def test_yaml_that_does_not_parse(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("model: [unclosed\nsteps: }")
    with pytest.raises(CompressError, match="bad.yaml: expected a YAML file"):
        read_recipe(path)


def test_binary_file(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_bytes(b"\xff\xfe\x00model")
    with pytest.raises(CompressError, match="a YAML file"):
        read_recipe(path)


def test_empty_file_with_overrides(tmp_path):
    path = tmp_path / "empty.yaml"
    path.write_text("")
    with pytest.raises(CompressError):
        read_recipe(path, ["seed=1"])


def test_yaml_is_loaded_safely(tmp_path):
    path, made = tmp_path / "evil.yaml", tmp_path / "made"
    path.write_text(f"model: !!python/object/apply:os.mkdir ['{made}']\n")
    with pytest.raises(CompressError, match="a YAML file"):
        read_recipe(path)
    path.write_text("model: some/model\n")
    with pytest.raises((CompressError, yaml.YAMLError)):
        read_recipe(path, [f"seed=!!python/object/apply:os.mkdir ['{made}']"])
    assert not made.exists()


def test_names_and_paths(file):
    assert "quickstart" in shipped_recipes()
    assert find_recipe("quickstart").name == "quickstart.yaml"
    assert find_recipe(file) == file
    with pytest.raises(CompressError, match="Did you mean 'quickstart'"):
        find_recipe("quickstrat")


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_shipped_recipes_parse(name):
    recipe = read_recipe(name)
    assert recipe.steps and recipe.evaluation and recipe.description


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("512MB", 512_000_000),
        ("2GiB", 2 * 2**30),
        ("1.5 GB", 1_500_000_000),
        ("10k", 10_000),
        ("7", 7),
        ("1TB", 10**12),
    ],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "much", "-3MB", "1.2.3GB", "GB", "5PB"])
def test_no_sizes(text):
    with pytest.raises(CompressError, match="a size such as"):
        parse_size(text)


def test_patterns_need_no_quotes(tmp_path):
    """YAML 1.1 reads 2:4 as 124, and 1e-3 as a word."""
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "model: some/model\nseed: 7\nsteps: [{method: sparsegpt, pattern: 2:4, damping: 1e-3}]\n"
    )
    recipe = read_recipe(path)
    assert recipe.steps[0].pattern == "2:4" and recipe.steps[0].damping == 0.001
    assert recipe.seed == 7
