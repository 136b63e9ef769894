"""Labelled images: from folders, arrays, tables, data sets and memory, as arrays of pixels.

An encoded image (a .png or .jpg, bytes in a data set) needs Pillow, an optional extra; arrays need
nothing.
"""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Mapping, Sequence
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
_IMAGES = ("images", "image", "x_{split}", "x")
_LABELS = ("labels", "label", "y_{split}", "y")
_CHANNELS = (1, 3, 4)
FORMS = (
    "an image: an array or a tensor [height, width], [height, width, channels] or [channels, "
    "height, width] of whole numbers from 0 to 255 or fractions from 0 to 1, an image of Pillow, "
    "or a file"
)


def image_place(source: str, split: str, data_root: str | Path | None) -> Path | None:
    """Where labelled images lie that are no table: an .npz file, a folder of IDX files, a folder
    with a folder for each class (below one for the split, where there is such a one). None where
    the source is nothing of that.

    Args:
        data_root: searched by the source's name before the working directory.
    """
    for place in _places(source, data_root):
        if place.suffix.lower() == _ARRAYS and place.is_file():
            return place
        if place.is_dir():
            inner = place / split
            for folder in (inner, place) if inner.is_dir() else (place,):
                if any(folder.glob("*-images-idx3-ubyte*")) or _classes(folder):
                    return folder
    return None


def _places(source: str, data_root: str | Path | None) -> list[Path]:
    if any(c in source for c in "*?["):
        return []
    own = [user_path(source, "a file, a folder or the id of a data set")]
    return own if data_root is None else [at_home(data_root) / source, *own]


def image_rows_of(
    split: str, place: Path | None, image: str | None, label: str | None, limit: int | None = None
) -> list[dict[str, Any]]:
    """Rows with the columns image and label.

    Args:
        place: what :func:`image_place` has found; None for the digits of scikit-learn.
        limit: rows, at most.
        image, label: names of the arrays in an .npz file, where they are not usual ones.

    Raises:
        CompressError: arrays that are missing or do not belong together, IDX files that do not
            parse.
    """
    if place is None or any(place.glob("*-images-idx3-ubyte*")):
        part = "train" if split == "train" else "test"
        source = DIGITS if place is None else str(place)
        found = load_images(ImageSpec(source=source, split=part, limit=limit))
        pixels = (found.pixels * 255).round().to(torch.uint8).numpy()
        return _rows(pixels, found.labels.numpy())
    if place.is_file():
        images, labels = _arrays(place, split, image, label)
        return _rows(images[:limit], labels[:limit])
    return [
        {"image": str(path), "label": folder.name}
        for folder in _classes(place)
        for path in sorted(folder.iterdir())
        if path.suffix.lower() in _FILES
    ]


def class_names(place: Path | None) -> tuple[str, ...]:
    """The classes of a folder by number: the names of its folders, in order."""
    if place is None or not place.is_dir():
        return ()
    return tuple(folder.name for folder in _classes(place))


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
    except (OSError, ValueError) as error:
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
