"""Ask a hub for something that may never come; run by :mod:`compress.system.hub_process`.

Reads a line of JSON and prints lines of JSON. It imports nothing of the toolkit, so that it starts
at once, and ends when the process that started it does.
"""

from __future__ import annotations

import base64
import json
import os
import sys
import threading
from collections.abc import Callable
from typing import Any

STARTED = {"started": True}  # said when all is imported, which can take long on a busy machine


def download(say: Callable[[dict], None], piece: int, **options: Any) -> None:
    """The folder of a snapshot."""
    from huggingface_hub import constants, snapshot_download

    # What has arrived shows in the file's size, by which the other process sees that something does
    constants.DOWNLOAD_CHUNK_SIZE = piece
    say(STARTED)
    say({"folder": snapshot_download(**options)})


def rows(say: Callable[[dict], None], dataset: str, subset: str | None, split: str) -> None:
    """The rows of a data set, one after the other; bytes come in base64, other values that are no
    plain data are left out."""
    import datasets

    say(STARTED)
    found = datasets.load_dataset(dataset, subset, split=split, streaming=True)
    for name, feature in (found.features or {}).items():
        if isinstance(feature, datasets.Image):  # as they are stored: whoever uses them decodes
            found = found.cast_column(name, datasets.Image(decode=False))
    for row in found:
        say({"row": dict(row)})
    say({"end": True})


def main() -> None:
    request = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer

    def say(answer: dict) -> None:
        print(json.dumps(answer, default=_plain), file=answers, flush=True)

    try:
        {"download": download, "rows": rows}[request.pop("task")](say, **request)
    except Exception as error:
        say({"types": [c.__name__ for c in type(error).__mro__], "text": str(error)})
    os._exit(0)  # threads of a pool that still wait for an answer would be waited for


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return {"base64": base64.b64encode(value).decode("ascii")}
    return None


def _end_with_parent() -> None:
    sys.stdin.read()  # returns when the other end is closed, however that process ended
    os._exit(1)


if __name__ == "__main__":
    main()
