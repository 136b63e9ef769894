"""Download a model from a hub as long as something arrives.

To wait is not enough of a rule: a hub that sends a byte a second never lets a wait end. What is
watched is what arrives in the cache.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from compress.errors import CompressError
from compress.system import hub_process

PIECE = 64 * 1024  # bytes at least, in SILENCE: about 1 kB/s are too slow to wait for
_LOOK = 0.2  # seconds


def snapshot(repo_id: str, cache: Path, **options: Any) -> Path:
    """``huggingface_hub.snapshot_download`` of a model that does not wait for ever.

    Args:
        cache: the hub cache, where what has arrived is seen.
        options: further arguments of ``snapshot_download``, as plain data.

    Raises:
        CompressError: nothing has arrived for a minute.
        HubError: what the library says.
    """
    folder = cache / f"models--{repo_id.replace('/', '--')}"
    arrived, since = (-1, -1), time.monotonic()
    with hub_process.asked(
        "download", piece=PIECE, repo_id=repo_id, cache_dir=str(cache), **options
    ) as asked:
        while True:
            try:
                return Path(asked.answer(_LOOK)["folder"])
            except TimeoutError:
                now = _arrived(folder)
            if now != arrived:
                arrived, since = now, time.monotonic()
            if time.monotonic() - since > hub_process.SILENCE:
                raise CompressError(
                    f"the files of {repo_id} from the hub",
                    f"less than {PIECE // 1024} kB in {hub_process.SILENCE:.0f} s "
                    f"({arrived[1] / 1e6:.1f} MB before)",
                    "Run the command again: what has arrived is kept; or set HF_ENDPOINT to a "
                    "mirror, or give a local folder",
                )


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
