"""A run that ends in other runtimes: exported, measured there, told in the report."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest

import compress
from compress.conformance.interruption import Killed, killed_at
from compress.errors import CompressError
from compress.eval.cost.memory import PeakMemory
from compress.eval.report import load_report

pytest.importorskip("onnxruntime")

RTN = {"method": "rtn", "bits": 4, "group_size": 32}
OPENED = "compress.runtimes.onnx.model:open_onnx"
TIMED = {"prefill_tokens": 8, "decode_tokens": 2, "repeats": 3}


@pytest.fixture(scope="module")
def recipe(checkpoint, text, helpers):
    """``recipe(*steps, **evaluation)``: a tiny model exported to onnx and measured there."""

    def make(*steps, output=("onnx",), family="llama", **evaluation) -> dict:
        section = {
            "text": {"source": str(text)}, "max_tokens": 128, "window": 64, "memory": False,
            "latency": TIMED, "runtimes": ["onnx"], "cache": False, **evaluation,
        }  # fmt: skip
        source = checkpoint(family, **({"head_dim": 16} if family == "llama" else {}))
        return helpers.recipe(
            source, steps or [RTN], evaluation=section, output={"exports": list(output)}
        )

    return make


@pytest.fixture(scope="module")
def ran(recipe, tmp_path_factory):
    """A complete run."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    return compress.run(recipe(), folder)


def test_a_run_ends_in_an_exported_model_that_runs(ran, tokens):
    assert ran.exports == {"onnx": ran.folder / "onnx"}
    model, tokenizer = compress.load(ran.folder / "onnx", runtime="onnx")
    assert tokenizer is not None
    assert model.generate(tokens[:1, :8], max_new_tokens=3, eos_token_id=[]).shape == (1, 11)
    card = (ran.folder / "onnx" / "README.md").read_text()
    assert 'runtime="onnx"' in card and "library_name: onnxruntime" in card


def test_the_report_tells_of_what_runs_there(ran):
    after = load_report(ran.folder).after
    (there,) = after.runtimes
    files = [p for p in (ran.folder / "onnx").iterdir() if p.name != "README.md"]
    assert there.bytes == sum(p.stat().st_size for p in files)
    assert there.latency.decode.speedup > 0 and there.own_latency.decode.speedup > 0
    assert there.latency.decode_tokens == 2 and there.latency.repeats == 3
    assert there.perplexity.perplexity == pytest.approx(after.perplexity.perplexity, rel=0.02)
    assert there.perplexity != after.perplexity  # inputs are rounded there
    assert [c.prompt for c in there.continuations] == [c.prompt for c in after.continuations]
    page = (ran.folder / "report.html").read_text()
    assert page.count("compressed, onnxruntime") == 3 and "the original in transformers" in page
    assert not list((ran.folder).glob("work*")), "what was exported to be measured is gone"


def test_exports_are_the_runs_own(ran, tmp_path):
    """One that was edited is left alone, one that was removed is made again."""
    folder = shutil.copytree(ran.folder, tmp_path / "run")
    again = folder / "recipe.yaml"
    weights = folder / "onnx" / "model.onnx.data"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + b"?")
    with pytest.raises(CompressError, match="the onnx export that the run wrote"):
        compress.run(again, folder)
    shutil.rmtree(folder / "onnx")
    compress.run(again, folder)
    assert weights.read_bytes() == whole


def test_killed_while_it_exports(recipe, ran, tmp_path):
    asked = recipe(runtimes=[], latency=False)
    journal = (ran.folder / "journal.jsonl").read_text().splitlines()
    number = next(i for i, line in enumerate(journal, 1) if '"exported"' in line)
    with pytest.raises(Killed), killed_at(number, written=False):
        compress.run(asked, tmp_path / "run")
    assert (tmp_path / "run" / "onnx").is_dir()
    compress.run(asked, tmp_path / "run")
    one, other = (f / "onnx" / "model.onnx.data" for f in (ran.folder, tmp_path / "run"))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize(
    "steps, more, words",
    [
        ([], {"family": "gpt2"}, "one of type 'gpt2'"),
        ([{**RTN, "group_size": 8}], {}, "group_size 16"),
        ([{**RTN, "bits": 8, "symmetric": False}], {"output": ("gguf",)}, "Q8_0 is the nearest"),
        ([{**RTN, "group_size": 16}], {"output": ("gguf",)}, "group_size 32"),
        ([RTN], {"output": ({"to": "gguf", "type": "Q4_1"},)}, "--type Q4_0"),
        ([RTN], {"output": ({"to": "onnx", "type": "Q4_0"},)}, "--type for onnx"),
        ([RTN], {"output": ("onnx", "onnx")}, "one export a format"),
        ([{"method": "svd", "ratio": 0.5}], {"output": ("gguf",)}, "a low_rank layer"),
        ([RTN], {"runtimes": ["openvino"]}, "'onnx' or 'gguf'"),
    ],
)
def test_what_cannot_be_exported_is_refused_by_the_plan(recipe, steps, more, words):
    with pytest.raises(CompressError, match=words):
        compress.plan(recipe(*steps, **more))


def test_a_missing_package_is_refused_by_the_plan(recipe, monkeypatch):
    find = importlib.util.find_spec
    absent = {"onnxruntime", "llama_cpp"}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n in absent else find(n, *a)
    )
    for more, words in (
        ({"runtimes": []}, r"output.exports \(onnx\).*pip install onnxruntime"),
        ({"output": ()}, r"evaluation.runtimes \(onnx\).*pip install onnxruntime"),
        ({"output": (), "runtimes": ["gguf"]}, "pip install llama-cpp-python"),
    ):
        with pytest.raises(CompressError, match=words):
            compress.plan(recipe(**more))


def test_a_checkpoint_is_measured_in_runtimes_too(
    ran, checkpoint, section, monkeypatch, memory_unmeasured
):
    asked, original = [], checkpoint("llama", head_dim=16)

    def measured(folder, **options):
        asked.append((Path(folder).name, options["loader"]))
        return PeakMemory(libraries=1, load=2, prefill=3, tokens=4)

    monkeypatch.setattr("compress.engine.runtimes.peak_memory", measured)
    spec = {**section, "runtimes": ["onnx"], "memory": True, "latency": TIMED}
    report = compress.evaluate(ran.model, spec, against=original)
    (there,) = report.after.runtimes
    assert there.own_latency and there.memory.prefill == 3 and asked == [("onnx", OPENED)]
    alone = compress.evaluate(ran.model, {**spec, "memory": False}).after.runtimes[0]
    assert alone.latency is None and alone.perplexity == there.perplexity
    with pytest.raises(CompressError, match="a model in memory or an exported one"):
        compress.evaluate(ran.exports["onnx"], spec, runtime="onnx")
    with pytest.raises(CompressError, match="Measure .*model in them"):
        compress.evaluate(ran.folder, spec)
