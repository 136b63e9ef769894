"""What is written opens as the same model: with us, by plain transformers, or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from compress.checkpoint.save import save_model, verify, verify_shapes

# What stock transformers, without us, must do with each change.
LOADS, RAISES = "loads", "raises"
STOCK = {
    "nothing": LOADS,
    "ffn in one layer": RAISES,
    "heads in one layer": RAISES,
    "ffn everywhere": LOADS,
    "ffn and heads everywhere": RAISES,
    "low rank": RAISES,
    "W4": LOADS,
    "W4 asymmetric": LOADS,
    "W8A8": LOADS,
    "narrower, low rank, W4": RAISES,
}
# A quantised Conv1D is a linear, so GPT-2 is no longer GPT-2. Llama-like families have a field for
# the head size, so fewer heads in all layers is a smaller config.
EXCEPTIONS = {
    ("gpt2", "W4"): RAISES,
    ("gpt2", "W4 asymmetric"): RAISES,
    ("gpt2", "W8A8"): RAISES,
    ("llama", "ffn and heads everywhere"): LOADS,
    ("qwen3", "ffn and heads everywhere"): LOADS,
}


# Every change for two families, those that classes could get wrong for the others.
WHOLE, PART = ("llama", "gpt2"), ("qwen3", "opt", "bert", "modernbert")
TELLING = ("heads in one layer", "ffn and heads everywhere", "W4", "W8A8", "narrower, low rank, W4")
CASES = [(family, what) for family in WHOLE for what in STOCK]
CASES += [(family, what) for family in PART for what in TELLING]
CASES += [("distilbert", "heads in one layer")]  # its blocks are not told their number


@pytest.fixture(scope="module")
def written(tiny, tmp_path_factory) -> dict[tuple[str, str], tuple[Path, torch.Tensor]]:
    """Folder and expected logits of every case."""
    root = tmp_path_factory.mktemp("checkpoints")
    done = {}
    for number, (family, what) in enumerate(CASES):
        model = tiny.change(tiny.build(family), what)
        folder = root / str(number)
        save_model(model, folder)
        done[family, what] = folder, tiny.logits(model)
    return done


@pytest.mark.parametrize(("family", "what"), CASES)
def test_opens_with_equal_logits(tiny, written, family, what):
    folder, expected = written[family, what]
    assert verify(folder, expected, tiny.inputs(), tiny.auto_class(family)) < 1e-5


@pytest.mark.parametrize("family", ["llama", "gpt2", "modernbert"])
def test_shapes_agree_with_the_config(written, family):
    verify_shapes(written[family, "narrower, low rank, W4"][0])


_STOCK_SCRIPT = """
import json, sys
import torch, transformers
torch.set_num_threads(1)
transformers.logging.set_verbosity(60)
transformers.logging.disable_progress_bar()
assert "compress" not in sys.modules
results = {}
inputs = {k: torch.tensor(v) for k, v in json.loads(sys.argv[1]).items()}
for folder, auto in json.loads(sys.argv[2]):
    try:
        model = getattr(transformers, auto).from_pretrained(folder).eval()
        with torch.no_grad():
            results[folder] = model(**inputs).logits.tolist()
    except Exception as error:
        results[folder] = f"{type(error).__name__}: {error}"
print(json.dumps(results))
"""


def test_stock_transformers_loads_or_raises(tiny, written, forked_python, tmp_path):
    work = [
        [str(folder), tiny.auto_class(family).__name__]
        for (family, _), (folder, _) in written.items()
    ]
    inputs = json.dumps({k: v.tolist() for k, v in tiny.inputs().items()})
    # From another folder, so that the package is not even importable by its place.
    done = forked_python("-c", _STOCK_SCRIPT, inputs, json.dumps(work), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.strip().splitlines()[-1])
    wrong = {}
    for (family, what), (folder, expected) in written.items():
        result = results[str(folder)]
        wanted = EXCEPTIONS.get((family, what), STOCK[what])
        if wanted == RAISES and not isinstance(result, str):
            wrong[family, what] = "loaded silently"
        elif wanted == LOADS and isinstance(result, str):
            wrong[family, what] = result
        elif wanted == LOADS:
            error = (torch.tensor(result) - expected).abs().max() / expected.abs().max()
            if not error < 1e-5:
                wrong[family, what] = f"differs by {error}"
    assert not wrong


@pytest.mark.parametrize("what", ["heads in one layer", "W4", "narrower, low rank, W4"])
@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_save_pretrained_round_trips(tiny, written, family, what, tmp_path):
    folder, expected = written[family, what]
    auto = tiny.auto_class(family)
    auto.from_pretrained(folder).save_pretrained(tmp_path / "again")
    again = auto.from_pretrained(tmp_path / "again")
    # Packed weights are multiplied in another order of sums.
    assert torch.allclose(tiny.logits(again), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("what", ["heads in one layer", "narrower, low rank, W4"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_generates_with_and_without_cache(tiny, written, family, what):
    model = tiny.auto_class(family).from_pretrained(written[family, what][0])
    prompt = tiny.inputs()
    outputs = [
        model.generate(**prompt, max_new_tokens=5, do_sample=False, use_cache=cache)
        for cache in (True, False)
    ]
    assert torch.equal(*outputs)


def test_hidden_states_of_narrow_layers_are_recorded(tiny, written):
    model = tiny.auto_class("llama").from_pretrained(written["llama", "ffn in one layer"][0])
    with torch.no_grad():
        states = model(**tiny.inputs(), output_hidden_states=True).hidden_states
    assert len(states) == len(model.model.layers) + 1


def test_attention_implementation_can_be_chosen_afterwards(tiny, written):
    folder, expected = written["llama", "heads in one layer"]
    model = tiny.auto_class("llama").from_pretrained(folder)
    model.set_attn_implementation("eager")
    assert {layer.self_attn.config._attn_implementation for layer in model.model.layers} == {
        "eager"
    }
    assert torch.allclose(tiny.logits(model), expected, atol=1e-4)


def test_other_models_keep_the_stock_classes(tiny, written):
    """And are built as fast as before: whatever is in the table of patches, every model that is
    built searches all modules of transformers for."""
    from transformers import AutoModelForCausalLM
    from transformers.models.llama import modeling_llama
    from transformers.monkey_patching import get_patch_mapping

    tiny.auto_class("llama").from_pretrained(written["llama", "ffn in one layer"][0])
    assert get_patch_mapping() == {}
    plain = AutoModelForCausalLM.from_config(tiny.build("llama").config)
    assert {type(layer) for layer in plain.model.layers} == {modeling_llama.LlamaDecoderLayer}
    assert type(modeling_llama.LlamaDecoderLayer) is type


def test_backbone_alone_opens(tiny, written):
    from transformers import AutoModel

    folder, _ = written["llama", "narrower, low rank, W4"]
    whole = tiny.auto_class("llama").from_pretrained(folder)
    backbone = AutoModel.from_pretrained(folder)
    tiny.logits(whole)  # compressed-tensors unpacks at the first forward of the whole
    with torch.no_grad():
        assert torch.equal(
            backbone(**tiny.inputs()).last_hidden_state,
            whole.model(**tiny.inputs()).last_hidden_state,
        )
