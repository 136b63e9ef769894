"""diffusers' UVit2DModel: steps that keep shapes work in place, the rest is refused."""

from __future__ import annotations

import sys

import pytest
import torch

import compress
from compress.errors import CompressError
from compress.models.diffusion import UVit2DAdapter, is_diffusion_folder

diffusers = pytest.importorskip("diffusers")

SIZES = {
    "hidden_size": 32, "cond_embed_dim": 16, "micro_cond_encode_dim": 8,
    "micro_cond_embed_dim": 40, "encoder_hidden_size": 16, "vocab_size": 40, "codebook_size": 32,
    "in_channels": 16, "block_out_channels": 16, "num_res_blocks": 3, "block_num_heads": 2,
    "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "sample_size": 8,
    "downsample": True, "upsample": True,
}  # fmt: skip
STORED = {
    "magnitude": {"pattern": "2:4"},
    "wanda": {"pattern": "2:4"},
    "sparsegpt": {"pattern": "2:4"},
}
LIVE = {
    "rtn": {"bits": 4, "group_size": 16},
    "gptq": {"bits": 4, "group_size": 16},
    "w8a8": {},
    "svd_llm": {"ratio": 0.6},
}


def build():
    torch.manual_seed(0)
    model = diffusers.UVit2DModel(**SIZES).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture(scope="module")
def batches():
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "input_ids": torch.randint(33, (2, 8, 8), generator=generator),
            "encoder_hidden_states": torch.randn(2, 5, 16, generator=generator),
            "pooled_text_emb": torch.randn(2, 16, generator=generator),
            "micro_conds": torch.randn(2, 5, generator=generator),
        }
        for _ in range(3)
    ]


@torch.no_grad()
def logits(model, batches):
    return model(**batches[0])


def test_anatomy_is_the_transformer_layers(tmp_path):
    found = compress.inspect(build())
    assert [b["path"] for b in found["blocks"]] == [
        "model.transformer_layers.0", "model.transformer_layers.1",
    ]  # fmt: skip
    linears = found["blocks"][0]["sites"]["other"]
    assert {"attn1.to_q", "attn2.to_k", "ff.net.0.proj", "ff.net.2", "norm1.linear"} <= set(linears)
    assert found["class"] == "UVit2DModel" and found["methods"]["sparsegpt"] == "yes"
    for method in ("ffn_width", "head_width", "shortgpt", "sleb"):
        assert found["methods"][method].startswith("no:")
    build().save_pretrained(tmp_path)
    assert compress.inspect(tmp_path) == found


@pytest.mark.parametrize("method", STORED)
def test_sparsity_in_place_and_back_from_disk(method, batches, helpers, tmp_path):
    model = build()
    before = logits(model, batches)
    same = compress.apply(model, [{"method": method, **STORED[method]}], batches)
    assert same is model
    after = logits(model, batches)
    assert helpers.difference(after, before) > 1e-3
    weight = model.transformer_layers[1].attn2.to_k.weight
    assert int((weight != 0).reshape(-1, 4).sum(1).max()) == 2
    assert bool((model.down_block.attention_blocks[0].attn1.to_q.weight != 0).all())
    compress.save(model, tmp_path)
    assert is_diffusion_folder(tmp_path)
    again, tokenizer = compress.load(tmp_path)
    assert type(again) is diffusers.UVit2DModel and tokenizer is None
    assert torch.equal(logits(again, batches), after)


@pytest.mark.parametrize("method", LIVE)
def test_other_steps_are_for_measuring(method, batches, helpers, tmp_path):
    model = build()
    before = logits(model, batches)
    compress.apply(model, [{"method": method, **LIVE[method]}], batches)
    assert helpers.difference(logits(model, batches), before) > 1e-3
    with pytest.raises(CompressError, match="diffusers can load"):
        compress.save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_each_batch_keeps_its_conditioning(batches):
    """Wanda's mask of a cross-attention key follows from the prompts of all batches."""
    dense, seen = build(), []
    key = dense.transformer_layers[0].attn2.to_k
    hook = key.register_forward_pre_hook(lambda _m, args: seen.append(args[0].reshape(-1, 32)))
    scaled = [
        {**b, "encoder_hidden_states": b["encoder_hidden_states"] * torch.eye(16)[i] * 9}
        for i, b in enumerate(batches)
    ]
    with torch.no_grad():
        for batch in scaled:
            dense(**batch)
    hook.remove()
    scores = key.weight.detach().abs() * torch.cat(seen).norm(dim=0)
    best = scores.unflatten(1, (-1, 4)).topk(2, dim=-1).indices
    expected = torch.zeros(32, 8, 4, dtype=torch.bool).scatter_(-1, best, True).flatten(1)
    model = compress.apply(build(), [{"method": "wanda", "pattern": "2:4"}], scaled)
    assert torch.equal(model.transformer_layers[0].attn2.to_k.weight != 0, expected)


def test_what_changes_shapes_is_refused(batches):
    model = build()
    before = logits(model, batches)
    for step in ({"method": "ffn_width", "share": 0.25}, {"method": "shortgpt", "remove": 1}):
        with pytest.raises(CompressError, match="shapes of UVit2DModel"):
            compress.apply(model, [{"method": "magnitude"}, step], batches)
    with pytest.raises(CompressError, match="encoder_hidden_states"):
        compress.apply(model, ["wanda"], torch.ones(2, 8, dtype=torch.long))
    assert torch.equal(logits(model, batches), before)


def test_adapter_gives_the_same_logits(batches):
    model = build()
    with torch.no_grad():
        assert torch.equal(UVit2DAdapter(model)(**batches[0]).logits, logits(model, batches))


def test_bad_folders(tmp_path, monkeypatch):
    build().save_pretrained(tmp_path / "short")
    from safetensors.torch import load_file, save_file

    path = tmp_path / "short/diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    del tensors["encoder_proj.weight"]
    save_file(tensors, path)
    with pytest.raises(CompressError, match="encoder_proj"):
        compress.load(tmp_path / "short")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(CompressError, match=r"compress\[diffusion\]"):
        compress.load(tmp_path / "short")
