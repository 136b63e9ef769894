"""A look at a checkpoint outside a run: one survey, block after block, and what it decides."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from compress.checkpoint.state import ModelState
from compress.checkpoint.stored import read_block
from compress.data.calibration import calibration_batches
from compress.data.calibration_spec import CalibrationSpec
from compress.engine.context import MemorySink, StepContext
from compress.engine.streaming import Streaming
from compress.errors import CompressError
from compress.methods.passes import SURVEY, Survey
from compress.models.anatomy import Anatomy
from compress.models.groups import single
from compress.models.sources.source import load_config, resolve
from compress.models.supported import check_kind
from compress.planning.checks import reader_of
from compress.system.precision import Compute, calibration_dtype, device_of
from compress.system.tensors import TensorIndex


def survey_checkpoint(
    step: Survey,
    source: str | Path,
    calibration: CalibrationSpec,
    *,
    compute: Compute = "auto",
    data_root: str | Path | None = None,
    cache_dir: str | Path | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """What a survey decides on a model that no step has changed; one block is in memory at a time.

    Args:
        compute: type of matrix products, as in a recipe.

    Raises:
        CompressError: a source or a text that cannot be used, a model whose layers are one.
    """
    found = resolve(source, cache_dir=cache_dir, trust_remote_code=trust_remote_code)
    config = load_config(found.folder, trust_remote_code=trust_remote_code)
    state = ModelState.of_checkpoint(TensorIndex.open(found.folder), config, trust_remote_code)
    device = device_of("auto")
    streamed = state.streamed(device)
    check_kind(streamed.model)
    if streamed.anatomy.family.shared_blocks:
        raise CompressError(
            "a model whose layers have weights of their own",
            f"{streamed.anatomy.model_type}, whose layers share one set",
        )
    reader = reader_of(found.folder, trust_remote_code)
    batches = calibration_batches(calibration, reader, config, data_root=data_root).batches
    anatomy = streamed.anatomy
    with tempfile.TemporaryDirectory(prefix="compress-survey-") as scratch:
        sink = _CheckpointSink(state, anatomy, Path(scratch))
        context = StepContext(
            streamed, batches, Path(scratch), sink=sink, compute=calibration_dtype(compute, device)
        )
        groups = single(len(anatomy.blocks))
        Streaming(step, SURVEY, "inspect", context, None, groups).run()
        return step.decide(sink.notes(SURVEY), anatomy)


class _CheckpointSink(MemorySink):
    """Blocks come from a checkpoint; what observations keep goes to files, notes to memory."""

    def __init__(self, state: ModelState, anatomy: Anatomy, folder: Path) -> None:
        super().__init__()
        self._state, self._anatomy, self._folder = state, anatomy, folder

    def load(self, index: int, block: nn.Module) -> None:
        self._state.load(index, block, self._anatomy)

    def keep(self, stage: str, index: int, tensors: dict[str, torch.Tensor]) -> None:
        save_file({name: t.cpu() for name, t in tensors.items()}, self._file(stage, index))

    def learned(self, stage: str, index: int) -> dict[str, torch.Tensor]:
        return read_block(self._file(stage, index))

    def _file(self, stage: str, index: int) -> Path:
        return self._folder / f"{stage}-{index:05d}.safetensors"
