"""Gates that would measure nothing, sizes of mixtures, checkpoints of other decisions."""

from __future__ import annotations

import pytest
import torch
import transformers

import compress
from compress.errors import CompressError
from compress.methods.width.vib import training
from compress.methods.width.vib.checking import norm_behind
from compress.methods.width.vib.gates import ATTENTION, FFN, Gates
from compress.methods.width.vib.importance import fisher
from compress.methods.width.vib.method import VIB
from compress.methods.width.vib.placing import placed
from compress.methods.width.vib.sizes import outer_terms, sizes_of
from compress.models.anatomy import anatomy_of
from compress.models.experts import unfuse_all
from compress.models.outline import outline_of
from compress.train.whole import ModelWork

SMALL = {
    "vocab_size": 264, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4,
}  # fmt: skip
DECODER = {
    **SMALL, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
AT_ONCE = {"training": None, "tuning": None, "start_batches": 2, "share": 0.2, "of": "model"}


def decoder(name, config=None, **fields):
    """A tiny model of a class that is not among the toolkit's own."""
    torch.manual_seed(0)
    made = getattr(transformers, config or f"{name}Config")(**{**DECODER, **fields})
    model = getattr(transformers, f"{name}ForCausalLM")(made).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # else what norms read is no larger than their epsilon
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def work_on(model, tokens, folder=None):
    """A model with the first rows of a text, as a method gets it."""
    model.requires_grad_(False)
    batches = [{"input_ids": row} for row in tokens[:4].split(1)]
    return ModelWork(model, anatomy_of(model), batches, torch.device("cpu"), folder, 0)


SANDWICHED = {
    "glm4": ("Glm4", None), "olmo2": ("Olmo2", None), "gemma3": ("Gemma3", "Gemma3TextConfig"),
}  # fmt: skip


@pytest.mark.parametrize("family", ["gemma2", *SANDWICHED])
def test_gates_of_sublayers_before_a_norm_are_refused(family, tiny, tokens):
    model = tiny(family) if family == "gemma2" else decoder(*SANDWICHED[family])
    step = {"method": "vib", **AT_ONCE, "units": ["neurons", "layers"]}
    with pytest.raises(CompressError, match="Leave layers out of units"):
        compress.apply(model, [step], tokens)


def test_such_gates_would_measure_nothing(tokens):
    """And those of channels and heads do: a norm undoes only what is common to all channels."""
    work, counts = work_on(decoder("Glm4"), tokens), {"hidden": [32], "heads": [2, 2]}
    gates = Gates({**counts, ATTENTION: [1, 1], FFN: [1, 1]}, 0, torch.device("cpu"))
    with placed(work.model, work.anatomy, gates):
        found = fisher(work, gates, 2)
    least = min(float(found[kind].mean()) for kind in counts)
    assert max(float(found[kind].max()) for kind in (ATTENTION, FFN)) < 1e-3 * least


def test_norms_in_front_or_behind_the_sum_are_no_obstacle(tiny):
    behind_sum = ("bert", "distilbert")
    in_front = ("llama", "gpt2", "opt", "gpt_neox", "modernbert")
    models = [*map(tiny, (*behind_sum, *in_front)), decoder("Cohere")]
    # Its class does not run on shapes, so none of its norms is seen to be read.
    models.append(transformers.EsmForMaskedLM(transformers.EsmConfig(**SMALL, pad_token_id=0)))
    for model in models:
        found = [norm_behind(block) for block in anatomy_of(model).blocks]
        assert found == [None] * len(found), model.config.model_type


def test_a_model_without_a_head_is_refused(tokens):
    model = transformers.BertModel(transformers.BertConfig(**SMALL)).eval()
    step = {"method": "vib", **AT_ONCE, "units": ["neurons"]}
    with pytest.raises(CompressError, match="with its head"):
        compress.apply(model, [step], tokens)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_sizes_of_a_mixture_count_its_experts(family, tiny):
    model = tiny(family)
    count = sum(p.numel() for p in model.parameters())
    unfuse_all(model)
    anatomy = anatomy_of(model)
    outline, outer = outline_of(model, anatomy, 32), outer_terms(model, anatomy)
    inside = sum(
        p.numel() for b in anatomy.blocks for p in model.get_submodule(b.path).parameters()
    )
    wholes = {of: sizes_of(outline, of, 4.0, outer).whole() for of in ("model", "blocks", "bytes")}
    assert wholes == {"model": count, "blocks": inside, "bytes": 4 * count}
    assert sizes_of(outline, "macs").whole() == outline.macs_per_token


@pytest.mark.parametrize("of", ["model", "macs"])
def test_a_share_of_a_mixture_is_of_the_whole(of, tiny, tokens):
    def size(model):
        unfuse_all(model)
        outline = outline_of(model, anatomy_of(model), 32)
        return outline.macs_per_token if of == "macs" else outline.parameters

    step = {"method": "vib", **AT_ONCE, "units": ["heads"], "share": 0.04, "of": of}
    after = compress.apply(tiny("mixtral"), [step], tokens)
    anatomy = anatomy_of(after)
    assert any(block.kv_heads < 2 for block in anatomy.blocks)
    assert size(after) <= 0.96 * size(tiny("mixtral"))


def test_means_that_learned_for_another_decision_are_not_taken(tiny, tokens, tmp_path, monkeypatch):
    few = {"steps": 2, "batch": 1, "learning_rate": 0.05, "clip": None, "precision": "float32"}
    options = {**AT_ONCE, "units": ["neurons"], "tuning": few, "correction": False}
    method = VIB(**options)

    def learned(folder):
        """All that was decided and learned, and what the training told."""
        model = tiny("llama")
        work = work_on(model, tokens, folder)
        training.learn_gates(work, method)
        blocks = [model.get_submodule(b.path).vib_learned for b in work.anatomy.blocks]
        return [t for block in blocks for t in block.values()], work.metrics["vib.tuning"]

    first, told = learned(tmp_path / "run")
    again, told_again = learned(tmp_path / "run")
    assert all(map(torch.equal, first, again)) and told == told_again
    measured = training.fisher
    monkeypatch.setattr(
        training, "fisher", lambda *given: {k: v.flip(0) for k, v in measured(*given).items()}
    )
    other, told_other = learned(tmp_path / "run")
    fresh, told_fresh = learned(tmp_path / "elsewhere")
    assert not all(map(torch.equal, first, other))
    assert all(map(torch.equal, other, fresh)) and told_other == told_fresh != told
