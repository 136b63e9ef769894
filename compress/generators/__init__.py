"""Masked generators: what a model generates, how its inputs are masked, and how to sample from it.

One class of model covers MaskGIT, MDLM, LLaDA and Dream: a bidirectional network that predicts
tokens hidden behind a mask token, at any mask ratio.
"""

from compress.generators.corruption import corrupt, nested_masks
from compress.generators.denoiser import Counters, Denoiser, legal_logits, subs_log_probs
from compress.generators.description import ClassCondition, MaskedGeneration
from compress.generators.losses import masked_loss
from compress.generators.options import SamplerOptions
from compress.generators.ratios import mask_ratios
from compress.generators.sampler import Samples, sample
from compress.generators.schedules import reveal_plan, schedule_value

__all__ = [
    "ClassCondition",
    "Counters",
    "Denoiser",
    "MaskedGeneration",
    "Samples",
    "SamplerOptions",
    "corrupt",
    "legal_logits",
    "mask_ratios",
    "masked_loss",
    "nested_masks",
    "reveal_plan",
    "sample",
    "schedule_value",
    "subs_log_probs",
]
