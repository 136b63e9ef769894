"""Bad input to a run: one paragraph, exit status 2, within seconds, nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import compress
from compress.cli.app import main
from compress.system.activations import Activations
from compress.system.shards import ShardWriter

FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def refused(helpers, text, tmp_path, capsys):
    """``refused(source, *words, ...)``: the command fails as it should; returns its message."""

    def call(source: Path | str, *words: str, steps=("wanda",), calibration=None, **more) -> str:
        data = helpers.recipe(source, steps, calibration or text, **more)
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(data))
        before = {p for p in tmp_path.rglob("*") if "run" not in p.relative_to(tmp_path).parts}
        capsys.readouterr()
        start = time.monotonic()
        with pytest.raises(SystemExit) as leave:
            main(["run", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "run"), "-q"])
        assert time.monotonic() - start < 20
        message = capsys.readouterr().err
        assert leave.value.code == 2
        assert message.startswith("error: ") and message.count("\n") == 1, message
        for word in words:
            assert word in message
        assert not (tmp_path / "run" / "model").exists()
        assert not list((tmp_path / "run").rglob("*partial*"))
        assert not list((tmp_path / "run").rglob("*.tmp"))
        after = {p for p in tmp_path.rglob("*") if "run" not in p.relative_to(tmp_path).parts}
        assert after == before
        return message

    return call


def edit_config(folder: Path, **fields) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def change_weights(folder: Path, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def test_missing_shard(tiny, tokenizer, refused, tmp_path):
    tiny("llama").save_pretrained(tmp_path / "source", max_shard_size="40kB")
    tokenizer.save_pretrained(tmp_path / "source")
    shard = sorted((tmp_path / "source").glob("model-*.safetensors"))[1]
    shard.unlink()
    refused(tmp_path / "source", shard.name)


def test_truncated_weights(own_checkpoint, refused):
    folder = own_checkpoint("llama")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refused(folder, "model.safetensors")


def test_corrupt_header(own_checkpoint, refused):
    folder = own_checkpoint("llama")
    path = folder / "model.safetensors"
    path.write_bytes(b"\xff" * 64 + path.read_bytes()[64:])
    refused(folder, "model.safetensors")


def test_config_without_weights(own_checkpoint, refused):
    folder = own_checkpoint("llama")
    (folder / "model.safetensors").unlink()
    refused(folder, "safetensors")


def test_weights_without_config(own_checkpoint, refused):
    folder = own_checkpoint("llama")
    (folder / "config.json").unlink()
    refused(folder, "config.json")


def test_weights_of_another_model(own_checkpoint, refused):
    folder = own_checkpoint("llama")
    edit_config(folder, intermediate_size=80)
    refused(folder, "gate_proj", "[80, 32]", "different models", steps=["magnitude"])


def test_weight_that_is_not_there(own_checkpoint, refused):
    folder = own_checkpoint("llama")
    change_weights(folder, lambda w: w.pop("model.layers.1.mlp.up_proj.weight"))
    refused(folder, "model.layers.1.mlp.up_proj.weight")


@pytest.mark.parametrize("steps", [["wanda"], ["magnitude"], [{"method": "shortgpt", "remove": 1}]])
def test_nan_in_a_block(steps, own_checkpoint, refused):
    folder = own_checkpoint("llama")

    def spoil(weights):
        weights["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")

    change_weights(folder, spoil)
    refused(folder, "model.layers.1.mlp.up_proj.weight", steps=steps)


def test_nan_in_the_embeddings(own_checkpoint, refused):
    folder = own_checkpoint("llama")

    def spoil(weights):
        weights["model.embed_tokens.weight"][:] = float("inf")

    change_weights(folder, spoil)
    refused(folder, steps=["sparsegpt"])


def test_dead_features_are_no_error(own_checkpoint, text, helpers, tmp_path):
    """Constant inputs and neurons that never fire: singular Hessians everywhere."""
    folder = own_checkpoint("opt")

    def silence(weights):
        for name, weight in weights.items():
            if name.endswith("fc1.weight"):
                weight[::2] = 0
            if name.endswith("fc1.bias"):
                weight[::2] = -1

    change_weights(folder, silence)
    steps = [{"method": "sparsegpt", "pattern": "2:4"}, {"method": "gptq", "group_size": 16}]
    result = compress.run(helpers.recipe(folder, steps, text), tmp_path / "run")
    assert all(torch.isfinite(w).all() for w in helpers.weights(result.model).values()
               if w.is_floating_point())  # fmt: skip


@pytest.mark.parametrize(("content", "words"), [("", "something in it"), ("short", "192 tokens")])
def test_text_that_is_not_enough(content, words, checkpoint, refused, tmp_path):
    (tmp_path / "little.txt").write_text(content)
    refused(checkpoint("llama"), words, "bytes", calibration=tmp_path / "little.txt")


def test_text_that_is_not_there(checkpoint, refused, tmp_path):
    refused(checkpoint("llama"), "nowhere.txt", calibration=tmp_path / "nowhere.txt")


def test_sequences_longer_than_the_positions(checkpoint, text, helpers, tmp_path):
    recipe = helpers.recipe(checkpoint("llama"), ["wanda"], text)
    recipe["calibration"]["length"] = 4096
    with pytest.raises(compress.CompressError, match="at most 128"):
        compress.run(recipe, tmp_path / "run")


def test_evaluation_text_shorter_than_a_window(checkpoint, refused, helpers, tmp_path):
    (tmp_path / "little.txt").write_text("A few words only.\nAnd some more.\n" * 3)
    section = helpers.evaluation(tmp_path / "little.txt")
    refused(checkpoint("llama"), "at least one window", evaluation=section)


def test_tokenizer_of_another_model(own_checkpoint, tokenizer, refused):
    folder = own_checkpoint("llama")
    tokenizer_file = json.loads((folder / "tokenizer.json").read_text())
    tokenizer_file["model"]["vocab"]["wide"] = 5000
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_file))
    refused(folder, "vocabulary of 264", "5000")


def test_no_tokenizer(own_checkpoint, refused):
    folder = own_checkpoint("llama")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    refused(folder, "tokenizer")


def test_unknown_family(own_checkpoint, refused):
    folder = own_checkpoint("llama")
    edit_config(folder, model_type="lama")
    refused(folder, "'lama'", "'llama'")


def test_model_without_blocks_of_linears(tmp_path, refused, tokenizer):
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic")
    ResNetForImageClassification(config).save_pretrained(tmp_path / "source")
    tokenizer.save_pretrained(tmp_path / "source")
    refused(tmp_path / "source", "transformer", "ResNet")


def test_state_space_model(checkpoint, refused):
    """No attention, no FFN: what needs them says so."""
    for step in ({"method": "ffn_width", "share": 0.5}, {"method": "head_width", "share": 0.5}):
        refused(checkpoint("mamba"), "mamba", steps=[step])


def test_a_linear_that_is_never_called_has_no_statistics(checkpoint, helpers, text, tiny, tokens):
    """Mamba multiplies by the weights of dt_proj without calling it."""
    for method in ("wanda", "sparsegpt"):
        words = r"0\.mixer\.dt_proj, whose weight a MambaForCausalLM uses.*exclude"
        with pytest.raises(compress.CompressError, match=words):
            compress.plan(helpers.recipe(checkpoint("mamba"), [method], text))
        with pytest.raises(compress.CompressError, match=words):
            compress.apply(tiny("mamba"), [method], tokens)
    step = {"method": "wanda", "exclude": ["*.dt_proj"]}
    compress.plan(helpers.recipe(checkpoint("mamba"), [step], text))
    model = compress.apply(tiny("mamba"), [step], tokens)
    assert float((model.backbone.layers[0].mixer.in_proj.weight == 0).float().mean()) == 0.5


def test_causal_model_in_a_masked_evaluation(checkpoint, refused, helpers, text):
    section = helpers.evaluation(text, objective="masked")
    refused(checkpoint("llama"), "is_causal", evaluation=section)


def test_pickles_are_refused(own_checkpoint, refused):
    folder = own_checkpoint("llama")
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    refused(folder, "pytorch_model.bin", "safetensors")


def test_code_of_the_checkpoint_is_refused(own_checkpoint, refused, tmp_path):
    folder = own_checkpoint("llama")
    made = tmp_path / "made"
    (folder / "modeling_own.py").write_text(f"open({str(made)!r}, 'w')\n")
    classes = {"AutoConfig": "Config", "AutoModelForCausalLM": "Model"}
    auto_map = {auto: f"modeling_own.{name}" for auto, name in classes.items()}
    edit_config(folder, model_type="own", auto_map=auto_map)
    refused(folder, "trust_remote_code: true")
    assert not made.exists()


def test_output_folder_is_not_empty(checkpoint, refused, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    refused(checkpoint("llama"), "--out")
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["thesis.tex"]


def test_device_that_is_not_there(checkpoint, refused):
    refused(checkpoint("llama"), "auto", device="cuda:77")


def full_after(count: int, function):
    """The function, which finds the disk full after so many calls."""
    calls = []

    def filling(*args, **kwargs):
        calls.append(1)
        if len(calls) > count:
            raise FULL
        return function(*args, **kwargs)

    return filling


@pytest.fixture(scope="module")
def whole(checkpoint, text, helpers, tmp_path_factory):
    """A recipe with an evaluation, and the model of a run of it that nothing disturbed."""
    recipe = helpers.recipe(
        checkpoint("llama"), ["wanda"], text, evaluation=helpers.evaluation(text)
    )
    return recipe, compress.run(recipe, tmp_path_factory.mktemp("whole") / "run").model


@pytest.mark.parametrize("place", ["activations", "block", "checkpoint", "journal", "report"])
def test_disk_fills_up_and_is_cleared(place, whole, refused, helpers, tmp_path, monkeypatch):
    recipe, expected = whole
    with monkeypatch.context() as patch:
        if place == "activations":
            patch.setattr(os, "pwrite", full_after(12, os.pwrite))
        elif place == "block":
            patch.setattr("compress.engine.sink.save_file", full_after(1, save_file))
        elif place == "journal":
            patch.setattr("compress.system.files.os.fsync", full_after(5, os.fsync))
        elif place == "report":
            patch.setattr("compress.eval.report.write_text", full_after(1, lambda *_: None))
        else:
            write = ShardWriter.write_bytes

            def full(self, name, pieces):
                if name.endswith("norm.weight"):
                    raise self._translate(FULL)
                write(self, name, pieces)

            patch.setattr(ShardWriter, "write_bytes", full)
        if place == "report":
            with pytest.raises((compress.CompressError, OSError)):
                compress.run(recipe, tmp_path / "run")
        else:
            refused(recipe["model"], evaluation=recipe["evaluation"])
    result = compress.run(recipe, tmp_path / "run")
    assert helpers.contents(result.model) == helpers.contents(expected)
    assert result.report is not None


def test_full_disk_says_what_would_help(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "pwrite", full_after(0, os.pwrite))
    with pytest.raises(compress.CompressError, match="calibration.samples.*same command again"):
        Activations(tmp_path / "a.bin").write(0, torch.zeros(2, 3))


def test_hub_that_cannot_be_reached(tmp_path):
    (tmp_path / "recipe.yaml").write_text("model: some/model\nsteps: [magnitude]\n")
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "compress", "run", str(tmp_path / "recipe.yaml"), "--out",
         str(tmp_path / "run"), "--cache-dir", str(tmp_path / "cache")],
        capture_output=True, text=True,
        env={**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hf")},
    )  # fmt: skip
    assert done.returncode == 2 and time.monotonic() - start < 60
    assert done.stderr.startswith("error: ") and "some/model" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "run" / "model").exists()


def test_page_escapes_what_came_from_outside(own_checkpoint, text, helpers, tmp_path):
    folder = own_checkpoint("llama")
    evil = folder.with_name("<script>alert(1)</script>".replace("/", ""))
    folder.rename(evil)
    attack = "<script>alert(2)</script><img src=x onerror=alert(3)>"
    recipe = helpers.recipe(
        evil, ["magnitude"], evaluation=helpers.evaluation(text), description=attack
    )
    recipe["name"] = attack
    result = compress.run(recipe, tmp_path / "run")
    page = (result.folder / "report.html").read_text()
    assert "alert(1)" in page and "alert(2)" in page
    for tag in ("<script>alert", "<img src=x"):
        assert tag not in page
