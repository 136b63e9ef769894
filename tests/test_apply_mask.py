"""A mask file on base weights: the model the run wrote, or a refusal before anything is written."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import compress
from compress.checkpoint.config import read_records
from compress.checkpoint.mask_file import (
    PackedPattern,
    base_digest,
    load_masks,
    mask_layout,
    mask_names,
    read_mask,
    save_masks,
)
from compress.cli.app import main
from compress.errors import CompressError
from compress.linear.matrix import matrix
from compress.models.anatomy import anatomy_of


@pytest.fixture(scope="module")
def pruned(checkpoint, helpers, tmp_path_factory):
    """``pruned(family, pattern)``: a run that masked the tiny model by magnitude."""
    made: dict[tuple[str, str], SimpleNamespace] = {}

    def get(family: str, pattern: str = "2:4", **options) -> SimpleNamespace:
        key = (family, pattern + str(options))
        if key not in made:
            steps = [{"method": "magnitude", "pattern": pattern, **options}]
            out = tmp_path_factory.mktemp("pruned")
            run = compress.run(helpers.recipe(checkpoint(family), steps), out)
            masks = Path(run.model) / "masks.safetensors"
            made[key] = SimpleNamespace(model=Path(run.model), masks=masks)
        return made[key]

    return get


def opened(folder, family, helpers):
    return helpers.auto(family).from_pretrained(folder)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "albert"])
def test_gives_the_model_that_the_run_wrote(family, pruned, checkpoint, helpers, tmp_path):
    run = pruned(family)
    base = checkpoint(family)
    made = compress.apply_mask(run.masks, base, tmp_path / "out")
    assert made.base == "same" and set(made.patterns) == {"2:4"} and made.dense == 0
    written, expected = helpers.weights(made.folder), helpers.weights(run.model)
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[n], expected[n]) for n in expected)
    assert (made.folder / "config.json").read_text() == (run.model / "config.json").read_text()
    assert (made.folder / "masks.safetensors").read_bytes() == run.masks.read_bytes()
    assert (made.folder / "tokenizer.json").exists()


def test_kept_weights_are_bitwise_the_base_and_the_rest_is_positive_zero(
    pruned, checkpoint, helpers, tmp_path
):
    run = pruned("gpt2")
    compress.apply_mask(run.masks, checkpoint("gpt2"), tmp_path / "out")
    base = opened(checkpoint("gpt2"), "gpt2", helpers)
    model = opened(tmp_path / "out", "gpt2", helpers)
    for name, mask in load_masks(run.masks):
        path = name.removesuffix(".weight")
        weight = matrix(model.get_submodule(path))
        original = matrix(base.get_submodule(path))
        assert torch.equal(weight[mask], original[mask])
        assert not weight[~mask].signbit().any() and not weight[~mask].any()


def test_swapping_masks_on_one_base(pruned, checkpoint, helpers, tmp_path):
    """Another file on the same base is the other model, whichever came first."""
    for number, pattern in enumerate(["2:4", "1:4", "2:4"]):
        run = pruned("llama", pattern)
        made = compress.apply_mask(run.masks, checkpoint("llama"), tmp_path / str(number))
        expected = helpers.weights(run.model)
        assert all(torch.equal(t, expected[n]) for n, t in helpers.weights(made.folder).items())


def test_some_linears_only_and_later_steps_know_the_zeros(
    pruned, checkpoint, helpers, text, tmp_path
):
    run = pruned("llama", include=("*mlp*",))
    made = compress.apply_mask(run.masks, checkpoint("llama"), tmp_path / "out")
    assert made.dense == 12 and made.patterns == {"2:4": 9}
    steps = [{"method": "gptq", "bits": 4, "group_size": 16}]
    after = compress.run(helpers.recipe(made.folder, steps, text), tmp_path / "run")
    model, _ = compress.load(after.model)
    helpers.logits(model, torch.ones(1, 4, dtype=torch.long))  # unpacks the weights
    weight = model.model.layers[0].mlp.up_proj.weight
    assert int((weight != 0).reshape(-1, 4).sum(1).max()) <= 2


def test_several_files_as_the_base(pruned, tiny, tokenizer, helpers, tmp_path):
    """Shards, and a dtype of its own; the digest of other files is another."""
    model = tiny("llama").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "base", max_shard_size="40kB")
    assert len(list((tmp_path / "base").glob("model-*.safetensors"))) > 1
    with pytest.raises(CompressError, match="--any-base"):
        compress.apply_mask(pruned("llama").masks, tmp_path / "base", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    made = compress.apply_mask(
        pruned("llama").masks, tmp_path / "base", tmp_path / "out", any_base=True
    )
    assert made.base == "other"
    weights = helpers.weights(made.folder)
    expected = helpers.weights(pruned("llama").model)
    assert all(t.dtype == torch.bfloat16 for t in weights.values())
    assert all(torch.equal(t, expected[n].bfloat16()) for n, t in weights.items())


def test_masked_base_is_refused_unless_its_zeros_are_a_subset(pruned, helpers, tmp_path):
    wide, narrow = pruned("llama", "2:4"), pruned("llama", "1:4")
    with pytest.raises(CompressError, match="original weights"):
        compress.apply_mask(wide.masks, narrow.model, tmp_path / "out")
    for any_sidecar in (True, False):
        base = tmp_path / f"narrow-{any_sidecar}"
        shutil.copytree(narrow.model, base)
        if not any_sidecar:
            (base / "masks.safetensors").unlink()
        with pytest.raises(CompressError, match="cannot be filled again"):
            compress.apply_mask(wide.masks, base, tmp_path / "out", any_base=True)
    assert not (tmp_path / "out").exists()
    # By magnitude, the one kept weight of 1:4 is among the two of 2:4.
    made = compress.apply_mask(narrow.masks, wide.model, tmp_path / "out", any_base=True)
    expected = helpers.weights(narrow.model)
    assert all(torch.equal(t, expected[n]) for n, t in helpers.weights(made.folder).items())


def test_base_pruned_by_somebody_else_is_noticed(pruned, own_checkpoint, tmp_path):
    """No record in the config, no sidecar: the zeros themselves tell."""
    base = own_checkpoint("llama")
    tensors = load_file(base / "model.safetensors")
    name = next(n for n in tensors if "up_proj" in n)
    tensors[name][:, ::2] = 0
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CompressError, match="cannot be filled again"):
        compress.apply_mask(pruned("llama").masks, base, tmp_path / "out", any_base=True)


def masks_of(folder, layout, digest=""):
    """A mask file with the first N of every M kept."""
    layout = {n: (PackedPattern.parse(p), shape) for n, (p, shape) in layout.items()}

    def kept(pattern, shape):
        group = torch.arange(shape[1]) % pattern.m < pattern.n
        return group.expand(shape)

    return save_masks(folder, layout, ((n, kept(*v)) for n, v in layout.items()), digest)


UP = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"model.layers.9.mlp.up_proj.weight": ("2:4", (64, 32))}, "linears inside the blocks"),
        ({UP: ("2:4", (64, 32)), "lm_head.weight": ("2:4", (264, 32))}, "linears inside"),
        ({UP: ("2:4", (32, 64))}, r"shape \[64, 32\]"),
        ({}, "a file with masks"),
    ],
)
def test_masks_of_another_model_are_refused(layout, message, checkpoint, tmp_path):
    path = masks_of(tmp_path / "masks", layout)
    with pytest.raises(CompressError, match=message):
        compress.apply_mask(path, checkpoint("llama"), tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["masks"]


def test_masks_of_a_shallower_model_are_refused(checkpoint, helpers, tmp_path):
    """After a block has gone the names are those of other blocks."""
    steps = [{"method": "shortgpt", "remove": 1}, {"method": "magnitude", "pattern": "2:4"}]
    calibrated = {"text": {"source": "python:pydoc_data.topics"}, "samples": 2, "length": 16}
    recipe = helpers.recipe(checkpoint("llama"), steps, calibration=calibrated)
    run = compress.run(recipe, tmp_path / "run")
    with pytest.raises(CompressError, match="3 blocks"):
        compress.apply_mask(run.model, checkpoint("llama"), tmp_path / "out", any_base=True)


def test_factors_of_a_low_rank_base(checkpoint, helpers, tmp_path):
    """Its linears are the factors; the checkpoint keeps the type of its own."""
    svd = {"method": "svd", "rank": 8}
    base = compress.run(helpers.recipe(checkpoint("llama"), [svd]), tmp_path / "base").model
    steps = [{"method": "magnitude", "pattern": "2:4"}]
    run = compress.run(helpers.recipe(base, steps), tmp_path / "run")
    made = compress.apply_mask(run.model, base, tmp_path / "out")
    assert made.base == "same" and made.patterns == {"2:4": 42} and made.dense == 0
    expected = helpers.weights(run.model)
    assert all(torch.equal(t, expected[n]) for n, t in helpers.weights(made.folder).items())
    assert (made.folder / "config.json").read_text() == (run.model / "config.json").read_text()


def test_bad_files_and_folders(checkpoint, pruned, tmp_path, helpers):
    run = pruned("llama")
    with pytest.raises(CompressError, match="a mask file"):
        compress.apply_mask(tmp_path / "none", checkpoint("llama"), tmp_path / "out")
    (tmp_path / "masks.safetensors").write_bytes(run.masks.read_bytes()[:-40])
    with pytest.raises(CompressError, match="readable mask file"):
        compress.apply_mask(tmp_path, checkpoint("llama"), tmp_path / "out")
    with pytest.raises(CompressError, match="masks without it"):
        read_mask(run.masks, "model.layers.0.mlp.up_projection.weight")
    with pytest.raises(CompressError, match="empty output folder"):
        compress.apply_mask(run.masks, checkpoint("llama"), run.model)
    rtn = {"method": "rtn", "bits": 4, "group_size": 16}
    rounded = compress.run(helpers.recipe(checkpoint("llama"), [rtn]), tmp_path / "rounded").model
    with pytest.raises(CompressError, match="not quantised"):
        compress.apply_mask(run.masks, rounded, tmp_path / "out", any_base=True)


def test_reading_by_name(pruned):
    masks = pruned("gpt2").masks
    assert len(base_digest(masks)) == 64
    names = mask_names(masks)
    assert len(names) == 12 and names == [n for n, _ in load_masks(masks)]
    info = mask_layout(masks)["transformer.h.1.mlp.c_fc.weight"]
    assert (str(info.pattern), info.shape) == ("2:4", (64, 32))  # [out, in], though a Conv1D
    mask = read_mask(masks, "transformer.h.1.mlp.c_fc.weight")
    assert mask.shape == (64, 32) and bool((mask.view(-1, 4).sum(1) == 2).all())


def test_file_without_a_digest_and_the_command_line(checkpoint, tmp_path, capsys):
    path = masks_of(tmp_path / "masks", {UP: ("2:4", (64, 32))})
    out = tmp_path / "deep" / "out"
    with pytest.raises(SystemExit) as leave:
        main(["apply-mask", str(path), str(checkpoint("llama")), "--out", str(out)])
    assert leave.value.code == 0
    said = capsys.readouterr().out
    assert "1 linears to 2:4; 20 linears" in said and "does not say" in said
    model, tokenizer = compress.load(out)
    assert tokenizer is not None
    kept = model.get_submodule(UP.removesuffix(".weight")).weight != 0
    assert kept.reshape(-1, 4).float().mean(0).tolist() == [1, 1, 0, 0]
    records = read_records(model.config, anatomy_of(model).family, 3)
    assert [r.zeros for r in records] == [{"mlp.up_proj": "2:4"}, {}, {}]


def test_a_full_disk_leaves_nothing(pruned, checkpoint, tmp_path, monkeypatch):
    import compress.checkpoint.apply_mask as module

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.shutil, "copyfile", full)
    with pytest.raises(CompressError, match="No space left"):
        compress.apply_mask(pruned("llama").masks, checkpoint("llama"), tmp_path / "out")
    assert not list(tmp_path.iterdir())
