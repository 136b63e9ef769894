"""Tiny random models of every family, a tokenizer, a text; no network, few threads.

Tests get helpers through fixtures, since a conftest cannot be imported.
"""

from __future__ import annotations

import gc
import os
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["TQDM_DISABLE"] = "1"  # as the command line does, before anything imports tqdm

import pytest  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from transformers import PreTrainedModel, PreTrainedTokenizerFast  # noqa: E402

SPECIAL = ("[PAD]", "[BOS]", "[EOS]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
VOCABULARY = 264  # 256 bytes, the special tokens, one to spare
HIDDEN, FFN, LAYERS, HEADS, KV_HEADS, POSITIONS = 32, 64, 3, 4, 2, 128

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": POSITIONS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {**_COMMON, "num_key_value_heads": KV_HEADS}
_IDS = {k: _COMMON[k] for k in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")}

# model type -> (config class, fields, model class)
TINY: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama": ("LlamaConfig", _GROUPED, "LlamaForCausalLM"),
    "mistral": ("MistralConfig", {**_GROUPED, "head_dim": 8}, "MistralForCausalLM"),
    "qwen2": ("Qwen2Config", _GROUPED, "Qwen2ForCausalLM"),
    "qwen3": ("Qwen3Config", {**_GROUPED, "head_dim": 16}, "Qwen3ForCausalLM"),
    "gemma2": ("Gemma2Config", {**_GROUPED, "head_dim": 8}, "Gemma2ForCausalLM"),
    "phi3": ("Phi3Config", _GROUPED, "Phi3ForCausalLM"),
    "gpt2": (
        "GPT2Config",
        {
            **_IDS,
            "n_embd": HIDDEN,
            "n_layer": LAYERS,
            "n_head": HEADS,
            "n_inner": FFN,
            "n_positions": POSITIONS,
        },
        "GPT2LMHeadModel",
    ),
    "gpt_neox": ("GPTNeoXConfig", {**_COMMON, "rotary_pct": 0.5}, "GPTNeoXForCausalLM"),
    "opt": (
        "OPTConfig",
        {**_COMMON, "ffn_dim": FFN, "word_embed_proj_dim": HIDDEN},
        "OPTForCausalLM",
    ),
    "bert": ("BertConfig", _COMMON, "BertForMaskedLM"),
    "roberta": (
        "RobertaConfig",
        {**_COMMON, "max_position_embeddings": POSITIONS + 2, "type_vocab_size": 1},
        "RobertaForMaskedLM",
    ),
    "distilbert": (
        "DistilBertConfig",
        {
            **_IDS,
            "dim": HIDDEN,
            "hidden_dim": FFN,
            "n_layers": LAYERS,
            "n_heads": HEADS,
            "max_position_embeddings": POSITIONS,
        },
        "DistilBertForMaskedLM",
    ),
    "albert": ("AlbertConfig", {**_COMMON, "embedding_size": 16}, "AlbertForMaskedLM"),
    "modernbert": (
        "ModernBertConfig",
        {
            **_COMMON,
            "cls_token_id": 4,
            "sep_token_id": 5,
            "local_attention": 16,
            "global_attn_every_n_layers": 2,
        },
        "ModernBertForMaskedLM",
    ),
    "mamba": ("MambaConfig", {**_IDS, "hidden_size": 32, "state_size": 4}, "MambaForCausalLM"),
}

_WORDS = (
    "the of a to and in model weight layer small large sum row column was is gives takes every "
    "other under over with without block token text light river stone measure slow quick quiet"
)


@pytest.fixture(scope="session", autouse=True)
def _few_threads():
    # Tiny models gain nothing from threads and, on a busy machine, wait for them.
    torch.set_num_threads(1)
    # The objects of imported libraries outlive all tests: without this, each collection that a run
    # asks for looks at a million of them.
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _no_users_cache(tmp_path_factory):
    """Keep what the user has in the toolkit's cache out of reach, also of wider fixtures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _own_cache(_no_users_cache, tmp_path_factory, monkeypatch):
    """Give each test an empty cache: what one has measured, no other one is to find there."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session", autouse=True)
def _one_clean_process():
    """Let one interpreter prove all checkpoints that need one: starting it takes seconds."""
    from compress.checkpoint.fresh import kept_process

    with kept_process():
        yield


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    """Let sockets reach this machine only."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> Any:
        if self.family in (socket.AF_INET, socket.AF_INET6):
            host = str(address[0])
            if not (host.startswith("127.") or host in ("::1", "localhost")):
                raise OSError(f"a test tried to reach {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(autouse=True)
def _no_patches_left():
    """Forget the block classes that a test registered with transformers.

    While there are any, each model that transformers builds takes a third of a second longer.
    """
    yield
    if "compress.checkpoint.per_layer" in sys.modules:
        from transformers.monkey_patching import get_patch_mapping, unregister_patch_mapping

        unregister_patch_mapping(list(get_patch_mapping()))
        sys.modules["compress.checkpoint.per_layer"]._registered.clear()


def _build(model_type: str, seed: int = 0, **fields: Any) -> PreTrainedModel:
    config_name, base, class_name = TINY[model_type]
    config = getattr(transformers, config_name)(**{**base, **fields})
    torch.manual_seed(seed)
    model = getattr(transformers, class_name)(config).eval()
    with torch.no_grad():
        # Random initialisation leaves biases at zero and norms at one: mix-ups would not show.
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.config.architectures = [class_name]
    return model


@pytest.fixture(scope="session")
def tiny() -> Callable[..., PreTrainedModel]:
    """``tiny(model_type, seed=0, **config fields)``: a fresh model, the same one every time."""
    return _build


def _make_tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {token: i for i, token in enumerate((*SPECIAL, *alphabet))}
    tokenizer = Tokenizer(models.BPE(ids, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    pad, bos, eos, unk, cls, sep, mask = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        unk_token=unk,
        cls_token=cls,
        sep_token=sep,
        mask_token=mask,
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A token a byte, with a mask token."""
    return _make_tokenizer()


