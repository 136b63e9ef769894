"""Fetch one snapshot from a hub; a script that :mod:`compress.models.hub_download` runs.

Reads a line of JSON (the arguments of ``snapshot_download``) and prints one: the folder, or the
error's types and text. It imports nothing of the toolkit, so that it starts at once.
"""

from __future__ import annotations

import json
import os
import sys
import threading


def _end_with_parent() -> None:
    sys.stdin.read()  # returns when the other end is closed, however that process ended
    os._exit(1)


def main() -> None:
    arguments, piece = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    answers = sys.stdout
    sys.stdout = sys.stderr  # what libraries print is no answer
    try:
        from huggingface_hub import constants, snapshot_download

        # What has arrived shows in the file's size, by which the parent sees that something does.
        constants.DOWNLOAD_CHUNK_SIZE = piece
        answer = {"folder": snapshot_download(**arguments)}
    except Exception as error:
        answer = {"types": [c.__name__ for c in type(error).__mro__], "text": str(error)}
    print(json.dumps(answer), file=answers, flush=True)
    os._exit(0)  # threads of a pool that still wait for an answer would be waited for


if __name__ == "__main__":
    main()
