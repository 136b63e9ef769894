"""The hub path against a server on this machine that speaks the hub's protocol."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import os
import re
import resource
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from compress.errors import CompressError
from compress.models.sources import hub
from compress.models.sources.source import Source, load_model, resolve
from compress.system import hub_process
from compress.system.tensors_header import INDEX

COMMIT = "0123456789abcdef0123456789abcdef01234567"
API = re.compile(r"/api/models/([\w.-]+(?:/[\w.-]+)?)(?:/(revision|tree)/([^/?]+))?$")
FILE = re.compile(r"/([\w.-]+(?:/[\w.-]+)?)/resolve/([^/]+)/(.+)$")


class Handler(http.server.BaseHTTPRequestHandler):
    """Model info, tree, HEAD and GET of files, as huggingface_hub asks for them."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.answer(body=True)

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def answer(self, *, body: bool) -> None:
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        self.server.asked.append(f"{self.command} {path}")
        if (file := FILE.match(path)) is not None:
            return self.send_file(*file.groups(), body=body)
        if (api := API.match(path)) is not None:
            return self.send_api(*api.groups(), body=body)
        return self.send(404, b"", body=body)

    def send_api(self, repo, what, revision, *, body) -> None:
        files = self.server.repos.get(repo)
        if files is None:
            return self.send(404, b"{}", body=body, **{"X-Error-Code": "RepoNotFound"})
        if revision not in (None, "main", COMMIT):
            return self.send(404, b"{}", body=body, **{"X-Error-Code": "RevisionNotFound"})
        if what == "tree":
            reply = [
                {"type": "file", "path": name, "size": len(data),
                 "oid": hashlib.sha1(data).hexdigest()}
                for name, data in files.items()
            ]  # fmt: skip
        else:
            reply = {
                "id": repo, "sha": COMMIT, "private": False, "tags": [], "downloads": 0,
                "likes": 0, "cardData": {"license": "apache-2.0"},
                "siblings": [{"rfilename": name} for name in files],
            }  # fmt: skip
        return self.send(200, json.dumps(reply).encode(), body=body,
                         **{"Content-Type": "application/json"})  # fmt: skip

    def send_file(self, repo, revision, name, *, body) -> None:
        data = self.server.repos.get(repo, {}).get(name)
        if data is None or revision not in ("main", COMMIT):
            return self.send(404, b"", body=body, **{"X-Error-Code": "EntryNotFound"})
        if body and self.server.silent:
            return self.drip(data)
        etag = hashlib.sha1(data).hexdigest()
        return self.send(200, data, body=body, ETag=f'"{etag}"', **{"X-Repo-Commit": COMMIT})

    def drip(self, data: bytes) -> None:
        """A byte now and then: no wait for an answer ever ends."""
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        with contextlib.suppress(OSError):
            for byte in data:
                self.wfile.write(bytes([byte]))
                time.sleep(0.1)

    def send(self, status: int, data: bytes, *, body: bool, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def server():
    made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.repos, made.asked, made.silent = {}, [], False
    made.url = f"http://127.0.0.1:{made.server_port}"
    threading.Thread(target=made.serve_forever, args=(0.02,), daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        vocab_size=64,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def files_of(model, folder: Path, **options) -> dict[str, bytes]:
    model.save_pretrained(folder, **options)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


EXTRAS = {
    "pytorch_model.bin": b"pickle", "model.pt": b"pickle", "consolidated.safetensors": b"again",
    "onnx/model.onnx": b"other", "modeling_own.py": b"raise SystemExit", "README.md": b"# Tiny",
    "sub/model.safetensors": b"other", "rust_model.ot": b"other", "tokenizer.model": b"pieces",
}  # fmt: skip


@pytest.mark.parametrize("sharded", [False, True])
def test_fetches_what_is_needed_and_nothing_else(server, model, tmp_path, sharded):
    files = files_of(model, tmp_path / "src", **({"max_shard_size": "20KB"} if sharded else {}))
    assert (INDEX in files) == sharded
    server.repos["owner/tiny"] = files | EXTRAS
    shot = hub.fetch("owner/tiny", cache_dir=tmp_path / "cache", endpoint=server.url)
    assert shot.commit == COMMIT and shot.license == "apache-2.0" and shot.notes == ()
    fetched = {str(p.relative_to(shot.folder)) for p in shot.folder.rglob("*") if p.is_file()}
    assert fetched == set(files) | {"README.md", "tokenizer.model"}
    for name in files:
        assert (shot.folder / name).read_bytes() == files[name]
    assert not any("pytorch_model" in line or ".py" in line for line in server.asked)
    loaded = load_model(shot.folder)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


def test_second_fetch_downloads_nothing(server, model, tmp_path):
    server.repos["tiny"] = files_of(model, tmp_path / "src")
    first = hub.fetch("tiny", cache_dir=tmp_path / "cache", endpoint=server.url)
    server.asked.clear()
    assert hub.fetch("tiny", cache_dir=tmp_path / "cache", endpoint=server.url) == first
    assert not any(line.startswith("GET") and "/resolve/" in line for line in server.asked)


def test_fetches_in_a_process_with_many_open_files(server, model, tmp_path):
    server.repos["tiny"] = files_of(model, tmp_path / "src")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2048:
        pytest.skip(f"only {hard} files may be open")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2048), hard))
    try:
        with contextlib.ExitStack() as stack:
            for _ in range(1100):  # more than select() can name
                stack.enter_context(open(os.devnull, "rb"))
            found = hub.fetch("tiny", cache_dir=tmp_path / "cache", endpoint=server.url)
        assert (found.folder / "config.json").is_file()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_code_is_fetched_only_with_leave(server, model, tmp_path):
    server.repos["tiny"] = files_of(model, tmp_path / "src") | EXTRAS
    options = {"cache_dir": tmp_path / "cache", "endpoint": server.url}
    assert not list(hub.fetch("tiny", **options).folder.glob("*.py"))
    assert list(hub.fetch("tiny", **options, trust_remote_code=True).folder.glob("*.py"))


