"""What checks of one family share: its tiny model on disk, and inputs to calibrate and compare."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from compress.conformance.models import auto_class, build, make_tokenizer, prose, token_ids
from compress.data.calibration import calibration_batches
from compress.data.calibration_spec import CalibrationSpec
from compress.linear.packed import packed_weights

_SAMPLES, _LENGTH = 8, 24


class TinyFamily:
    """The tiny model of a family; what takes a moment is made once.

    Args:
        name: a model type of :data:`compress.conformance.models.TINY`.
        folder: to write to; need not exist.
        fields: of the config, beside or instead of those of the table.
    """

    def __init__(self, name: str, folder: Path, **fields: Any) -> None:
        self.name, self.folder, self.fields = name, folder, fields

    def model(self) -> PreTrainedModel:
        """A fresh copy in memory."""
        return build(self.name, **self.fields)

    def load(self, folder: Path) -> PreTrainedModel:
        """A checkpoint, through the auto class of transformers and nothing of ours."""
        with packed_weights(False):
            return auto_class(self.name).from_pretrained(folder)

    @cached_property
    def checkpoint(self) -> Path:
        """The model and a tokenizer, as Hugging Face saves them; not to be changed."""
        folder = self.folder / "checkpoint"
        self.model().save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
        return folder

    @cached_property
    def text(self) -> Path:
        """A file of words to calibrate on."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "words.txt"
        path.write_text(prose(2_000, seed=5), encoding="utf-8")
        return path

    @cached_property
    def batches(self) -> list[dict[str, torch.Tensor]]:
        """The calibration batches that :meth:`recipe` leads to: model inputs, and labels of masked
        models."""
        spec = CalibrationSpec(**self._calibration)
        made = calibration_batches(spec, make_tokenizer(), self.model().config)
        if made.labels is None:
            return made.batches
        return [{**b, "labels": y} for b, y in zip(made.batches, made.labels, strict=True)]

    @property
    def _calibration(self) -> dict[str, Any]:
        return {"text": {"source": str(self.text)}, "samples": _SAMPLES, "length": _LENGTH}

    def recipe(self, steps: list[Any], calibrated: bool = True) -> dict[str, Any]:
        """A recipe of these steps on the checkpoint, as plain data.

        On the CPU in float32: what ``auto`` would choose is measured, and so may differ from one
        run to the next.
        """
        data = {
            "name": "conformance", "model": str(self.checkpoint), "steps": steps,
            "device": "cpu", "compute": "float32",
        }  # fmt: skip
        return {**data, "calibration": self._calibration} if calibrated else data

    @cached_property
    def logits(self) -> torch.Tensor:
        """Of the model, on :func:`compress.conformance.models.token_ids`."""
        return logits(self.model())


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    """What a model says to :func:`compress.conformance.models.token_ids`: [8, 24, vocabulary]."""
    return model.eval()(input_ids=token_ids()).logits


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference relative to the largest value of ``b``."""
    return float((a - b).detach().abs().max() / b.detach().abs().max())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint."""
    from safetensors.torch import load_file

    files = sorted(folder.glob("model*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def contents(folder: Path) -> dict[str, bytes]:
    """Relative path -> bytes of every file below a folder."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}
