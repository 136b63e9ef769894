"""The image processor saved with a model, carried out on arrays.

``preprocessor_config.json`` says how an image becomes what the model reads: resize, crop, rescale,
normalise, each a formula. They are carried out here as transformers' torchvision backend does it
(what is resized differs by one level of brightness in 255 at most, where rounding falls otherwise),
so that neither Pillow nor torchvision has to be there and figures do not depend on which is. What
the file asks for beyond these steps is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from compress.errors import CompressError
from compress.system.files import write_atomically
from compress.system.intake import read_json

FILE = "preprocessor_config.json"
_STEPS = frozenset({"do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"})
# Options with which a class does something else; what they mean when they say nothing is no change.
_OTHERS = ("crop_pct", "include_top", "rescale_offset", "size_divisor", "do_pad", "do_flip")
_FILTERS = {0: "nearest-exact", 2: "bilinear", 3: "bicubic"}  # numbers of Pillow's
# What older files leave to the class. A number as size is both sides of a square there.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "ViT": {"do_resize": True, "resample": 2, "do_center_crop": False},
    "DeiT": {"do_resize": True, "resample": 3, "do_center_crop": True},
    "Beit": {"do_resize": True, "resample": 3, "do_center_crop": False},
}


class ImageProcessor:
    """Makes pixel values of images.

    Args:
        fields: of a ``preprocessor_config.json``.

    Raises:
        CompressError: steps, sizes or filters that are none of those above.
    """

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self.fields = dict(fields)
        kind = str(fields.get("image_processor_type") or fields.get("feature_extractor_type") or "")
        known = next((d for name, d in _DEFAULTS.items() if kind.startswith(name)), None)
        said = {**(known or {}), **{k: v for k, v in fields.items() if v is not None}}
        odd = [name for name in said if name.startswith("do_") and name not in _STEPS]
        odd = sorted(name for name in {*odd, *_OTHERS} if said.get(name))
        if odd:
            raise _refused("resize, crop, rescale and normalise only", ", ".join(odd))
        self.size = _size(said.get("size"), known) if said.get("do_resize") else None
        self.crop = _size(said.get("crop_size"), {}) if said.get("do_center_crop") else None
        if self.crop is not None and len(self.crop) != 2:
            raise _refused("a crop_size of height and width", repr(said.get("crop_size")))
        number = said.get("resample", 2)
        if self.size is not None and number not in _FILTERS:
            raise _refused(f"a resample of {sorted(_FILTERS)}", repr(number))
        self.filter = _FILTERS.get(number, "bilinear")
        scale = said.get("rescale_factor", 1 / 255)
        self.scale = float(scale) if said.get("do_rescale", True) else 1.0
        normalises = bool(said.get("do_normalize", known is not None))
        self.mean = _per_channel(said.get("image_mean", 0.5) if normalises else 0.0)
        self.deviation = _per_channel(said.get("image_std", 0.5) if normalises else 1.0)

    @classmethod
    def of(cls, given: Any) -> ImageProcessor:
        """One of these, or what an image processor of transformers says of itself."""
        if isinstance(given, cls):
            return given
        return cls(given.to_dict())

    @classmethod
    def of_folder(cls, folder: Path) -> ImageProcessor | None:
        """The one beside a model; None where there is none."""
        path = folder / FILE
        if not path.is_file():
            return None
        try:
            fields = read_json(path, f"JSON in {path}", "Fetch this file again")
            return cls(fields)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CompressError(
                f"an image processor in {path}", f"{type(error).__name__}: {error}",
                "Fetch this file again",
            ) from error  # fmt: skip
        except CompressError as error:
            raise error.within(str(path)) from None

    @property
    def digest(self) -> str:
        """sha256, as hex, of what is done to images."""
        done = [self.size, self.crop, self.filter, self.scale, self.mean.flatten().tolist(),
                self.deviation.flatten().tolist()]  # fmt: skip
        return hashlib.sha256(json.dumps(done).encode()).hexdigest()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the file that this was read from."""
        write_atomically(Path(folder) / FILE, json.dumps(self.fields, indent=2) + "\n")

    def pixels(self, image: np.ndarray) -> torch.Tensor:
        """Pixel values, float32 [channels, height, width].

        Args:
            image: [height, width, channels], from 0 to 255.
        """
        values = torch.from_numpy(np.ascontiguousarray(image, dtype=np.float32))
        values = values.permute(2, 0, 1)[None]
        if self.size is not None:
            values = self._resized(values)
        if self.crop is not None:
            values = self._cropped(values)
        values = values * self.scale
        if len(self.mean) not in (1, values.shape[1]):
            raise CompressError(
                f"images of {len(self.mean)} channels, as the image processor has means for",
                f"{values.shape[1]}", "Give the images in the model's colours",
            )  # fmt: skip
        return ((values - self.mean) / self.deviation)[0]

    def _resized(self, values: torch.Tensor) -> torch.Tensor:
        height, width = values.shape[-2:]
        assert self.size is not None
        if len(self.size) == 2:
            size = self.size
        else:  # the shorter side; the other one is cut to whole pixels
            short, (edge,) = min(height, width), self.size
            size = (int(edge * height / short), int(edge * width / short))
        if size == (height, width):
            return values
        smooth = {} if self.filter == "nearest-exact" else {"antialias": True}
        # Levels of brightness are whole numbers, to which every backend rounds.
        return (
            functional.interpolate(values, size, mode=self.filter, **smooth).round().clamp(0, 255)
        )

    def _cropped(self, values: torch.Tensor) -> torch.Tensor:
        """The middle; what is smaller stands in the middle of black."""
        assert self.crop is not None
        lacking = [
            max(0, want - have) for want, have in zip(self.crop, values.shape[-2:], strict=True)
        ]
        if any(lacking):
            top, left = (-(-n // 2) for n in lacking)
            values = functional.pad(values, (left, lacking[1] - left, top, lacking[0] - top))
        top, left = ((have - want) // 2
                     for want, have in zip(self.crop, values.shape[-2:], strict=True))  # fmt: skip
        return values[..., top : top + self.crop[0], left : left + self.crop[1]]


def _size(value: Any, known: Mapping[str, Any] | None) -> tuple[int, ...]:
    """(Height, width), or (shorter side,)."""
    if isinstance(value, int) and known is not None:
        return (value, value)
    if isinstance(value, Mapping) and {"height", "width"} <= value.keys():
        return (int(value["height"]), int(value["width"]))
    if isinstance(value, Mapping) and set(value) == {"shortest_edge"}:
        return (int(value["shortest_edge"]),)
    raise _refused("a size of height and width, or of the shortest_edge", repr(value))


def _per_channel(value: Any) -> torch.Tensor:
    """Numbers by channel, float32 [channels, 1, 1]."""
    return torch.tensor(value, dtype=torch.float32).reshape(-1, 1, 1)


def _refused(expected: str, got: str) -> CompressError:
    return CompressError(
        f"an image processor of {expected}", got,
        "Prepare the images yourself: calibrate on batches with pixel_values",
    )  # fmt: skip
