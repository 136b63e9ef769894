"""How a model calls its blocks: what batches of one shape share, and what they do not."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import (
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    Zamba2Config,
    Zamba2ForCausalLM,
    ZambaConfig,
    ZambaForCausalLM,
)

from compress.checkpoint.state import ModelState, streamed_logits
from compress.engine.context import MemorySink, StepContext
from compress.engine.steps import run_step
from compress.errors import CompressError
from compress.models import calls
from compress.models.calls import capture_inputs
from compress.models.stream import StreamedModel
from compress.planning.recipe import parse_step
from compress.system.activations import Activations
from compress.system.tensors import TensorIndex


def spread(model: nn.Module) -> nn.Module:
    """With weights so large that all a block reads shows in what it returns."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "scale" in name:
                parameter.uniform_(0.5, 2.0)
            elif parameter.ndim == 2 and "A_log" not in name:
                parameter.normal_(0, 0.3)
    return model.eval()


def gemma(kind: str = "3n", shared: int = 0, own: int = 8) -> nn.Module:
    """A tiny Gemma whose blocks get embeddings of their own of the tokens."""
    fields = dict(
        vocab_size=128, vocab_size_per_layer_input=128, hidden_size=32, intermediate_size=64,
        hidden_size_per_layer_input=own, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_kv_shared_layers=shared, pad_token_id=0,
        layer_types=["sliding_attention", "full_attention"] * 2, sliding_window=16,
    )  # fmt: skip
    if kind == "3n":
        config = Gemma3nTextConfig(**fields, laurel_rank=4, activation_sparsity_pattern=[0.0] * 4)
        return spread(Gemma3nForCausalLM(config))
    return spread(Gemma4ForCausalLM(Gemma4TextConfig(**fields, global_head_dim=8)))


def zamba() -> nn.Module:
    config = ZambaConfig(
        vocab_size=128, hidden_size=32, num_hidden_layers=6, attn_layer_period=3,
        attn_layer_offset=1, mamba_d_state=8, n_mamba_heads=2, num_attention_heads=4,
        num_key_value_heads=4, intermediate_size=64, pad_token_id=0,
    )  # fmt: skip
    return spread(ZambaForCausalLM(config))


def zamba2() -> nn.Module:
    config = Zamba2Config(
        vocab_size=128, hidden_size=32, num_hidden_layers=5, num_attention_heads=4,
        layers_block_type=["mamba", "hybrid", "mamba", "hybrid", "mamba"], mamba_d_state=8,
        mamba_headdim=8, n_mamba_heads=8, mamba_ngroups=1, num_mem_blocks=1, intermediate_size=64,
        adapter_rank=4, pad_token_id=0, chunk_size=8,
    )  # fmt: skip
    return spread(Zamba2ForCausalLM(config))


def captured(model, batches, folder, **options):
    """The calls and the hidden states that enter the first block."""
    inputs = Activations(folder / "inputs.bin")
    calls = capture_inputs(model, StreamedModel(model).anatomy, batches, inputs, **options)
    hidden = [inputs.read(i) for i in range(len(batches))]
    inputs.remove()
    return calls, hidden


def assert_replayed(model, batches, folder) -> None:
    """Blocks that are called as was captured return what they return in an ordinary forward."""
    source = StreamedModel(model)
    calls, hidden = captured(model, batches, folder)
    plain: list[list[torch.Tensor]] = [[] for _ in source.anatomy.blocks]
    hooks = [
        source.block(i).register_forward_hook(
            lambda _m, _i, out, kept=kept: kept.append(out[0] if isinstance(out, tuple) else out)
        )
        for i, kept in enumerate(plain)
    ]
    with torch.no_grad():
        for batch in batches:
            model(**batch, use_cache=False)
    for hook in hooks:
        hook.remove()
    with torch.no_grad():
        for i, wanted in enumerate(plain):
            hidden = [call(source.block(i), h) for call, h in zip(calls[i], hidden, strict=True)]
            for a, b in zip(hidden, wanted, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.fixture
def batches(tokens) -> list[dict[str, torch.Tensor]]:
    """Two shapes, three batches of one of them."""
    parts = [tokens[:2], tokens[2:4], tokens[4:6], tokens[6:, :9], tokens[:2, 9:18]]
    return [{"input_ids": part % 128} for part in parts]


@pytest.mark.parametrize("make", [gemma, lambda: gemma("4"), zamba], ids=["3n", "4", "zamba"])
def test_arguments_made_of_tokens_belong_to_their_batch(make, batches, tmp_path):
    assert_replayed(make(), batches, tmp_path)


def test_the_same_text_twice_shows_nothing(batches, tmp_path):
    assert_replayed(gemma("4"), [batches[0], batches[0], *batches], tmp_path)


def test_calibrated_step_equals_plain_forward(batches, tmp_path):
    """What comes of a calibrated step hangs on the inputs of each block."""
    plain, found = gemma("4"), gemma("4")
    step = parse_step({"method": "wanda", "pattern": "2:4"})
    # In one batch there is nothing to share.
    whole = [{"input_ids": torch.cat([b["input_ids"] for b in batches[:3]])}]
    for model, data in ((plain, whole), (found, batches[:3])):
        folder = tmp_path / str(len(data))
        folder.mkdir()
        run_step(step, StepContext(StreamedModel(model), data, folder, sink=MemorySink()))
    for (name, a), b in zip(plain.named_parameters(), found.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, msg=name)


def test_what_batches_have_in_common_is_kept_once(batches, tiny, tmp_path):
    calls, _ = captured(gemma(), batches[:3], tmp_path)
    first, second = calls[0][0], calls[0][1]
    assert first is not second
    assert first.args[0] is second.args[0]  # rotary frequencies
    assert first.args[1] is not second.args[1]
    assert first.kwargs["position_ids"] is second.kwargs["position_ids"]
    for model in (tiny("llama"), gemma("4", own=0)):  # all is shape
        calls, _ = captured(model, batches[:3], tmp_path)
        assert all(call is block[0] for block in calls for call in block)


def test_only_one_other_batch_is_looked_at(batches, tiny, tmp_path, monkeypatch):
    looks = []

    class Noting(calls._recording):
        def __init__(self, *args, every: bool) -> None:
            super().__init__(*args, every=every)
            looks.append(every)

    monkeypatch.setattr(calls, "_recording", Noting)
    captured(tiny("llama"), [*batches[:3], *batches[:2]], tmp_path)
    assert looks == [True, True, False, False, False]


@pytest.mark.parametrize("kind", ["3n", "4"])
def test_blocks_that_hand_on_keys_are_refused(kind, batches, tmp_path):
    with pytest.raises(CompressError, match="residual stream only.*shared_kv_states"):
        captured(gemma(kind, shared=2), batches[:1], tmp_path)


def test_in_order_blocks_may_hand_things_on(batches, tmp_path):
    model = gemma("4", shared=2)
    model.save_pretrained(tmp_path / "model")
    index = TensorIndex.open(tmp_path / "model")
    state = ModelState.of_checkpoint(index, model.config)
    with torch.no_grad():
        wanted = model(**batches[0]).logits
    torch.testing.assert_close(
        streamed_logits(state, batches[0], tmp_path), wanted, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("make", [zamba, zamba2])
def test_checkpoints_with_layers_tied_to_each_other_are_refused_at_once(make, tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    with pytest.raises(CompressError, match="layers with weights of their own.*holds too"):
        ModelState.of_checkpoint(TensorIndex.open(tmp_path), model.config)
