"""The staged replay of a block hands on what the compressed model's plain forward computes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from compress.engine.context import MemorySink, StepContext
from compress.engine.steps import run_step
from compress.methods.catalog import BUILT_IN
from compress.models.cores import look_at_core
from compress.models.stream import StreamedModel
from compress.planning.recipe import parse_step
from compress.system.activations import Activations

FAMILIES = (
    "llama",
    "qwen3",
    "gpt2",
    "opt",
    "bert",
    "modernbert",
    "gpt_neox",
    "phi3",
    "gemma2",
    "distilbert",
)
# One of each kind: moments, the Gram matrix with replaced modules, narrowed inputs (twice).
STEPS = (
    {"method": "wanda", "pattern": "2:4"},
    {"method": "gptq", "bits": 3, "group_size": 16},
    {"method": "ffn_width", "share": 0.5},
    {"method": "head_width", "share": 0.5},
)


class Watching(MemorySink):
    """Keeps what each block hands on to the next."""

    def __init__(self, scratch) -> None:
        super().__init__()
        self.scratch, self.outputs = scratch, []

    def record(self, stage, index, note, activations, blocks=1) -> None:
        super().record(stage, index, note, activations, blocks)
        (path,) = self.scratch.glob(f"{stage}-hidden-{index + 1:05d}.bin")
        stored = Activations(path, shapes=activations["shapes"])
        self.outputs.append([stored.read(i) for i in range(len(stored))])
        stored.close()


def plain_outputs(model, anatomy, batches) -> list[list[torch.Tensor]]:
    """Output of each block, by block and batch, in ordinary forwards."""
    found: list[list[torch.Tensor]] = [[] for _ in anatomy.blocks]
    hooks = []
    for block in anatomy.blocks:

        def keep(_module, _inputs, output, index=block.index):
            found[index].append(output[0] if isinstance(output, tuple) else output)

        hooks.append(model.get_submodule(block.path).register_forward_hook(keep))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for hook in hooks:
        hook.remove()
    return found


def hands_on_what_it_computes(model, step, batches, scratch) -> None:
    source, sink = StreamedModel(model), Watching(scratch)
    run_step(parse_step(step), StepContext(source, batches, scratch, sink=sink))
    for handed, plain in zip(
        sink.outputs, plain_outputs(model, source.anatomy, batches), strict=True
    ):
        for a, b in zip(handed, plain, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("step", STEPS, ids=lambda s: s["method"])
@pytest.mark.parametrize("family", FAMILIES)
def test_handed_on_equals_plain_forward(family, step, tiny, tokens, tmp_path):
    assert step["method"] in BUILT_IN
    model = tiny(family)
    # Two shapes, since arguments are learned for each.
    batches = [{"input_ids": tokens[:3]}, {"input_ids": tokens[3:5]}, {"input_ids": tokens[5:, :9]}]
    hands_on_what_it_computes(model, step, batches, tmp_path)
    assert list(tmp_path.iterdir()) == []  # nothing is left in the scratch folder


@pytest.mark.parametrize("step", STEPS[:2], ids=lambda s: s["method"])
def test_blocks_of_one_class_may_hold_experts_or_none(step, dense_then_experts, tokens, tmp_path):
    """The first block is dense: there only the core reads the norm, in the next also the router."""
    model = dense_then_experts(3)
    batches = [{"input_ids": part % 128} for part in tokens.split(3)]
    hands_on_what_it_computes(model, step, batches, tmp_path)


@pytest.mark.skipif(not Path("/dev/fd").is_dir(), reason="open files cannot be listed")
@pytest.mark.parametrize("step", STEPS, ids=lambda s: s["method"])
def test_no_file_stays_open(step, tiny, tokens, tmp_path):
    model = tiny("llama")
    before = len(os.listdir("/dev/fd"))
    batches = [{"input_ids": tokens}]
    run_step(parse_step(step), StepContext(StreamedModel(model), batches, tmp_path))
    assert len(os.listdir("/dev/fd")) == before


# In the others something lies between the core and the residual stream (a norm, a dense layer of
# its own), and the replay runs a core again rather than guess.
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "gpt_neox", "phi3", "modernbert"])
def test_each_product_is_computed_once(family, tiny, tokens, tmp_path):
    """A solving pass runs each linear once a batch, plus one look at each kind of core."""
    model = tiny(family, num_hidden_layers=4)  # of ModernBERT the first two differ
    source = StreamedModel(model)
    counts: dict[str, int] = {}
    for block in source.anatomy.blocks:
        for name in block.linears:
            path = f"{block.path}.{name}"
            counts[path] = 0

            def count(*_args, path=path):
                counts[path] += 1

            model.get_submodule(path).register_forward_hook(count)
    batches = [{"input_ids": part} for part in tokens.split(2)]
    method = parse_step({"method": "wanda", "pattern": "2:4"})
    run_step(method, StepContext(source, batches, tmp_path))
    last = source.anatomy.blocks[-1]
    # The last one knows its cores from another.
    assert {counts[f"{last.path}.{n}"] for n in last.linears} == {len(batches)}


class Twice(nn.Module):
    """A core between two sums, whose norm may have a second reader."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        self.shared, self.norm = shared, nn.LayerNorm(8)
        self.core = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        normed = self.norm(states)
        mixed = states + self.core(normed)
        return mixed + normed if self.shared else mixed


@pytest.mark.parametrize("shared", [False, True])
def test_what_only_a_core_reads_is_not_computed_when_it_is_replaced(shared):
    block, states = Twice(shared), torch.randn(2, 3, 8)
    with torch.no_grad():
        whole = block(states)
        core = look_at_core(block, "core", "core.2", lambda: block(states))
        assert core is not None and core.feeder == (None if shared else "norm")
        value, counted = block.core(block.norm(states)), []
        block.norm.register_forward_hook(lambda _m, _a, out: counted.append(out))
        with core.replaced(block, "core", lambda _normed: core.wrap(value)):
            torch.testing.assert_close(block(states), whole)
        # What went through unchanged was not computed.
        assert torch.equal(counted[0], states) is not shared
        torch.testing.assert_close(block(states), whole)