@pytest.fixture(scope="session")
def framing_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """``framing_tokenizer("[CLS] $A [SEP]")``: the tokenizer, made to add special tokens."""
    from tokenizers import processors

    def make(template: str) -> PreTrainedTokenizerFast:
        made = _make_tokenizer()
        used = [(token, SPECIAL.index(token)) for token in SPECIAL if token in template]
        made.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=template, pair=f"{template} $B", special_tokens=used
        )
        return made

    return make


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, tokenizer) -> Callable[..., Path]:
    """``checkpoint(model_type, **fields)``: a folder with a tiny model and tokenizer; read-only."""
    made: dict[str, Path] = {}

    def get(model_type: str, seed: int = 0, **fields: Any) -> Path:
        key = repr((model_type, seed, sorted(fields.items())))
        if key not in made:
            folder = tmp_path_factory.mktemp("checkpoints") / model_type
            _build(model_type, seed, **fields).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            made[key] = folder
        return made[key]

    return get


@pytest.fixture
def own_checkpoint(checkpoint, tmp_path) -> Callable[..., Path]:
    """As ``checkpoint``, but a copy that the test may damage."""

    def get(model_type: str = "llama", **fields: Any) -> Path:
        folder = tmp_path / f"source-{model_type}"
        shutil.copytree(checkpoint(model_type, **fields), folder)
        return folder

    return get


def _prose(count: int, seed: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    words, lines = _WORDS.split(), []
    while count > 0:
        picks = torch.randint(len(words), (12,), generator=generator).tolist()
        lines.append(" ".join(words[i] for i in picks) + ".\n")
        count -= len(lines[-1])
    return "".join(lines)


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    """A file with 20 kB of words."""
    path = tmp_path_factory.mktemp("texts") / "words.txt"
    path.write_text(_prose(20_000, seed=5))
    return path


@pytest.fixture(scope="session")
def tokens() -> torch.Tensor:
    """Token ids [8, 24], none of them special."""
    generator = torch.Generator().manual_seed(3)
    return torch.randint(len(SPECIAL), VOCABULARY - 1, (8, 24), generator=generator)


@pytest.fixture(scope="session")
def helpers() -> SimpleNamespace:
    """Functions that several test files share."""

    def logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return model.eval()(input_ids=ids).logits

    def difference(a: torch.Tensor, b: torch.Tensor) -> float:
        """Largest difference relative to the largest value of ``b``."""
        return float((a - b).detach().abs().max() / b.detach().abs().max())

    def auto(model_type: str) -> Any:
        masked = TINY[model_type][2].endswith("MaskedLM")
        return transformers.AutoModelForMaskedLM if masked else transformers.AutoModelForCausalLM

    def recipe(source: Path, steps: Any, text: Path | None = None, **more: Any) -> dict[str, Any]:
        """A recipe as plain data, calibrated on ``text`` where there is one."""
        data: dict[str, Any] = {"name": "tiny", "model": str(source), "steps": list(steps), **more}
        if text is not None:
            data["calibration"] = {"text": {"source": str(text)}, "samples": 8, "length": 24}
        return data

    def evaluation(text: Path, **more: Any) -> dict[str, Any]:
        """An evaluation section that takes a moment: no timing, no process of its own."""
        spec = {"max_tokens": 256, "window": 64, "latency": False, "memory": False}
        return {"text": {"source": str(text), "part": "tail:0.2"}, **spec, **more}

    def weights(folder: Path) -> dict[str, torch.Tensor]:
        from safetensors.torch import load_file

        files = sorted(folder.glob("model*.safetensors"))
        return {name: tensor for file in files for name, tensor in load_file(file).items()}

    def contents(folder: Path) -> dict[str, bytes]:
        """Relative path -> bytes of every file below a folder."""
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        return {str(p.relative_to(folder)): p.read_bytes() for p in files}

    functions: tuple[Callable[..., Any], ...] = (
        logits,
        difference,
        auto,
        recipe,
        evaluation,
        weights,
        contents,
    )
    return SimpleNamespace(
        families=tuple(t for t in TINY if t not in ("mamba", "albert")),
        **{f.__name__: f for f in functions},
    )
