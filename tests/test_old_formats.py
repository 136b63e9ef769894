"""What earlier versions wrote still works: checkpoints load, interrupted runs go on.

tests/fixtures/README.md says which version wrote the files and how.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

import compress
from compress.checkpoint.state import ModelState, streamed_logits
from compress.cli.app import main
from compress.eval.report import load_report
from compress.models.sources.source import load_config
from compress.system.tensors import TensorIndex

FIXTURES = Path(__file__).parent / "fixtures"
CHECKPOINTS = sorted(p.name for p in (FIXTURES / "checkpoints").iterdir() if p.is_dir())


# checkpoints -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded() -> dict[str, torch.Tensor]:
    """Logits that the version which wrote the checkpoints computed, and the tokens they are of."""
    return load_file(FIXTURES / "checkpoints" / "logits.safetensors")


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoint_loads_with_from_pretrained(name, recorded, helpers):
    folder = FIXTURES / "checkpoints" / name
    (architecture,) = AutoConfig.from_pretrained(folder).architectures
    masked = architecture.endswith("ForMaskedLM")
    auto = AutoModelForMaskedLM if masked else AutoModelForCausalLM
    model, notes = auto.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not notes["missing_keys"] and not notes["mismatched_keys"]
    logits = helpers.logits(model, recorded["input_ids"])
    assert helpers.difference(logits, recorded[name]) < 1e-4


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoint_is_streamed(name, recorded, helpers, tmp_path):
    folder = FIXTURES / "checkpoints" / name
    state = ModelState.of_checkpoint(TensorIndex.open(folder), load_config(folder))
    logits = streamed_logits(state, {"input_ids": recorded["input_ids"]}, tmp_path)
    assert helpers.difference(logits, recorded[name]) < 1e-4


@pytest.mark.parametrize(
    ("name", "family", "blocks"),
    [("depth", "llama", 1), ("low-rank", "llama", 2), ("4-bit", "llama", 2),
     ("masked-generator", "bert", 1)],
)  # fmt: skip
def test_checkpoint_is_inspected(name, family, blocks):
    found = compress.inspect(FIXTURES / "checkpoints" / name)
    assert (found["model_type"], len(found["blocks"])) == (family, blocks)


def test_mask_file_fits_the_weights_it_was_made_of(helpers, tmp_path):
    zeros = FIXTURES / "checkpoints" / "zeros"
    base = FIXTURES / "models" / "llama"
    made = compress.apply_mask(zeros / "masks.safetensors", base, tmp_path / "made")
    assert made.base == "same"
    written, expected = helpers.weights(made.folder), helpers.weights(zeros)
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[n], expected[n]) for n in expected)


# runs --------------------------------------------------------------------------------------------


@pytest.fixture
def begun(tmp_path, monkeypatch):
    """``begun(name)``: a copy of the folder of an old run, where the paths in its recipe lead on.

    The machine is one that measures bfloat16 to be slow although its processor has units for it:
    what ``precision: auto`` was for those runs, it would not be for new ones.
    """
    monkeypatch.chdir(FIXTURES)
    monkeypatch.setattr("compress.train.options.fast_bfloat16", lambda _device: False)
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: True)

    def copy(name: str) -> Path:
        return Path(shutil.copytree(FIXTURES / "runs" / name / "run", tmp_path / "run"))

    return copy


@pytest.fixture
def resume():
    """``resume(name, folder)``: the command line that goes on with a run in a folder."""

    def run(name: str, out: Path) -> None:
        with pytest.raises(SystemExit) as left:
            main(["run", f"runs/{name}/recipe.yaml", "--out", str(out)])
        assert not left.value.code

    return run


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def near(made: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Share of the values that are the same but for rounding; names and shapes are."""
    kinds = [{n: (t.shape, t.dtype) for n, t in x.items()} for x in (made, expected)]
    assert kinds[0] == kinds[1]
    pairs = [(made[n].double(), expected[n].double()) for n in expected]
    same = [torch.isclose(a, b, 0.02, 1e-3).flatten() for a, b in pairs]
    return float(torch.cat(same).double().mean())


# Rounding differs between processors, and then a mask or a code may. Masks are learned another way
# today than when the training of the whole model began.
AS_EXPECTED = {
    "survey": 0.99, "whole": 0.99, "learning-model": 0.95, "adapting": 0.99,
    "creating": 0.99, "written": 0.99,
}  # fmt: skip


@pytest.mark.parametrize("name", AS_EXPECTED)
def test_run_goes_on_to_the_same_end(name, begun, resume, helpers):
    out = begun(name)
    done, trained = lines(out / "journal.jsonl"), lines(out / "work/base/history.jsonl")
    resume(name, out)
    # What was done is neither done again nor taken back.
    assert lines(out / "journal.jsonl")[: len(done)] == done
    assert "rewind" not in (out / "journal.jsonl").read_text()
    assert [json.loads(x) for x in lines(out / "base/training.jsonl")][: len(trained)] == [
        json.loads(x) for x in trained
    ]
    expected = FIXTURES / "runs" / name / "expected.safetensors"
    if name == "written":
        expected = FIXTURES / "runs" / name / "run/model/model.safetensors"
    assert near(helpers.weights(out / "model"), load_file(expected)) >= AS_EXPECTED[name]


def test_blocks_that_have_learned_stay_and_others_learn(begun, resume, helpers):
    out = begun("learning-blocks")
    block = load_file(out / "work/00-maskllm/block-00000.safetensors")
    resume("learning-blocks", out)
    weights = helpers.weights(out / "model")
    for name, tensor in block.items():
        assert torch.equal(weights[f"model.layers.0.{name}"], tensor)
    for name in block:
        if name.endswith("proj.weight"):
            zeros = weights[f"model.layers.1.{name}"].unflatten(1, (-1, 4)) == 0
            assert (zeros.sum(-1) == 2).all()
    # The first of the blocks was tuned in the type that the processor's flags gave.
    assert json.loads((out / "lock.json").read_text())["kept"]["precision"] == "bfloat16"


def test_original_and_result_are_measured_the_same_way(begun, resume, helpers):
    out = begun("second-step")
    done = lines(out / "journal.jsonl")
    before = json.loads((out / "evaluation-before.json").read_text())["perplexity"]
    resume("second-step", out)
    assert lines(out / "journal.jsonl")[: len(done)] == done
    expected = load_file(FIXTURES / "runs/second-step/expected.safetensors")
    assert near(helpers.weights(out / "model"), expected) > 0.99
    report = load_report(out / "report.json")
    figures = json.loads((FIXTURES / "runs/second-step/expected.json").read_text())
    # Not measured again, and without the BOS that today's default puts in front of each window.
    assert report.before.perplexity.perplexity == before["perplexity"] == figures["before"]
    assert report.after.perplexity.perplexity == pytest.approx(figures["after"], rel=0.01)
    assert report.after.perplexity.special_tokens == 0
    assert [step.resumed for step in report.steps] == [False, True]


def test_complete_run_is_complete_and_its_report_is_read_or_made_again(begun, resume, capsys):
    out = begun("complete")
    done = lines(out / "journal.jsonl")
    old = load_report(out / "report.json")
    resume("complete", out)
    assert "nothing to do" in capsys.readouterr().err
    assert lines(out / "journal.jsonl") == done
    assert compress.compare([out, old]).markdown()
    (out / "report.json").unlink()
    resume("complete", out)
    new = load_report(out / "report.json")
    for side in ("before", "after"):
        found, known = getattr(new, side).perplexity, getattr(old, side).perplexity
        assert found.perplexity == pytest.approx(known.perplexity, rel=1e-4)
