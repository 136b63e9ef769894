"""Sources and loading: folders, GGUF files, and what is refused with its way out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from compress.errors import CompressError
from compress.models.sources.cache import cached_folder, default_cache
from compress.models.sources.source import load_config, load_model, load_tokenizer, resolve

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
BERT = BertConfig(**SMALL, num_attention_heads=4, vocab_size=60)


def tiny_llama(**options) -> LlamaForCausalLM:
    torch.manual_seed(0)
    fields = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64}
    return LlamaForCausalLM(LlamaConfig(**SMALL, **{**fields, **options})).eval()


@pytest.fixture
def folder(tmp_path) -> Path:
    tiny_llama().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_folder_is_a_source(folder, tmp_path):
    for given in (folder, str(folder), f"{folder}/"):
        source = resolve(given, cache_dir=tmp_path / "cache")
        assert source.folder == folder.resolve() and source.kind == "folder"
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("source", ["./no/where", "/nowhere", "a/b/c", "", "two words", "~/x y"])
def test_what_is_no_source(source, tmp_path):
    with pytest.raises(CompressError, match="pypi:<name>==<version>"):
        resolve(source, cache_dir=tmp_path)


def test_revision_is_for_hub_ids(folder):
    for source in (str(folder), "pypi:x==1"):
        with pytest.raises(CompressError, match="revision"):
            resolve(source, revision="main")


def test_other_file_is_no_source(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(CompressError, match="GGUF"):
        resolve(tmp_path / "model.bin")


def test_default_cache_follows_the_platform(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "compress"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache() == Path.home() / ".cache" / "compress"


def make_gpt2():
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50))


def make_vit():
    config = ViTConfig(**SMALL, num_attention_heads=4, image_size=8, patch_size=4)
    return ViTForImageClassification(config)


@pytest.mark.parametrize(
    "make",
    [
        tiny_llama,
        make_gpt2,
        lambda: BertForMaskedLM(BERT),
        lambda: BertForSequenceClassification(BERT),
        make_vit,
    ],
    ids=["causal", "gpt2", "masked", "classification", "image"],
)
def test_the_architecture_chooses_the_class(make, tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert type(loaded) is type(model) and not loaded.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_dtype_is_the_callers(folder):
    assert load_model(folder, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert load_model(resolve(folder)).dtype == torch.float32


def edit(folder: Path, **fields) -> None:
    config = json.loads((folder / "config.json").read_text())
    config = {k: v for k, v in (config | fields).items() if v is not None}
    (folder / "config.json").write_text(json.dumps(config))


def refused(folder: Path, *words: str, load=load_model, **options) -> None:
    with pytest.raises(CompressError) as caught:
        load(folder, **options)
    for word in words:
        assert word in str(caught.value)


def test_weights_without_config(folder):
    (folder / "config.json").unlink()
    refused(folder, "config.json", "weights without it")


def test_config_without_weights(folder):
    (folder / "model.safetensors").unlink()
    refused(folder, "weights")
    assert load_config(folder).model_type == "llama"


@pytest.mark.parametrize("text", ["{", "[]", ""])
def test_corrupt_config(folder, text):
    (folder / "config.json").write_text(text)
    refused(folder, "JSON", "config.json", load=load_config)


def test_unknown_model_type(folder):
    edit(folder, model_type="lama")
    refused(folder, "'lama'", "Did you mean", "'llama'", load=load_config)
    edit(folder, model_type=None)
    refused(folder, "model_type", load=load_config)


def test_invalid_config_value(folder):
    edit(folder, hidden_size="wide")
    refused(folder, "hidden_size")


def test_bare_encoder_has_no_task(tmp_path):
    BertModel(BERT).save_pretrained(tmp_path)
    refused(tmp_path, "BertModel", "ForMaskedLM")
    edit(tmp_path, architectures=None)
    refused(tmp_path, "none", "ForCausalLM")


def test_code_of_the_checkpoint_needs_leave(folder):
    marker = folder.parent / "ran"
    (folder / "modeling_own.py").write_text(
        f"open({str(marker)!r}, 'w').close()\n"
        "from transformers import LlamaConfig\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
    )
    edit(folder, model_type="own", auto_map={"AutoConfig": "modeling_own.OwnConfig"})
    refused(folder, "trust_remote_code: true", "recipe", load=load_config)
    refused(folder, "trust_remote_code: true")
    assert not marker.exists()
    assert load_config(folder, trust_remote_code=True).model_type == "own"
    assert marker.exists()


def test_missing_weight_is_not_made_up(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    refused(folder, "1 missing", "model.layers.1.mlp.down_proj.weight")


def test_weight_of_another_shape(folder):
    edit(folder, intermediate_size=40)
    refused(folder, "down_proj")


def test_nan_weight(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][3, 3] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    refused(folder, "NaN", "model.layers.0.mlp.up_proj.weight")


def test_truncated_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refused(folder, "truncated")


def test_pickled_weights(folder):
    (folder / "model.safetensors").unlink()
    torch.save(tiny_llama().state_dict(), folder / "pytorch_model.bin")
    refused(folder, "pytorch_model.bin", "save_pretrained", "isolated")


def test_no_tokenizer_is_said(folder):
    tokenizer, reason = load_tokenizer(folder)
    assert tokenizer is None and "no tokenizer" in reason
    (folder / "tokenizer.json").write_text("{")
    tokenizer, reason = load_tokenizer(folder)
    assert tokenizer is None and "does not load" in reason


def test_cached_folder_is_whole_or_absent(tmp_path):
    target = tmp_path / "cache" / "thing"

    def broken(temporary: Path) -> dict:
        (temporary / "half").write_text("x")
        raise CompressError("a whole thing")

    with pytest.raises(CompressError):
        cached_folder(target, broken)
    assert list(target.parent.iterdir()) == []

    built = []

    def build(temporary: Path) -> dict:
        built.append(1)
        save_file({"w": torch.ones(3)}, temporary / "model.safetensors")
        return {"n": len(built)}

    assert cached_folder(target, build)["n"] == 1
    assert cached_folder(target, build)["n"] == 1 and len(built) == 1
    # A copy that was damaged since, and what a killed process left, are both cleared away.
    (target / "model.safetensors").write_bytes(b"short")
    left = target.parent / ".thing.abc"
    left.mkdir()
    assert cached_folder(target, build)["n"] == 2
    assert not left.exists()


LITTLE_ROOM = """
import resource, signal, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from compress.errors import CompressError
from compress.models.sources.cache import cached_folder

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

def build(temporary):
    save_file({"w": torch.ones(100_000)}, temporary / "model.safetensors")
    return {}

try:
    cached_folder(Path(sys.argv[1]), build)
except CompressError as error:
    print(error)
"""


def test_no_room_while_writing(forked_python, tmp_path):
    # A limit on the size of files fails a write midway, as a full disk does.
    root = str(Path(__file__).parents[2])
    done = forked_python("-c", LITTLE_ROOM, tmp_path / "thing", env={"PYTHONPATH": root})
    assert "Make room" in done.stdout, done.stderr
    assert list(tmp_path.iterdir()) == []
