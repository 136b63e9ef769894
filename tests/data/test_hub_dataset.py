"""A data set streamed from a server on this machine that speaks the hub's protocol."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
import urllib.parse
from pathlib import Path

import pytest

from compress.data.text import TextSpec, load_text

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ROWS = ["", " = Title = \n", "", " Body of the text . \n"]
DATA = "".join(json.dumps({"text": row, "n": i}) + "\n" for i, row in enumerate(ROWS)).encode()
FILES = {"test.jsonl": DATA, "train.jsonl": DATA * 2, "README.md": b"# data\n"}


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        repo = path.removeprefix("/api/datasets/").removeprefix("/datasets/")
        if not repo.startswith(("owner/lines", "Salesforce/wikitext")):
            self.send(404, b"{}", **{"X-Error-Code": "RepoNotFound"})
        elif "/resolve/" in path:
            self.send_file(path.rpartition("/")[2])
        elif "/tree/" in path:
            self.send_json([entry(name) for name in FILES])
        elif "/revision/" in path or repo.count("/") == 1:
            siblings = [{"rfilename": name} for name in FILES]
            name = "/".join(repo.split("/")[:2])
            fixed = {"private": False, "tags": [], "downloads": 0, "likes": 0}
            self.send_json({"id": name, "sha": COMMIT, "siblings": siblings, **fixed})
        else:
            self.send(404, b"{}", **{"X-Error-Code": "EntryNotFound"})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if "json" in self.headers.get("Content-Type", ""):
            paths = json.loads(body)["paths"]
        else:
            paths = urllib.parse.parse_qs(body.decode())["paths"]
        self.send_json([entry(path) for path in paths if path in FILES])

    def send_file(self, name: str) -> None:
        data = FILES.get(name)
        if data is None:
            return self.send(404, b"", **{"X-Error-Code": "EntryNotFound"})
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
        wanted = self.headers.get("Range")
        if wanted is None:
            return self.send(200, data, **headers)
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        part = data[int(first) : int(last or len(data)) + 1]
        span = f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}"
        return self.send(206, part, **headers, **{"Content-Range": span})

    def send_json(self, reply) -> None:
        self.send(200, json.dumps(reply).encode(), **{"Content-Type": "application/json"})

    def send(self, status: int, data: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *args) -> None:
        pass


def entry(name: str) -> dict:
    oid = hashlib.sha1(FILES[name]).hexdigest()
    return {"type": "file", "path": name, "size": len(FILES[name]), "oid": oid}


@pytest.fixture
def endpoint():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


CODE = """
import json, sys
from compress.data.text import TextSpec, load_text
from compress.errors import CompressError

for spec in json.loads(sys.argv[1]):
    try:
        text = load_text(TextSpec(**spec))
        print(json.dumps([list(text.documents), text.description]))
    except CompressError as error:
        print(json.dumps(str(error)))
"""


def ask(endpoint: str, home: Path, *specs: dict) -> list:
    """Load texts in a fresh process: the libraries read the hub's address when imported."""
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", CODE, json.dumps(specs)],
        env={**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "PYTHONPATH": root},
        capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def local_copies(folder: Path, split: str) -> list[Path]:
    """Data roots with the split as rows, as the original file, and without its blank lines."""
    rows = [json.loads(line)["text"] for line in FILES[f"{split}.jsonl"].decode().splitlines()]
    forms = {"rows.jsonl": FILES[f"{split}.jsonl"].decode(), "file.txt": "".join(
        row or " \n" for row in rows
    )}  # fmt: skip
    if split == "train":
        forms["lines.txt"] = "".join(rows)
    roots = []
    for name, content in forms.items():
        root = folder / f"{split}-{name}"
        (root / "Salesforce/wikitext/default").mkdir(parents=True)
        suffix = Path(name).suffix
        path = root / f"Salesforce/wikitext/default/{split}{suffix}"
        path.write_text(content, encoding="utf-8")
        roots.append(root)
    return roots


def test_rows_from_a_hub(endpoint, tmp_path):
    plain = {"source": "owner/lines", "split": "test"}
    wikitext = {"source": "Salesforce/wikitext", "subset": "default"}
    rows, limited, lines, train, field, split, repo = ask(
        endpoint, tmp_path, plain, {**plain, "limit": 1},
        {**wikitext, "split": "test"}, {**wikitext, "split": "train"},
        {**plain, "field": "txt"}, {**plain, "split": "nope"}, {"source": "owner/none"},
    )  # fmt: skip
    assert rows == [[ROWS[1], ROWS[3]], "owner/lines test"]
    assert limited[0] == [ROWS[1]]
    # The lines of WikiText become the original file again, blank lines included.
    assert lines[0] == [" \n = Title = \n \n Body of the text . \n"]
    # Training text goes without them, as its usual local copy does.
    assert train[0] == [" = Title = \n Body of the text . \n" * 2]
    for found, split_name in ((lines, "test"), (train, "train")):
        for local in local_copies(tmp_path, split_name):
            spec = TextSpec(**wikitext, split=split_name)
            assert [load_text(spec, local).text] == found[0], local.name
    assert "Did you mean 'text'?" in field
    assert "'nope'" in split and "test" in split
    assert "'owner/none', which is neither" in repo
