"""Labelled images: from folders, arrays, tables, data sets and memory, as arrays of pixels.

An encoded image (a .png or .jpg, bytes in a data set) needs Pillow, an optional extra; arrays need
nothing.
"""

from __future__ import annotations

import base64
import hashlib
import io
import os
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compress.data.images import DIGITS, ImageSpec, load_images
from compress.errors import CompressError
from compress.system.intake import at_home, user_path

COLUMNS = ("image", "img", "images")
_ARRAYS = ".npz"
_FILES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".npy")
_IMAGES = ("x_{split}", "images", "image", "x")  # arrays of the split before those of all
_LABELS = ("y_{split}", "labels", "label", "y")
_OF_SPLIT = (_IMAGES[0], _LABELS[0])
_WHOLE = ("train", "all")  # splits by which a place without any is read
# What numpy raises for files that are no archive of arrays; a single array is no context manager.
_UNREADABLE = (OSError, ValueError, TypeError, zipfile.BadZipFile)
_CHANNELS = (1, 3, 4)
FORMS = (
    "an image: an array or a tensor [height, width], [height, width, channels] or [channels, "
    "height, width] of whole numbers from 0 to 255 or fractions from 0 to 1, an image of Pillow, "
    "or a file"
)


@dataclass(frozen=True)
class ImagePlace:
    """Where labelled images lie that are no table.

    Attributes:
        path: an .npz file, a folder of IDX files, a folder with a folder for each class; None for
            the digits of scikit-learn.
        split: the one that is read; empty where the place has none, and all of it is read.
    """

    path: Path | None
    split: str = ""


def image_place(source: str, split: str, data_root: str | Path | None) -> ImagePlace | None:
    """Where labelled images lie: the digits, an .npz file, a folder of IDX files, a folder with a
    folder for each class (below one for the split, where there is such a one). None where the
    source is nothing of that.

    A place without splits is read whole, as ``train`` or ``all``: what is measured on must be
    chosen, for it would else be what the model was trained on.

    Args:
        data_root: searched by the source's name before the working directory.

    Raises:
        CompressError: a split that the place does not have.
    """
    if source == DIGITS:
        return ImagePlace(None, _idx_split(split, source))
    for place in _places(source, data_root):
        if place.suffix.lower() == _ARRAYS and place.is_file():
            return _array_place(place, split)
        if not place.is_dir():
            continue
        inner = place / split
        for folder in (inner, place) if inner.is_dir() else (place,):
            if _has_idx(folder):
                return ImagePlace(folder, _idx_split(split, source))
            if _classes(folder):
                if folder is inner:
                    return ImagePlace(inner, split)
                _require_whole(split, place)
                return ImagePlace(place)
        if splits := sorted(p.name for p in place.iterdir() if p.is_dir() and _classes(p)):
            raise CompressError(
                f"a split of the images in {place}", repr(split), f"There are {', '.join(splits)}"
            )
    return None


def _has_idx(folder: Path) -> bool:
    return any(folder.glob("*-images-idx3-ubyte*"))


def _idx_split(split: str, source: str) -> str:
    """The split that IDX files and the digits have for what an evaluation calls validation."""
    known = {"train": "train", "test": "test", "validation": "test"}
    if split not in known:
        raise CompressError(f"the split train or test of {source}", repr(split), "Set split")
    return known[split]


def _array_place(path: Path, split: str) -> ImagePlace:
    try:
        with np.load(path, allow_pickle=False) as held:
            names = set(held)
    except _UNREADABLE:  # reading it tells
        return ImagePlace(path)
    if names & {template.format(split=split) for template in _OF_SPLIT}:
        return ImagePlace(path, split)
    _require_whole(split, path)
    return ImagePlace(path)


def _require_whole(split: str, place: Path) -> None:
    """Refuse a split of a place that has none of this name."""
    if split not in _WHOLE:
        raise CompressError(
            f"a split of the images in {place}", f"{split!r}, and the place has no such split",
            "Put it there, or set split: all, and part, so that nothing is measured on what was "
            "learned from: head:0.8 to train and calibrate on, tail:0.2 to evaluate on",
        )  # fmt: skip