def test_pickles_only_are_refused_before_any_download(server, tmp_path):
    server.repos["tiny"] = {"config.json": b"{}", "pytorch_model.bin": b"pickle"}
    with pytest.raises(CompressError, match="save_pretrained"):
        hub.fetch("tiny", cache_dir=tmp_path, endpoint=server.url)
    assert not any("/resolve/" in line for line in server.asked)


@pytest.mark.parametrize("files", [{}, {"config.json": b"{}"}, {"model.gguf": b"GGUF"}])
def test_repository_without_weights(server, tmp_path, files):
    server.repos["tiny"] = files
    with pytest.raises(CompressError, match="weights"):
        hub.fetch("tiny", cache_dir=tmp_path, endpoint=server.url)


def test_shard_that_the_repository_lacks(server, model, tmp_path):
    files = files_of(model, tmp_path / "src", max_shard_size="20KB")
    gone = sorted(name for name in files if name.startswith("model-0"))[1]
    del files[gone]
    server.repos["tiny"] = files
    with pytest.raises(CompressError, match=gone):
        hub.fetch("tiny", cache_dir=tmp_path / "cache", endpoint=server.url)


def test_missing_repository_and_revision(server, model, tmp_path):
    with pytest.raises(CompressError, match="'owner/none', which is neither"):
        hub.fetch("owner/none", cache_dir=tmp_path / "cache", endpoint=server.url)
    server.repos["tiny"] = files_of(model, tmp_path / "src")
    with pytest.raises(CompressError, match="revision 'v9'"):
        hub.fetch("tiny", revision="v9", cache_dir=tmp_path / "cache", endpoint=server.url)


def silent_server() -> socket.socket:
    """A port that accepts connections and never answers."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    return listener


@pytest.mark.parametrize("kind", ["refused", "silent", "no hub"])
def test_unreachable_hub_is_told_within_seconds(kind, server, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "TIMEOUT", 1.0)
    listener = silent_server()
    url = {
        "refused": "http://127.0.0.1:9",
        "silent": f"http://127.0.0.1:{listener.getsockname()[1]}",
        "no hub": f"{server.url}/elsewhere",
    }[kind]
    start = time.perf_counter()
    with pytest.raises(CompressError) as caught:
        hub.fetch("owner/tiny", cache_dir=tmp_path, endpoint=url)
    listener.close()
    assert time.perf_counter() - start < 8
    for word in ("folder", "pypi:", "HF_ENDPOINT", "owner/tiny"):
        assert word in str(caught.value)


def test_download_in_which_nothing_arrives_is_ended(server, model, tmp_path, monkeypatch):
    server.repos["tiny"], server.silent = files_of(model, tmp_path / "src"), True
    with monkeypatch.context() as patch:
        patch.setattr(hub_process, "SILENCE", 2.0)
        with pytest.raises(CompressError, match="less than 64 kB in 2 s"):
            hub.fetch("tiny", cache_dir=tmp_path / "cache", endpoint=server.url)
    server.silent = False
    shot = hub.fetch("tiny", cache_dir=tmp_path / "cache", endpoint=server.url)
    assert load_model(shot.folder) is not None


@pytest.mark.parametrize("answer", [b"[]", b"[" * 100_000, b'{"id": "tiny", "siblings": [5]}'])
def test_answers_that_are_none(server, tmp_path, answer, monkeypatch):
    monkeypatch.setattr(
        Handler, "send_api", lambda self, *_, body: self.send(200, answer, body=body)
    )
    with pytest.raises(CompressError, match="usable answer from the hub about tiny"):
        hub.fetch("tiny", cache_dir=tmp_path / "cache", endpoint=server.url)


@pytest.mark.parametrize("revision", [None, "main", COMMIT])
def test_copy_in_the_cache_is_used_when_the_hub_is_away(server, model, tmp_path, revision):
    server.repos["tiny"] = files_of(model, tmp_path / "src")
    options = {"revision": revision, "cache_dir": tmp_path / "cache"}
    shot = hub.fetch("tiny", **options, endpoint=server.url)
    again = hub.fetch("tiny", **options, endpoint="http://127.0.0.1:9")
    assert again.folder == shot.folder and again.commit == COMMIT
    assert "cache" in again.notes[0]


def test_resolve_through_HF_ENDPOINT(server, model, tmp_path):
    # The variable is read when huggingface_hub is imported, so this needs a fresh process.
    server.repos["owner/tiny"] = files_of(model, tmp_path / "src", max_shard_size="20KB")
    code = (
        "import sys, dataclasses, json\n"
        "from compress.models.sources.source import resolve, load_model\n"
        "source = resolve('owner/tiny', cache_dir=sys.argv[1])\n"
        "load_model(source)\n"
        "print(json.dumps(dataclasses.asdict(source), default=str))\n"
    )
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "cache")],
        env={**os.environ, "HF_ENDPOINT": server.url, "PYTHONPATH": root},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    source = Source(**json.loads(done.stdout.splitlines()[-1]))
    assert source.origin == f"owner/tiny@{COMMIT}" and source.revision == COMMIT
    assert source.kind == "hub" and source.license == "apache-2.0"
    assert str(source.folder).startswith(str(tmp_path / "cache" / "hub"))


def test_a_folder_is_never_looked_up_on_the_hub(server, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model.save_pretrained("owner/tiny")
    assert resolve("owner/tiny").kind == "folder"
    assert server.asked == []
