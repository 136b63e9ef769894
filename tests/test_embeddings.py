"""Embeddings and heads of 8 and 4 bits: written, planned, loaded, tied as they were."""

from __future__ import annotations

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

import compress
from compress.conformance.models import build
from compress.conformance.tiny import TinyFamily, difference, logits
from compress.conformance.trial import Trial
from compress.errors import CompressError
from compress.eval.cost import macs_per_token, size
from compress.linear.grid import QuantScheme, dequantize, find_group_qparams, quantize
from compress.linear.layer import is_layer
from compress.linear.packed import PackedLinear
from compress.linear.tables import PackedEmbedding, embedding_scale
from compress.methods.quantize.gptq import GPTQ

STEP = {"method": "rtn", "bits": 4, "group_size": 8}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Tied and untied, by a run and live: {(family, bits): (run, model changed live)}."""
    found = {}
    for family, bits, more in (("gpt2", 8, {}), ("llama", 4, {"symmetric": False})):
        tiny = TinyFamily(family, tmp_path_factory.mktemp(family))
        step = {**STEP, "embeddings": bits, **more}
        recipe = tiny.recipe([step], calibrated=False)
        run = compress.run(recipe, tiny.folder / "run")
        found[family, bits] = run, compress.apply(tiny.model(), [step]), compress.plan(recipe)
    return found


def test_a_run_and_a_live_model_agree(made, tmp_path):
    for (family, bits), (run, live, _) in made.items():
        compress.save(live, tmp_path / family)
        one, other = (load_file(f / "model.safetensors") for f in (run.model, tmp_path / family))
        assert one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)
        name = next(n for n in one if n.endswith((".wte.weight_packed", "tokens.weight_packed")))
        assert one[name].shape[1] == 32 * bits // 32
        assert not any(n.startswith("lm_head") for n in one) or family == "llama"


def test_what_is_loaded_is_what_was_made(made, tmp_path):
    for (family, _), (run, live, _) in made.items():
        kept, _ = compress.load(run.model)
        plain, _ = compress.load(run.model, packed=False)
        assert difference(logits(plain), logits(live)) < 1e-6
        assert difference(logits(kept), logits(live)) < 1e-5
        assert isinstance(kept.get_input_embeddings(), PackedEmbedding)
        assert is_layer(kept.get_output_embeddings())
        tied = plain.get_output_embeddings().weight is plain.get_input_embeddings().weight
        assert tied == (family == "gpt2")
        assert size(kept, run.model) == size(plain, run.model)
        assert macs_per_token(kept, 16) == macs_per_token(plain, 16)
        kept.save_pretrained(tmp_path / family)
        assert difference(logits(compress.load(tmp_path / family)[0]), logits(live)) < 1e-5
        generated = kept.generate(torch.arange(3, 9)[None], max_new_tokens=3, do_sample=False)
        assert generated.shape == (1, 9)


def test_the_plan_knows_the_bytes(made):
    for run, _, plan in made.values():
        stored = load_file(run.model / "model.safetensors").items()
        held = sum(t.numel() * t.element_size() for n, t in stored if not n.endswith("_shape"))
        assert plan.result.bytes == pytest.approx(held, rel=0.01)


def test_others_refuse_it(made):
    run, _, _ = made["gpt2", 8]
    with pytest.raises(RuntimeError):
        transformers.GPT2LMHeadModel.from_pretrained(run.model)
    with pytest.raises(CompressError, match="Give `embeddings` in one step"):
        compress.plan({"model": str(run.model), "steps": [{**STEP, "embeddings": 8}]})


def test_groups_must_divide(tmp_path):
    tiny = TinyFamily("llama", tmp_path)
    with pytest.raises(CompressError, match="group_size 24"):
        compress.apply(tiny.model(), [{"method": "rtn", "group_size": 24, "embeddings": 8}])


@pytest.mark.parametrize("family", ("gpt2", "llama"))
def test_gptq_rounds_the_head_by_what_enters_it(family, tmp_path):
    """Tied in gpt2; of an untied llama the embedding is rounded to nearest."""
    tiny = TinyFamily(family, tmp_path)
    shared = {"bits": 8, "group_size": 8, "embeddings": 4}
    step = {"method": "gptq", **shared}
    batches = tiny.batches
    found = compress.apply(tiny.model(), [step], batches)
    nearest = compress.apply(tiny.model(), [{"method": "rtn", **shared}])
    dense = tiny.model()
    tied = dense.get_output_embeddings().weight is dense.get_input_embeddings().weight
    assert tied == (family == "gpt2")
    seen = []
    hook = dense.get_output_embeddings().register_forward_pre_hook(lambda _m, x: seen.append(x[0]))
    with torch.no_grad():
        for batch in batches:
            dense(**batch)
    hook.remove()
    inputs = torch.cat([x.flatten(0, -2) for x in seen])

    def lost(model):
        change = model.get_output_embeddings().weight - dense.get_output_embeddings().weight
        return float((inputs @ change.detach().t()).square().sum())

    assert lost(found) < 0.8 * lost(nearest)
    if not tied:
        words = [model.get_input_embeddings().weight for model in (found, nearest)]
        assert torch.equal(*words)
    if tied:
        trial = Trial(GPTQ(**shared), tiny, tmp_path)
        trial.streamed_equals_live()
        trial.saved_checkpoint_is_the_model()
        trial.interrupted_run_resumes()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_a_scaled_embedding_is_loaded_with_its_scale(dtype, tmp_path):
    """Of Gemma, whose scale is a buffer that no file has."""
    live = compress.apply(build("gemma2").to(dtype), [{**STEP, "embeddings": 8}])
    compress.save(live, tmp_path / "made")
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for packed in (True, False):
        model, _ = compress.load(tmp_path / "made", packed=packed)
        words = model.get_input_embeddings()
        assert isinstance(words, PackedEmbedding) == packed
        ids = torch.arange(8)[None]
        rows = [m.get_input_embeddings()(ids).float() for m in (model, live)]
        torch.testing.assert_close(*rows, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)
        assert difference(logits(model), logits(live)) < tolerance


@pytest.mark.parametrize("family", ("XGLM", "MiniCPM3"))
def test_a_scale_may_be_a_number(family):
    shared = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if family == "XGLM":
        fields = {"d_model": 32, "ffn_dim": 64, "num_layers": 1, "attention_heads": 4}
    else:
        fields = {
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "scale_emb": 3.0,
            "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 16,
            "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
        }  # fmt: skip
    config = getattr(transformers, f"{family}Config")(**shared, **fields)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    words = model.get_input_embeddings()
    assert embedding_scale(words) == (3.0 if family == "MiniCPM3" else 32**0.5)
    scheme = QuantScheme(bits=8)
    grid = find_group_qparams(words.weight.detach(), scheme)
    codes = quantize(words.weight.detach(), *grid, scheme)
    packed = PackedEmbedding(PackedLinear(codes, grid[0], None, scheme), words, torch.float32)
    words.weight.data = dequantize(codes, *grid)
    ids = torch.arange(8)[None]
    torch.testing.assert_close(packed(ids), words(ids))


class ShiftedScaledWordEmbedding(nn.Embedding):
    """As T5Gemma 2's, named as if all it did were to scale."""

    embed_scale = 2.0

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__(rows, columns)
        self.shift = nn.Parameter(torch.ones(columns))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) * self.embed_scale + self.shift


class NormedEmbedding(nn.Embedding):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return nn.functional.normalize(super().forward(ids), dim=-1)


@pytest.mark.parametrize("cls", (ShiftedScaledWordEmbedding, NormedEmbedding))
def test_other_embeddings_are_refused(cls, tmp_path):
    model = build("llama")
    model.set_input_embeddings(cls(264, 32))
    live = compress.apply(model, [{**STEP, "embeddings": 8}])
    with pytest.raises(CompressError, match=f"embed_tokens: .*{cls.__name__}"):
        compress.save(live, tmp_path / "made")