def _places(source: str, data_root: str | Path | None) -> list[Path]:
    if any(c in source for c in "*?["):
        return []
    own = [user_path(source, "a file, a folder or the id of a data set")]
    return own if data_root is None else [at_home(data_root) / source, *own]


def image_rows_of(
    place: ImagePlace, image: str | None, label: str | None, limit: int | None = None
) -> list[dict[str, Any]]:
    """Rows with the columns image and label, in the order of the place.

    Images of a class lie together in its folder, so those of class folders are in the order of a
    hash of their names: the first of them, or a part, are of every class, and the same ones on
    every machine.

    Args:
        place: what :func:`image_place` has found.
        limit: rows, at most.
        image, label: names of the arrays in an .npz file, where they are not usual ones.

    Raises:
        CompressError: arrays that are missing or do not belong together, IDX files that do not
            parse.
    """
    path = place.path
    if path is None or (path.is_dir() and _has_idx(path)):
        part = "train" if place.split == "train" else "test"
        source = DIGITS if path is None else str(path)
        found = load_images(ImageSpec(source=source, split=part, limit=limit))
        pixels = (found.pixels * 255).round().to(torch.uint8).numpy()
        return _rows(pixels, found.labels.numpy())
    if path.is_file():
        images, labels = _arrays(path, place.split, image, label)
        return _rows(images[:limit], labels[:limit])
    files = [
        file
        for folder in _classes(path)
        for file in folder.iterdir()
        if file.suffix.lower() in _FILES
    ]
    files.sort(key=lambda file: _mixed(file.relative_to(path)))
    return [{"image": str(file), "label": file.parent.name} for file in files[:limit]]


def _mixed(name: Path) -> bytes:
    """A key that has nothing to do with the order of names."""
    return hashlib.sha256(os.fsencode(name.as_posix())).digest()


def class_names(place: ImagePlace) -> tuple[str, ...]:
    """The classes of a folder by number: the names of its folders, in order."""
    if place.path is None or not place.path.is_dir():
        return ()
    return tuple(folder.name for folder in _classes(place.path))


def _classes(folder: Path) -> list[Path]:
    """Folders with images, at least two of them."""
    inner = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    found = [p for p in inner if any(f.suffix.lower() in _FILES for f in p.iterdir())]
    return found if len(found) > 1 else []


