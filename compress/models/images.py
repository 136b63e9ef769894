"""Models that read images: what they are told by, and sizes that their configs have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

PIXELS = "pixel_values"
# Tokens beside those of patches: the one that is classified, and DeiT's for what it distills.
_SPECIAL = {"deit": 2}


def reads_images(config: PreTrainedConfig) -> bool:
    """Whether a model has images for inputs, and no vocabulary."""
    text = getattr(config.get_text_config(), "vocab_size", None)
    return text is None and hasattr(config, "image_size") and hasattr(config, "num_channels")


def image_shape(config: PreTrainedConfig) -> tuple[int, int, int]:
    """(Channels, height, width) of the images that a model reads."""
    return config.num_channels, *_pair(config.image_size)


def image_tokens(config: PreTrainedConfig) -> int:
    """Tokens that blocks make of an image: a patch each, and the special ones; 1 of a model whose
    config names no patches."""
    patch = getattr(config, "patch_size", None)
    if patch is None:
        return 1
    _, height, width = image_shape(config)
    rows, columns = _pair(patch)
    kind = config.model_type.removeprefix("compress_")
    return (height // rows) * (width // columns) + _SPECIAL.get(kind, 1)


def random_image(config: PreTrainedConfig) -> dict[str, torch.Tensor]:
    """Inputs of a model that reads images, [1, channels, height, width]; always the same."""
    generator = torch.Generator().manual_seed(0)
    return {PIXELS: torch.randn(1, *image_shape(config), generator=generator)}


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
