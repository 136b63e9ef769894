"""Recipes that train masked generators: on text, on images, from a model that exists."""

from __future__ import annotations

import gzip
import json

import pytest
import torch

from compress.cli.app import main
from compress.data.codebook import load_codebook
from compress.data.images import ImageSpec, load_images
from compress.engine.runner import run
from compress.errors import CompressError
from compress.generators import Denoiser, MaskedGeneration, SamplerOptions, sample
from compress.models.sources.source import load_config, load_model, load_tokenizer
from compress.planning.planner import plan
from compress.planning.recipe import parse_recipe
from compress.train import Moment
from compress.train.create.create import create, draft
from compress.train.create.masked import MaskedObjective
from compress.train.create.spec import Objective, TrainSpec


def make(section, tmp_path, name="model", **more):
    spec = TrainSpec.model_validate(section)
    return create(spec, tmp_path / name, tmp_path / f"{name}-work", **more).folder


def losses(folder):
    return [json.loads(s)["loss"] for s in (folder / "training.jsonl").read_text().splitlines()]


def test_text_gives_a_masked_generator_with_its_tokenizer(sections, tmp_path):
    folder = make(sections.masked(), tmp_path)
    model, (tokenizer, _) = load_model(folder), load_tokenizer(folder)
    spec = MaskedGeneration.of(model)
    assert spec.mask_id == tokenizer.mask_token_id == 258 and spec.vocabulary == 256
    assert (spec.weighting, spec.schedule) == ("mdlm", "linear")
    found = losses(folder)
    assert sum(found[-4:]) < 0.9 * sum(found[:4])
    made = sample(Denoiser(model), SamplerOptions(steps=4), count=2, length=8)
    assert int(made.tokens.max()) < 256 and tokenizer.decode(made.tokens[0].tolist()) is not None


def test_a_causal_architecture_becomes_bidirectional(sections, tmp_path):
    model = load_model(make(sections.masked(architecture=sections.llama), tmp_path))
    assert model.config.is_causal is False
    ids = torch.arange(16)[None].repeat(2, 1)
    ids[1, -1] = 99
    with torch.no_grad():
        logits = model(input_ids=ids).logits[:, 0]
    assert not torch.allclose(logits[0], logits[1], atol=1e-5)


def test_digits_give_a_class_conditional_generator_with_its_codebook(sections, tmp_path):
    folder = make(sections.digits(), tmp_path)
    model, codebook = load_model(folder), load_codebook(folder)
    spec = MaskedGeneration.of(model)
    assert (spec.condition.offset, spec.condition.null, spec.mask_id) == (16, 26, 27)
    assert spec.grid == codebook.grid == (4, 4) and spec.length == 16
    made = sample(Denoiser(model), SamplerOptions(steps=4, guidance=1.0), classes=[3, 7])
    assert codebook.decode(made.tokens).shape == (2, 8, 8)
    held_out = codebook.rows(load_images(ImageSpec(split="test")))
    assert held_out.shape == (359, 17) and int(held_out[:, 0].min()) == 16


def test_a_run_on_digits_compresses_with_images_as_calibration(sections, tmp_path):
    recipe = parse_recipe(
        {
            "model": {"train": sections.digits()},
            "calibration": {"images": {"source": "digits"}, "samples": 16, "length": 17},
            "steps": [{"method": "wanda", "sparsity": 0.5}],
        }
    )
    before = plan(recipe)
    result = run(recipe, tmp_path / "run")
    assert before.original.parameters == plan(recipe).original.parameters
    assert load_codebook(result.model).digest == load_codebook(tmp_path / "run" / "base").digest
    assert MaskedGeneration.of(load_config(result.model)).grid == (4, 4)


def test_a_generator_of_images_is_evaluated_by_itself(
    sections, tmp_path, capsys, memory_unmeasured
):
    folder = make(sections.digits(), tmp_path)
    with pytest.raises(SystemExit, match="0"):
        main(["evaluate", str(folder), "--images", "digits", "--samples", "8", "--json"])
    found = json.loads(capsys.readouterr().out)["after"]["generator"]
    assert found["likelihood"]["nats"] > 0
    assert 0 <= found["generation"]["points"][0]["images"]["accuracy"] <= 1


def test_the_plan_of_images_reads_none_but_looks_whether_they_are_there(sections):
    absent = sections.digits(images={"source": "no-such-folder", "codes": 32})
    with pytest.raises(CompressError, match="no-such-folder"):
        plan(parse_recipe({"model": {"train": absent}, "steps": ["magnitude"]}))
    section = sections.digits(images={"source": "digits", "codes": 32})
    made = plan(parse_recipe({"model": {"train": section}, "steps": ["magnitude"]}))
    assert load_config(made.source.folder).vocab_size == 32 + 10 + 2


def test_a_model_that_exists_is_adapted_to_all_ratios(sections, checkpoint, text, tmp_path):
    source = checkpoint("bert")
    section = {
        "from": str(source),
        "objective": {"kind": "masked", "weighting": "maskgit"},
        "text": {"source": str(text)},
        "packing": "documents",
        "length": 32,
        "training": {"steps": 3, "batch": 2},
    }
    folder = make(section, tmp_path)
    old, new = load_model(source), load_model(folder)
    assert not torch.equal(old.bert.embeddings.word_embeddings.weight,
                           new.bert.embeddings.word_embeddings.weight)  # fmt: skip
    tokenizer, _ = load_tokenizer(folder)
    spec = MaskedGeneration.of(new)
    assert spec.mask_id == tokenizer.mask_token_id
    assert tokenizer.pad_token_id in spec.forbidden
    assert draft(TrainSpec.model_validate(section)).folder == source.resolve()


