"""Images with class labels: the digits inside scikit-learn, and IDX files such as MNIST's."""

from __future__ import annotations

import gzip
import hashlib
import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field

from compress.errors import CompressError
from compress.system.intake import at_home, user_path

DIGITS = "digits"
_HELD_OUT = 5  # of the digits, every fifth image is test: all writers are in both splits

# IDX: two zero bytes, the type (8: unsigned bytes), the number of dimensions, then their sizes
# (http://yann.lecun.com/exdb/mnist/, "file formats").
_UNSIGNED_BYTES = 8
_LARGEST = 2**29  # bytes of a file, unpacked; MNIST's have 47 MB
_PREFIX = {"train": "train", "test": "t10k"}


class ImageSpec(BaseModel):
    """Which images."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str = Field(
        DIGITS,
        description="digits (1,797 images of 8x8 that come with scikit-learn), or a folder of IDX "
        "files as MNIST's, by its path or by its name below the data root",
    )
    split: Literal["train", "test"] = Field("train", description="they share no image")
    limit: int | None = Field(None, gt=0, description="use at most so many images")


@dataclass(frozen=True)
class Images:
    """Grey images and their classes.

    Attributes:
        pixels: float32 [n, height, width], 0 (background) to 1.
        labels: int64 [n], 0 to ``classes`` - 1.
        classes: number of classes in the whole data set.
        description: one line for a report.
    """

    pixels: torch.Tensor
    labels: torch.Tensor
    classes: int
    description: str

    def __len__(self) -> int:
        return len(self.pixels)

    @cached_property
    def digest(self) -> str:
        """sha256, as hex, of sizes, pixels in 8 bits and labels."""
        codes = (self.pixels * 255).round().to(torch.uint8).numpy().tobytes()
        head = "x".join(map(str, self.pixels.shape)).encode()
        labels = self.labels.numpy().astype("<i8").tobytes()
        return hashlib.sha256(head + b":" + codes + labels).hexdigest()


def load_images(spec: ImageSpec | str, data_root: str | Path | None = None) -> Images:
    """Read the images that ``spec`` describes.

    Raises:
        CompressError: no such folder or files, files that are not IDX or do not belong together.
    """
    spec = ImageSpec(source=spec) if isinstance(spec, str) else spec
    pixels, labels, about = _digits(spec) if spec.source == DIGITS else _idx(spec, data_root)
    classes = int(labels.max()) + 1
    return Images(
        torch.from_numpy(pixels[: spec.limit]), torch.from_numpy(labels[: spec.limit]), classes,
        f"{about}, {spec.split} split, {len(pixels[: spec.limit])} images",
    )  # fmt: skip


def check_images(spec: ImageSpec, data_root: str | Path | None = None) -> None:
    """Refuse images that are not there, reading none.

    Raises:
        CompressError: no such folder or files.
    """
    if spec.source != DIGITS:
        folder = _folder(spec.source, data_root)
        for kind in ("images-idx3", "labels-idx1"):
            _file(folder, f"{_PREFIX[spec.split]}-{kind}-ubyte")


def _digits(spec: ImageSpec) -> tuple[np.ndarray, np.ndarray, str]:
    from sklearn.datasets import load_digits

    data = load_digits()
    held_out = np.arange(len(data.images)) % _HELD_OUT == _HELD_OUT - 1
    chosen = held_out if spec.split == "test" else ~held_out
    pixels = (data.images[chosen] / 16.0).astype(np.float32)  # 17 grey levels, 0 to 16
    return pixels, data.target[chosen].astype(np.int64), "the digits of scikit-learn"


def _idx(spec: ImageSpec, data_root: str | Path | None) -> tuple[np.ndarray, np.ndarray, str]:
    folder = _folder(spec.source, data_root)
    prefix = _PREFIX[spec.split]
    pixels = read_idx(_file(folder, f"{prefix}-images-idx3-ubyte"))
    labels = read_idx(_file(folder, f"{prefix}-labels-idx1-ubyte"))
    if pixels.ndim != 3 or labels.ndim != 1 or len(pixels) != len(labels) or not len(labels):
        raise CompressError(
            "images [n, height, width] and n labels",
            f"arrays of shape {list(pixels.shape)} and {list(labels.shape)} in {folder}",
            "The two files are of different data sets",
        )
    pixels = pixels[: spec.limit].astype(np.float32) / 255.0
    return pixels, labels.astype(np.int64), folder.name


def _folder(source: str, data_root: str | Path | None) -> Path:
    places = [user_path(source, f"'{DIGITS}' or a folder with IDX images")]
    if data_root is not None:
        places.insert(0, at_home(data_root) / source)
    for place in places:
        if place.is_dir():
            return place
    raise CompressError(
        f"'{DIGITS}' or a folder with IDX images", f"{source!r}, and no such folder in "
        + " or ".join(str(p.parent) for p in places),
        "Give the folder's path, or its name and --data-root",
    )  # fmt: skip


def _file(folder: Path, name: str) -> Path:
    for path in (folder / f"{name}.gz", folder / name):
        if path.is_file():
            return path
    raise CompressError(
        f"the file {name} or {name}.gz in {folder}", "neither",
        "Fetch the four files of the data set",
    )  # fmt: skip


def read_idx(path: Path) -> np.ndarray:
    """Read an IDX file of unsigned bytes, gzipped or not, as a uint8 array.

    Raises:
        CompressError: another format, or fewer bytes than the header states.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            data = file.read(_LARGEST + 1)
        if len(data) > _LARGEST:
            raise ValueError(f"more than {_LARGEST / 1e9:.1f} GB, unpacked")
        if data[:3] != bytes((0, 0, _UNSIGNED_BYTES)):
            raise ValueError(f"a file that starts with {data[:4].hex(' ')}")
        if not 1 <= data[3] <= 3:
            raise ValueError(f"{data[3]} dimensions instead of 1 to 3")
        start = 4 + 4 * data[3]
        shape = [int(n) for n in np.frombuffer(data[4:start], ">u4")]
        return np.frombuffer(data, np.uint8, offset=start).reshape(shape)
    except (ValueError, IndexError, EOFError, OSError, zlib.error) as error:
        raise CompressError(
            f"an IDX file of unsigned bytes at {path}", str(error), "Fetch the file again"
        ) from error
