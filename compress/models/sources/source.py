"""Where a model comes from: a folder, a hub, a wheel on a package index, or a GGUF file.

Every source becomes one local folder with config.json, safetensors and, if there is one, the
tokenizer; everything after this module reads folders.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from compress.errors import CompressError
from compress.models.loading import (
    auto_class,
    load_config,
    load_model,
    load_tokenizer,
)
from compress.models.sources import hub, pypi
from compress.models.sources.cache import cached_folder, default_cache, locked
from compress.models.sources.gguf import describe_gguf, gguf_to_folder, is_gguf
from compress.system.intake import at_home, special_files, user_path
from compress.system.tensors import file_sha256

__all__ = ["Source", "auto_class", "load_config", "load_model", "load_tokenizer", "resolve"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class Shipped:
    """The file that holds the weights in another format than the folder that was made of it."""

    bytes: int
    format: str


@dataclass(frozen=True)
class Source:
    """A model's folder and where it came from.

    Attributes:
        folder: config.json, safetensors, tokenizer; not to be written to.
        origin: the source as a user would write it, pinned to the version found.
        kind: folder, hub, pypi or gguf.
        revision: the commit (hub) or version (pypi) it is pinned to.
        digest: sha256 of the file it was made from (pypi, gguf); None where the folder itself is
            the source: ``TensorIndex.digest`` hashes the weights.
        license: as the source states it, if it does.
        notes: what a report should say about the source, as sentences without the full stop.
        shipped: what the folder was unpacked from (a GGUF file), None where it was not: a result is
            to be compared with that, not with its unpacked form.
    """

    folder: Path
    origin: str
    kind: str
    revision: str | None = None
    digest: str | None = None
    license: str | None = None
    notes: tuple[str, ...] = ()
    shipped: Shipped | None = None


def resolve(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    trust_remote_code: bool = False,
) -> Source:
    """Find or fetch the model that ``source`` names.

    Args:
        source: a folder, a .gguf file, a hub id (``owner/name``), or
            ``pypi:<name>==<version>[#<model in it>][@sha256:<hex>]``. What exists as a path is
            taken as one.
        revision: branch, tag or commit, for a hub id only.
        cache_dir: where fetched and converted models are kept. The default is
            ``$XDG_CACHE_HOME/compress`` or ``~/.cache/compress``, and for hub snapshots the cache
            that the Hugging Face libraries share.
        trust_remote_code: fetch a hub repository's Python files too (running them is up to
            :func:`load_model`).

    Raises:
        CompressError: the source is none of these, cannot be reached, or is not safe to use.
    """
    text = os.fspath(source)
    cache = at_home(cache_dir) if cache_dir is not None else default_cache()
    pypi = text.startswith("pypi:")
    path = user_path("" if pypi else text, "a model's folder, file or id")
    if revision is not None and (pypi or path.exists()):
        raise CompressError("a revision with a hub id only", f"revision {revision!r} for {text!r}")
    if pypi:
        return _from_pypi(text, cache)
    if text and path.is_dir():  # Path("") is the current folder
        return _from_folder(path, cache)
    if path.is_file():
        return _from_file(path, cache)
    if not _HUB_ID.fullmatch(text):
        raise CompressError(
            "an existing folder, a .gguf file, a hub id (owner/name) or pypi:<name>==<version>",
            repr(text), "Check the path" if os.sep in text else "Check the spelling",
        )  # fmt: skip
    shot = hub.fetch(
        text, revision=revision, trust_remote_code=trust_remote_code,
        cache_dir=None if cache_dir is None else cache / "hub",
    )  # fmt: skip
    return Source(
        shot.folder, f"{text}@{shot.commit}", "hub", shot.commit, None, shot.license, shot.notes
    )


def _from_folder(folder: Path, cache: Path) -> Source:
    if special := special_files(folder):
        raise CompressError(
            f"files and folders only in {folder}", f"{special[0]!r}, a FIFO, socket or device",
            "Reading such a thing may never end: remove it",
        )  # fmt: skip
    ggufs = sorted(folder.glob("*.gguf"))
    if ggufs and not (folder / "config.json").exists():
        if len(ggufs) > 1:
            raise CompressError(
                f"one GGUF file in {folder}", ", ".join(path.name for path in ggufs[:5]),
                "Give the path of one of them",
            )  # fmt: skip
        return _from_file(ggufs[0], cache)
    return Source(folder.resolve(), str(folder), "folder")


def _from_file(path: Path, cache: Path) -> Source:
    if not is_gguf(path):
        raise CompressError(
            "a folder or a GGUF file", f"the file {str(path)!r}, which is neither",
            "Give the folder that holds it",
        )  # fmt: skip
    digest = file_sha256(path)
    folder = cache / "models" / f"gguf-{digest[:24]}-v{pypi.CONVERTER}"

    def build(target: Path) -> dict[str, str]:
        gguf_to_folder(path.resolve(), target)
        return {"origin": path.name, "sha256": digest}

    with locked(cache, folder.name):
        cached_folder(folder, build)
    note = "the reference is the dequantised GGUF file, whose weights are rounded already"
    shipped = Shipped(path.stat().st_size, describe_gguf(path))
    return Source(folder, str(path), "gguf", None, digest, None, (note,), shipped)


def _from_pypi(text: str, cache: Path) -> Source:
    folder, record = pypi.fetch(text, cache)
    notes = []
    if record["member"].lower().endswith(".gguf"):
        notes.append(
            f"the reference is {Path(record['member']).name} dequantised to float32: its weights "
            "are rounded already"
        )
    if record["pinned"] == "recorded":
        notes.append(
            f"no known checksum: sha256 {record['sha256']} was recorded at the first download"
        )
    origin = f"{record['origin']}#{record['member']}@sha256:{record['sha256']}"
    version = record["origin"].partition("==")[2]
    shipped = Shipped(*record["shipped"]) if record["shipped"] else None
    return Source(
        folder, origin, "pypi", version, record["sha256"], record["license"], tuple(notes), shipped
    )
