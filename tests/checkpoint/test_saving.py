"""``compress.save`` loses no weight and no file, and leaves nothing behind where it fails."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

import compress
from compress import CompressError
from compress.checkpoint.export import companions
from compress.models.loading import load_model, load_tokenizer
from compress.models.sources.convert import find_models
from compress.models.sources.hub import wanted_files
from compress.models.sources.source import Source


@pytest.fixture
def untied(tiny):
    """A model whose head is one of its own, though its config says that it is tied."""
    model = tiny.build("llama", tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() * 2)
    return model


def test_a_head_that_is_tied_by_the_config_alone_is_refused(untied, tmp_path):
    for refused in (
        lambda: compress.save(untied, tmp_path / "out"),
        lambda: compress.apply(untied, ["magnitude"]),
    ):
        with pytest.raises(CompressError, match=r"lm_head\.weight .*tie_word_embeddings = False"):
            refused()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("own", [True, False])
def test_a_head_that_the_config_does_not_tie_is_saved(untied, tiny, helpers, tmp_path, own):
    model = untied if own else tiny.build("llama", tie_word_embeddings=True)
    model.config.tie_word_embeddings = False
    compress.save(model, tmp_path / "out")
    again, _ = compress.load(tmp_path / "out")
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= helpers.weights(
        tmp_path / "out"
    ).keys()
    assert again.lm_head.weight is not again.model.embed_tokens.weight
    torch.testing.assert_close(tiny.logits(again), tiny.logits(model))


def test_a_head_that_is_tied_again_is_stored_once(untied, helpers, tmp_path):
    untied.tie_weights()
    compress.save(untied, tmp_path / "again")
    assert "lm_head.weight" not in helpers.weights(tmp_path / "again")


def test_a_head_that_shares_the_memory_is_tied(tiny, helpers, tmp_path):
    model = tiny.build("llama", tie_word_embeddings=True)
    model.lm_head.weight = nn.Parameter(model.model.embed_tokens.weight.data)
    compress.save(model, tmp_path / "out")
    assert "lm_head.weight" not in helpers.weights(tmp_path / "out")


class Broken:
    def save_pretrained(self, folder):
        (folder / "vocab.txt").write_text("half")
        raise KeyError("no vocabulary")


def test_nothing_is_left_of_what_cannot_be_saved(tiny, tokenizer, tmp_path):
    model, out = tiny.build("llama"), tmp_path / "out"
    with pytest.raises(CompressError, match="a tokenizer that can be saved, got KeyError"):
        compress.save(model, out, Broken())
    model.generation_config.temperature = 0.7  # without do_sample, which transformers refuses
    with pytest.raises(CompressError, match=r"a generation config that can be saved.*temperature"):
        compress.save(model, out, tokenizer)
    assert list(tmp_path.iterdir()) == []
    model.generation_config.do_sample = True
    compress.save(model, out, tokenizer)
    assert compress.load(out)[0].generation_config.temperature == 0.7


def test_nothing_is_left_of_weights_that_are_not_finite(tiny, tmp_path):
    from compress.checkpoint.save import save_model

    model = tiny.build("llama")
    model.model.norm.weight.data[0] = float("nan")
    with pytest.raises(CompressError, match="finite"):
        save_model(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_behind_a_link_is_filled(tiny, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    compress.save(tiny.build("llama"), tmp_path / "out")
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "disk/model.safetensors").is_file()


KEPT = (
    "spm.model", "ice_text.model", "tiktoken.model", "qwen.tiktoken", "bpe.codes", "NOTICE",
    "NOTICE.txt", "LICENSE.md",
)  # fmt: skip


def test_files_of_the_model_are_kept(checkpoint, tmp_path):
    folder = tmp_path / "source"
    shutil.copytree(checkpoint("llama"), folder)
    for name in (*KEPT, "notes.doc"):
        (folder / name).write_text(name)
    source = Source(folder, "folder", str(folder))
    names = {path.name for path in companions(source, code=False)}
    assert names >= {*KEPT, "tokenizer.json", "tokenizer_config.json"}
    assert not names & {"config.json", "model.safetensors", "notes.doc"}


def test_files_of_the_model_are_fetched():
    weights = ["config.json", "model.safetensors"]
    # Of any name, "*.model" may be another model.
    side = [name for name in KEPT if name != "ice_text.model"]
    names = [*weights, *side, "w2v.model", "old/qwen.tiktoken"]
    wanted = wanted_files(names, origin="x", trust_remote_code=False)
    assert set(wanted) == {*weights, *side}
    assert "bpe.codes" in find_models([*weights, *side])["."]


def test_a_vocabulary_of_tiktoken_is_one(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    assert "holds no tokenizer" in load_tokenizer(folder)[1]
    (folder / "qwen.tiktoken").write_text("IQ== 0\n")
    assert "holds no tokenizer" not in load_tokenizer(folder)[1]


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
class OwnForCausalLM(LlamaForCausalLM):
    config_class = LlamaConfig
    def __init__(self, config):
        raise {error}
"""


@pytest.mark.parametrize("error", ["KeyError('rope')", "TypeError('no such argument')"])
def test_code_of_a_checkpoint_that_fails_is_named(own_checkpoint, error, monkeypatch, tmp_path):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "m"))
    folder = own_checkpoint("llama")
    (folder / "modeling_own.py").write_text(CODE.format(error=error))
    fields = json.loads((folder / "config.json").read_text())
    fields["auto_map"] = {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    (folder / "config.json").write_text(json.dumps(fields))
    name = error.partition("(")[0]
    with pytest.raises(CompressError, match=f"the Python code that comes with it, got {name}"):
        load_model(folder, trust_remote_code=True)


def test_a_class_that_fails_is_an_error_of_loading(own_checkpoint, monkeypatch):
    def fail(self, config):
        raise KeyError("rope")

    monkeypatch.setattr(LlamaForCausalLM, "__init__", fail)
    with pytest.raises(CompressError, match="KeyError: 'rope'. The config and the weights"):
        load_model(own_checkpoint("llama"))


def test_the_folder_that_one_works_in_is_filled(tiny, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    compress.save(tiny.build("llama"), ".")
    compress.load(".")  # by this name: the folder was not replaced by another one
    with pytest.raises(CompressError, match="empty"):
        compress.save(tiny.build("llama"), ".")