def test_padding_is_neither_masked_nor_read(tiny):
    model = tiny("bert")
    MaskedGeneration(mask_id=258, vocabulary=256).store(model.config)
    objective = MaskedObjective(model, Objective(kind="masked", ratios="beta:12,3"))
    ids = torch.randint(256, (1, 12), generator=torch.Generator().manual_seed(0))
    found = []
    for filler in (256, 257):  # two ids that are never produced
        padded = torch.cat([ids, torch.full((1, 4), filler)], dim=1)
        batch = {"input_ids": padded, "attention_mask": (padded < 256).long()}
        with torch.no_grad():
            found.append(objective(model, batch, Moment(0, 10, 0))[0])
    assert torch.allclose(*found)
    batch["attention_mask"] = torch.ones_like(padded)
    with torch.no_grad():
        assert not torch.allclose(objective(model, batch, Moment(0, 10, 0))[0], found[0])


def test_dropped_classes_follow_the_option(sections, tmp_path):
    folder = make(sections.digits(), tmp_path)
    model, codebook = load_model(folder), load_codebook(folder)
    rows = codebook.rows(load_images("digits"))[:32]
    seen = []
    model.register_forward_pre_hook(
        lambda _m, _a, kwargs: seen.append(kwargs["input_ids"][:, 0]), with_kwargs=True
    )
    for share in (0.0, 1.0):
        objective = MaskedObjective(
            model, Objective(kind="masked", weighting="maskgit", drop_condition=share)
        )
        objective(model, {"input_ids": rows}, Moment(0, 10, 0))
    assert torch.equal(seen[0], rows[:, 0]) and bool((seen[1] == codebook.no_class).all())


def idx(path, array):
    head = bytes((0, 0, 8, array.dim()))
    sizes = b"".join(int(n).to_bytes(4, "big") for n in array.shape)
    path.write_bytes(gzip.compress(head + sizes + array.to(torch.uint8).numpy().tobytes()))


@pytest.fixture
def data_root(tmp_path):
    """Two classes of 6x4 images in MNIST's files, below a data root."""
    folder = tmp_path / "data" / "tiles"
    folder.mkdir(parents=True)
    labels = torch.arange(40) % 2
    pixels = (labels[:, None, None] * 200 + torch.arange(40)[:, None, None]).expand(40, 6, 4)
    for prefix, part in (("train", slice(0, 30)), ("t10k", slice(30, 40))):
        idx(folder / f"{prefix}-images-idx3-ubyte.gz", pixels[part])
        idx(folder / f"{prefix}-labels-idx1-ubyte.gz", labels[part])
    return tmp_path / "data"


def test_images_from_a_data_root(sections, data_root, tmp_path):
    images = {"source": "tiles", "patch": [3, 2], "codes": 64, "classes": 2}
    folder = make(sections.digits(images=images), tmp_path, data_root=data_root)
    codebook = load_codebook(folder)
    test = load_images(ImageSpec(source="tiles", split="test"), data_root)
    # 30 images of one grey level each: fewer patches than codes, so nothing is lost.
    assert codebook.codes == 30 and codebook.slots == 64 and codebook.grid == (2, 2)
    train = load_images("tiles", data_root)
    assert torch.allclose(codebook.decode(codebook.encode(train.pixels)), train.pixels)
    assert float((codebook.decode(codebook.rows(test)) - test.pixels).abs().max()) < 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": {"patch": 3}}, "divide 8x8"),
        ({"images": {"classes": 4}}, "at most 4 classes"),
        ({"images": {"source": "nowhere"}}, "'digits' or a folder"),
    ],
)
def test_images_that_do_not_fit(sections, tmp_path, change, message):
    with pytest.raises(CompressError, match=message):
        make(sections.digits(**change), tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objective": "causal"}, "objective masked with images"),
        ({"length": 17}, "the patch gives the length"),
        ({"tokenizer": "bytes"}, "tokenizer"),
        ({"images": {"code": 3}}, "Did you mean 'codes'"),
    ],
)
def test_sections_of_images_that_do_not_parse(sections, change, message):
    with pytest.raises(CompressError, match=message):
        parse_recipe({"model": {"train": sections.digits(**change)}})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"calibration": {"images": {}, "text": {"source": "a"}}},
            "one of text, images and examples",
        ),
        (
            {"evaluation": {"images": {}, "text": {"source": "a"}}},
            "one of text, images and examples",
        ),
        ({"evaluation": {"images": {"sourc": "digits"}}}, "Did you mean 'source'"),
    ],
)
def test_data_is_either_text_or_images(sections, change, message):
    with pytest.raises(CompressError, match=message):
        parse_recipe({"model": {"train": sections.digits()}, **change})


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ({"ratios": "unifrom"}, "Did you mean 'uniform'"),
        ({"schedule": "cosin"}, "cosine"),
    ],
)
def test_laws_that_do_not_exist_are_refused_by_the_plan(sections, objective, message):
    section = sections.masked() | {"objective": {"kind": "masked", **objective}}
    with pytest.raises((CompressError), match=message):
        plan(parse_recipe({"model": {"train": section}}))
