"""Download from a hub that may fall silent: in a process of its own, ended when nothing comes.

The hub's library waits, tries again and obeys a hub that asks for an hour of patience, in threads
that nothing can stop; a byte a second counts as life. What is watched here is what arrives.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from compress.errors import CompressError

SILENCE = 60.0  # seconds in which at least one piece has to arrive
PIECE = 64 * 1024  # bytes: with SILENCE, about 1 kB/s are too slow to wait for
_LOOK = 0.2  # seconds


class DownloadError(Exception):
    """What the hub's library raised in the other process.

    Attributes:
        types: names of the error's class and its bases.
    """

    def __init__(self, types: list[str], text: str) -> None:
        super().__init__(text)
        self.types = tuple(types)


def snapshot(repo_id: str, cache: Path, **options: Any) -> Path:
    """``huggingface_hub.snapshot_download`` of a model that does not wait for ever.

    Args:
        cache: the hub cache, where what has arrived is seen.
        options: further arguments of ``snapshot_download``, as plain data.

    Raises:
        CompressError: nothing has arrived for a minute.
        DownloadError: what the library says.
    """
    arguments = {"repo_id": repo_id, "cache_dir": str(cache), **options}
    worker = Path(__file__).with_name("hub_worker.py")
    with subprocess.Popen(
        [sys.executable, "-P", str(worker)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    ) as process:  # fmt: skip
        try:
            process.stdin.write(json.dumps([arguments, PIECE]) + "\n")
            process.stdin.flush()  # it stays open: its end tells the worker that we are gone
            said = _answer(process, repo_id, cache / f"models--{repo_id.replace('/', '--')}")
        finally:
            process.kill()
    try:
        answer = json.loads(said)
    except ValueError:
        raise DownloadError(["OSError"], "the download ended without a word") from None
    if "folder" not in answer:
        raise DownloadError(answer["types"], answer["text"])
    return Path(answer["folder"])


def _answer(process: subprocess.Popen[str], repo_id: str, folder: Path) -> str:
    """What the worker prints, as long as something arrives in ``folder``."""
    lines: list[str] = []
    reader = threading.Thread(target=lambda: lines.append(process.stdout.readline()), daemon=True)
    reader.start()
    arrived, since = (-1, -1), time.monotonic()
    while reader.is_alive():
        now = _arrived(folder)
        if now != arrived:
            arrived, since = now, time.monotonic()
        if time.monotonic() - since > SILENCE:
            raise CompressError(
                f"the files of {repo_id} from the hub",
                f"less than {PIECE // 1024} kB in {SILENCE:.0f} s ({arrived[1] / 1e6:.1f} MB "
                "before)",
                "Run the command again: what has arrived is kept; or set HF_ENDPOINT to a mirror, "
                "or give a local folder",
            )
        reader.join(_LOOK)
    return lines[0]


def _arrived(folder: Path) -> tuple[int, int]:
    """Number and bytes of the files in a repository's cache."""
    count = size = 0
    for place in (folder / "blobs", folder / "snapshots"):
        for path in place.rglob("*"):
            try:
                size += path.lstat().st_size
            except FileNotFoundError:
                continue  # renamed meanwhile: it is counted next time
            count += 1
    return count, size
