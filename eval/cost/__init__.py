"""What a model costs: parameters, bytes, multiply-accumulates, latency and memory."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from compress.eval.cost.latency import PairedLatency, paired_latency
from compress.eval.cost.macs import Macs, macs_per_token
from compress.eval.cost.memory import PeakMemory, peak_memory
from compress.eval.cost.size import Size, size
from compress.linear.semi_structured import describe_execution

__all__ = [
    "CostResult",
    "Macs",
    "PairedLatency",
    "PeakMemory",
    "Size",
    "cost",
    "macs_per_token",
    "paired_latency",
    "peak_memory",
    "size",
]


class CostResult(BaseModel):
    """Everything about one model that can be counted without a clock, and its peak memory."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: Size
    macs: Macs
    memory: PeakMemory | None = Field(
        default=None, description="measured on a fresh process; None without a folder"
    )
    execution: str = Field(
        default="", description="which products the model ran while it was measured, and where"
    )


def cost(
    model: nn.Module,
    folder: str | Path | None = None,
    *,
    context: int = 1024,
    memory: bool = True,
    prefill_tokens: int = 512,
    trust_remote_code: bool = False,
) -> CostResult:
    """Count what ``model`` costs.

    Args:
        model: a ``PreTrainedModel`` in memory, or a model in another runtime, which has its
            ``shape`` (the same model without weights), its ``bytes`` on disk and what runs it
            (``execution``); its zeros are not counted.
        folder: the checkpoint it came from or went to; without it no bytes and no memory.
        context: tokens a token attends to, for the multiply-accumulates of attention.
        memory: load the folder in a fresh process and read its peak memory (takes seconds).
        prefill_tokens: length of the forward in that process.
        trust_remote_code: handed to ``from_pretrained`` in that process.

    Raises:
        CompressError: the folder holds no safetensors checkpoint, or does not load.
    """
    if (shape := getattr(model, "shape", None)) is not None:  # the weights are in a runtime
        counted = size(shape).model_copy(update={"checkpoint_bytes": model.bytes})
        macs = macs_per_token(shape, context)
        return CostResult(size=counted, macs=macs, execution=model.execution)
    peak = None
    if folder is not None and memory:
        peak = peak_memory(
            folder, prefill_tokens=prefill_tokens, trust_remote_code=trust_remote_code
        )
    return CostResult(
        size=size(model, folder),
        macs=macs_per_token(model, context),
        memory=peak,
        execution=describe_execution(model),
    )
