"""Results onto a hub: a server on this machine that takes what huggingface_hub sends."""

from __future__ import annotations

import base64
import http.server
import json
import threading

import pytest
import yaml

import compress
from compress.checkpoint.architectures import own_config_class
from compress.engine.card import model_card
from compress.errors import CompressError
from compress.models.sources.source import Source
from compress.planning.recipe import parse_steps


class Hub(http.server.BaseHTTPRequestHandler):
    """Creates repositories and takes commits with the files inside of them."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        sent = self.rfile.read(int(self.headers["Content-Length"]))
        if self.server.refuses:
            return self.reply(401, {"error": "not logged in"})
        if self.path.endswith("/validate-yaml"):  # of the card
            return self.reply(200, {"errors": [], "warnings": []})
        if self.path.endswith("/repos/create"):
            asked = json.loads(sent)
            name = "/".join(filter(None, (asked.get("organization", "me"), asked["name"])))
            self.server.repos.setdefault(name, {})
            # Older versions of the library send one of these, newer ones the other.
            self.server.private = asked.get("private") or asked.get("visibility") == "private"
            return self.reply(200, {"url": f"{self.server.url}/{name}"})
        name, _, action = self.path.removeprefix("/api/models/").partition("/main")
        if "/preupload" in self.path:
            name = name.removesuffix("/preupload")
            files = json.loads(sent)["files"]
            return self.reply(200, {"files": [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files
            ]})  # fmt: skip
        name = name.removesuffix("/commit")
        repo = self.server.repos[name]
        for line in map(json.loads, sent.splitlines()):
            if line["key"] == "file":
                repo[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        self.server.commits += 1
        return self.reply(
            200, {"commitUrl": f"{self.server.url}/{name}/commit/1", "commitOid": "1"}
        )

    def do_GET(self) -> None:
        if self.server.refuses:
            return self.reply(401, {"error": "not logged in"})
        return self.reply(200, {"sha": "0" * 40, "id": "x", "siblings": []})

    def reply(self, status: int, answer: dict) -> None:
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def hub(monkeypatch):
    made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    made.repos, made.commits, made.refuses, made.private = {}, 0, False, None
    made.url = f"http://127.0.0.1:{made.server_port}"
    threading.Thread(target=made.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setattr("huggingface_hub.hf_api.get_token", lambda: "hf_test")
    yield made
    made.shutdown()
    made.server_close()


@pytest.fixture(scope="module")
def finished(checkpoint, text, helpers, tmp_path_factory):
    """A finished run with figures."""
    folder = tmp_path_factory.mktemp("run") / "tiny"
    steps = [
        {"method": "magnitude", "sparsity": 0.3},
        {"method": "rtn", "bits": 8, "group_size": None},
    ]
    data = helpers.recipe(checkpoint("llama"), steps, evaluation=helpers.evaluation(text))
    return compress.run(data, folder)


def test_a_result_says_what_it_is(finished):
    card = (finished.model / "README.md").read_text()
    _, front, body = card.split("---\n", 2)
    fields = yaml.safe_load(front)
    assert fields["library_name"] == "transformers"
    assert {"compress", "zeros", "precision"} <= set(fields["tags"])
    assert "1. **magnitude**" in body and "`bits`: `8`" in body
    after = finished.report.after
    assert f"| {after.perplexity.perplexity:.4g} |" in body
    assert f"| {finished.report.before.perplexity.perplexity:.4g} |" in body
    assert "of transformers loads it too" in body and "vLLM" in body
    assert "names none here" in body  # the licence
    assert "`llama`" in body and "`words.txt`" in body and "/" + "tmp" not in body  # no paths


def test_a_card_names_licence_and_original_and_what_loads_layers_of_ours(tmp_path):
    source = Source(tmp_path, "owner/model@abc", "hub", "abc", license="Apache-2.0")
    config = own_config_class("llama")()
    card = model_card("name", source, parse_steps([{"method": "svd", "ratio": 0.5}]), config, None)
    fields = yaml.safe_load(card.split("---\n")[1])
    assert fields["license"] == "apache-2.0" and fields["base_model"] == "owner/model"
    assert "1. **svd**" in card and "`ratio`: `0.5`" in card and "## Figures" not in card
    assert "without it transformers refuses" in card


def test_push_uploads_the_model_of_a_run_and_nothing_else(finished, hub):
    (finished.model / "notes.pt").write_bytes(b"private")
    try:
        url = compress.push(finished.folder, "owner/tiny", private=True, endpoint=hub.url)
    finally:
        (finished.model / "notes.pt").unlink()
    assert url.startswith(hub.url) and hub.private is True and hub.commits == 1
    sent = hub.repos["owner/tiny"]
    kept = {p.name: p.read_bytes() for p in finished.model.iterdir()}
    assert sent == kept and "README.md" in sent


def test_what_cannot_be_pushed_is_refused_before_the_hub_is_asked(own_checkpoint, hub, tmp_path):
    folder = own_checkpoint("llama")
    with pytest.raises(CompressError, match="owner/name"):
        compress.push(folder, "owner/name/more", endpoint=hub.url)
    with pytest.raises(CompressError, match="a finished run"):
        compress.push(tmp_path / "nothing", "owner/tiny", endpoint=hub.url)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(CompressError, match=r"model\.safetensors"):
        compress.push(folder, "owner/tiny", endpoint=hub.url)
    assert not hub.repos


def test_a_hub_that_refuses_or_does_not_answer(checkpoint, hub):
    hub.refuses = True
    with pytest.raises(CompressError, match="hf auth login"):
        compress.push(checkpoint("llama"), "owner/tiny", endpoint=hub.url)
    with pytest.raises(CompressError, match="the hub to take owner/tiny"):
        compress.push(checkpoint("llama"), "owner/tiny", endpoint="http://127.0.0.1:9")


@pytest.mark.parametrize("to", ("onnx", "gguf"))
def test_push_uploads_what_was_exported(to, checkpoint, hub, tmp_path):
    pytest.importorskip(to)
    out = tmp_path / ("tiny.gguf" if to == "gguf" else "tiny")
    if to == "gguf":
        compress.export(checkpoint("llama"), to, out, tokenizer=False)
    else:
        compress.export(checkpoint("bert"), to, out)
    compress.push(out, "owner/tiny", endpoint=hub.url)
    made = [out] if to == "gguf" else sorted(out.iterdir())
    assert hub.repos["owner/tiny"] == {path.name: path.read_bytes() for path in made}
