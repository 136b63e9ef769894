"""How data lie on the disk beside plain files: packed with gzip, or saved by ``datasets``."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from compress.data.pictures import undecoded
from compress.errors import CompressError
from compress.system.memory import available

PACKED = ".gz"
_SHARE = 3  # of free memory that unpacked bytes may take is one in so many: a text has copies
# What Dataset.save_to_disk and DatasetDict.save_to_disk leave in a folder.
_SAVED, _SPLITS = ("dataset_info.json", "state.json"), "dataset_dict.json"


def is_packed(path: Path) -> bool:
    """Whether a file's name says that it is packed."""
    return path.suffix.lower() == PACKED


def opened(path: Path, newline: str | None = None) -> IO[str]:
    """A file of UTF-8 text, unpacked where it is packed.

    Args:
        newline: as :func:`open` takes it.

    Raises:
        ValueError: it is packed and does not unpack.
        CompressError: unpacked it would not fit into memory.
    """
    if not is_packed(path):
        return path.open(encoding="utf-8", newline=newline)
    return io.TextIOWrapper(io.BytesIO(_unpacked(path)), encoding="utf-8", newline=newline)


def plain(path: Path) -> Any:
    """What pyarrow reads: the path, or the unpacked bytes; errors are those of :func:`opened`."""
    return io.BytesIO(_unpacked(path)) if is_packed(path) else path


def _unpacked(path: Path) -> bytes:
    most = available() // _SHARE
    try:
        with gzip.open(path) as file:
            content = file.read(most + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"not packed with gzip ({error})") from error
    if len(content) > most:
        raise CompressError(
            f"a file that unpacks to at most {most / 1e9:.1f} GB, a third of the free memory",
            f"{path}, which is larger", "Take a part of it: calibration needs a few MB",
        )  # fmt: skip
    return content


def is_saved(path: Path) -> bool:
    """Whether a folder holds a data set that ``Dataset.save_to_disk`` wrote."""
    return path.is_dir() and all((path / name).is_file() for name in _SAVED)


def saved_splits(path: Path) -> list[str]:
    """Splits in a folder that ``DatasetDict.save_to_disk`` wrote; none in any other."""
    if not path.is_dir() or not (path / _SPLITS).is_file():
        return []
    return sorted(inner.name for inner in path.iterdir() if is_saved(inner))


def saved_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a saved data set, read as they are asked for.

    Raises:
        CompressError: it does not load.
    """
    yield from undecoded(_loaded(path))


def saved_classes(path: Path) -> dict[str, tuple[str, ...]]:
    """As :func:`classes_of`, of a saved data set.

    Raises:
        CompressError: it does not load.
    """
    return classes_of(_loaded(path))


def _loaded(path: Path) -> Any:
    import datasets

    try:
        return datasets.load_from_disk(str(path))
    except Exception as error:  # pyarrow, json and datasets each have errors of their own
        told = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise CompressError("a data set that save_to_disk wrote", f"{path}: {told}") from error


def classes_of(table: Any) -> dict[str, tuple[str, ...]]:
    """The names of labels by number, for each column where a data set of ``datasets`` tells them
    (``ClassLabel``), also in lists of labels; nothing of anything else."""
    features = getattr(table, "features", None)
    if not isinstance(features, Mapping):
        return {}
    import datasets

    inner = {name: getattr(feature, "feature", feature) for name, feature in features.items()}
    labels = {n: f.names for n, f in inner.items() if isinstance(f, datasets.ClassLabel)}
    return {name: tuple(names) for name, names in labels.items() if names}