def _arrays(
    path: Path, split: str, image: str | None, label: str | None
) -> tuple[np.ndarray, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as held:
            names = {
                what: next((n for n in wanted if n in held), None)
                for what, wanted in (
                    ("image", [image] if image else [n.format(split=split) for n in _IMAGES]),
                    ("label", [label] if label else [n.format(split=split) for n in _LABELS]),
                )
            }
            if None in names.values():
                raise CompressError(
                    f"arrays of images and of labels in {path}", ", ".join(held) or "none",
                    "Name them (image, label)",
                )  # fmt: skip
            images, labels = held[names["image"]], held[names["label"]]
    except _UNREADABLE as error:
        raise CompressError(f"a readable {_ARRAYS} file", f"{path}: {error}") from error
    if images.ndim not in (3, 4) or labels.reshape(-1).shape != images.shape[:1]:
        raise CompressError(
            "images [n, height, width] or [n, height, width, channels], and n labels",
            f"arrays of shape {list(images.shape)} and {list(labels.shape)} in {path}",
        )
    return images, labels.reshape(-1)


def _rows(images: np.ndarray, labels: np.ndarray) -> list[dict[str, Any]]:
    pairs = zip(images, labels.tolist(), strict=True)
    return [{"image": image, "label": label} for image, label in pairs]


def undecoded(table: Any) -> Any:
    """A data set of ``datasets`` whose images come as the bytes that they are stored in, to be
    decoded when they are needed; anything else as it is."""
    features = getattr(table, "features", None)
    if not isinstance(features, Mapping):
        return table
    import datasets

    for name, feature in features.items():
        if isinstance(feature, datasets.Image):
            table = table.cast_column(name, datasets.Image(decode=False))
    return table


def picture(value: Any) -> np.ndarray:
    """An image as an array [height, width, channels] from 0 to 255.

    Args:
        value: an array, a tensor or nested lists; an image of Pillow; a path; or what a data set
            has of one, a mapping with ``bytes`` or ``path``.

    Raises:
        CompressError: something else, values outside, an encoded image without Pillow.
    """
    if isinstance(value, (str, Path)):
        path = Path(value)
        if path.suffix.lower() != ".npy":
            return _decoded(path, str(path))
        try:
            value = np.load(path, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise CompressError("an array in a .npy file", f"{path}: {error}") from error
    elif isinstance(value, Mapping):
        held, path = value.get("bytes"), value.get("path")
        if isinstance(held, Mapping):  # as they come from a hub
            held = base64.b64decode(held["base64"])
        if held is None and path is None:
            raise CompressError(FORMS, f"a mapping of {', '.join(map(str, value))}")
        return _decoded(io.BytesIO(held) if held is not None else Path(path), str(path))
    elif hasattr(value, "getbands"):  # Pillow's own
        value = np.asarray(value if value.mode in ("L", "RGB") else value.convert("RGB"))
    return _checked(value)


def _checked(value: Any) -> np.ndarray:
    try:
        array = np.asarray(value.detach().cpu() if isinstance(value, torch.Tensor) else value)
    except (TypeError, ValueError) as error:
        raise CompressError(FORMS, f"{type(value).__name__} ({error})") from None
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or not array.size or array.dtype.kind not in "uif":
        raise CompressError(FORMS, f"{array.dtype} of shape {list(array.shape)}")
    if array.shape[-1] not in _CHANNELS and array.shape[0] in _CHANNELS:
        array = array.transpose(1, 2, 0)
    if array.shape[-1] not in _CHANNELS:
        raise CompressError(FORMS, f"shape {list(array.shape)}")
    low, high, most = array.min(), array.max(), 1 if array.dtype.kind == "f" else 255
    if not (low >= 0 and high <= most):  # also NaN
        raise CompressError(FORMS, f"{array.dtype} from {low:g} to {high:g}")
    return array * 255.0 if array.dtype.kind == "f" else array


def _decoded(file: Any, name: str) -> np.ndarray:
    try:
        from PIL import Image
    except ImportError:
        raise CompressError(
            "Pillow, to decode images with", f"none, for {name}",
            "pip install 'compress-transformers[images]', or give arrays (.npz, .npy)",
        ) from None  # fmt: skip
    try:
        with Image.open(file) as image:
            return picture(image)
    except (OSError, ValueError) as error:
        raise CompressError("an image that can be decoded", f"{name}: {error}") from error


def in_channels(array: np.ndarray, channels: int) -> np.ndarray:
    """An image in so many channels: grey becomes three alike, transparency goes.

    Raises:
        CompressError: colours for a model that reads grey images.
    """
    have = array.shape[-1]
    if have == 4:
        array, have = array[..., :3], 3
    if have == 1 and channels > 1:
        return np.repeat(array, channels, axis=-1)
    if have != channels:
        raise CompressError(
            f"images of {channels} channel{'s' if channels != 1 else ''}, as the model reads them",
            f"{have}", "Convert them",
        )  # fmt: skip
    return array


def images_digest(images: Sequence[Any]) -> str:
    """sha256, as hex, of images as they are held: arrays with their shapes, or encoded bytes."""
    total = hashlib.sha256()
    for value in images:
        content = _content(value)
        total.update(f"{len(content)}:".encode())
        total.update(content)
    return total.hexdigest()


def images_bytes(images: Sequence[Any]) -> int:
    """Bytes of images as they are held."""
    return sum(
        Path(v).stat().st_size if isinstance(v, (str, Path)) else len(_content(v)) for v in images
    )


def _content(value: Any) -> bytes:
    if isinstance(value, (str, Path)):
        try:
            return Path(value).read_bytes()
        except OSError as error:
            raise CompressError("an image file", f"{value}: {error.strerror}") from error
    if isinstance(value, Mapping):
        held = value.get("bytes")
        if isinstance(held, Mapping):
            held = base64.b64decode(held["base64"])
        return held if held is not None else _content(value["path"])
    array = value if isinstance(value, np.ndarray) else picture(value)
    return f"{array.dtype}{array.shape}".encode() + np.ascontiguousarray(array).tobytes()
