"""2:4 products: what qualifies is decided on any machine, what runs needs a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import compress
from compress.errors import CompressError
from compress.linear import semi_structured
from compress.linear.semi_structured import (
    CUSPARSELT,
    CUTLASS,
    SemiStructured,
    candidates,
    choose_backend,
    convert,
    describe_execution,
    is_two_of_four,
)

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
HALF, FULL = torch.float16, torch.float32


def capable() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


needs_gpu = pytest.mark.skipif(not capable(), reason="needs a CUDA GPU of capability 8.0 or more")


def pruned(module: nn.Linear) -> nn.Linear:
    with torch.no_grad():
        module.weight.unflatten(1, (-1, 4))[..., 1:3] = 0
    return module


class Net(nn.Module):
    """Linears of every kind that matters to the decision."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.good = pruned(nn.Linear(128, 96))
        self.same = pruned(nn.Linear(128, 96, bias=False))
        self.full = nn.Linear(128, 96)
        self.odd = pruned(nn.Linear(128, 72))
        self.narrow = pruned(nn.Linear(32, 96))
        self.embedding = nn.Embedding(96, 128)
        self.head = pruned(nn.Linear(128, 96, bias=False))
        self.embedding.weight = self.head.weight
        self.to(dtype).requires_grad_(False)

    def forward(self, x):
        return self.narrow((self.good(x) + self.same(x))[..., :32])


@pytest.mark.parametrize(
    ("device", "dtype", "capability", "library", "answer"),
    [
        (CUDA, HALF, (9, 0), True, CUSPARSELT),
        (CUDA, torch.bfloat16, (8, 0), True, CUSPARSELT),
        (CUDA, HALF, (8, 6), False, CUTLASS),
        (CUDA, HALF, (9, 0), False, "no cuSPARSELt"),
        (CUDA, HALF, (7, 5), True, "this one has 7.5"),
        (CUDA, FULL, (9, 0), True, "weights are float32"),
        (CPU, HALF, None, True, "only CUDA GPUs"),
    ],
)
def test_choice_of_backend(device, dtype, capability, library, answer):
    assert answer in choose_backend(device, dtype, capability, library)


def test_candidates_and_reasons():
    can, cannot = candidates(Net(), CUTLASS)
    assert can == ["good", "same"]
    assert cannot.keys() == {"full", "odd", "narrow", "head"}
    assert "not 2:4" in cannot["full"] and "32 x 64" in cannot["odd"] + cannot["narrow"]
    assert "shared" in cannot["head"]
    assert candidates(Net(), CUSPARSELT)[0] == ["good", "same", "narrow"]
    assert candidates(Net(torch.float32), CUSPARSELT)[0] == []


def test_gpt2_is_told_why(tiny):
    model = tiny("gpt2").bfloat16()
    can, cannot = candidates(model, CUSPARSELT)
    assert not can and "Conv1D" in cannot["transformer.h.0.mlp.c_fc"]


def test_two_of_four():
    weight = pruned(nn.Linear(64, 32)).weight.data
    assert is_two_of_four(weight) and is_two_of_four(torch.zeros(4, 8))
    weight[-1, 1] = 1.0
    assert not is_two_of_four(weight)
    assert not is_two_of_four(weight[:, :62]) and not is_two_of_four(weight[0])


@pytest.fixture
def pretend(monkeypatch):
    """``pretend(pack)``: a machine whose kernels pack a weight so."""

    def set_up(pack):
        monkeypatch.setattr(semi_structured, "choose_backend", lambda *_: CUTLASS)
        monkeypatch.setattr(semi_structured, "_packer", lambda _: pack)

    return set_up


def test_conversion_keeps_the_function(pretend):
    pretend(torch.clone)
    net, x = Net(), torch.randn(3, 128).bfloat16()
    before = net(x)
    report = convert(net)
    assert report.converted == ("good", "same") and report.backend == CUTLASS
    assert report.reason == "" and net.semi_structured is report
    assert torch.equal(net(x), before)
    assert "in 2 linears" in str(report) and "not 2:4 sparse" in str(report)


def test_a_kernel_that_fails_or_errs_leaves_the_layer_dense(pretend):
    def missing(_weight):
        raise RuntimeError("no kernel image is available")

    for pack, reason in ((missing, "no kernel image"), (lambda w: -w, "differs by")):
        pretend(pack)
        net, x = Net(), torch.randn(3, 128).bfloat16()
        before = net(x)
        report = convert(net)
        assert report.converted == () and reason in report.dense["good"]
        assert report.reason and torch.equal(net(x), before)


def test_converted_weights_can_run_but_not_be_saved(pretend, monkeypatch, checkpoint, tmp_path):
    """The tensor class itself, made on the CPU, where it has no product."""
    from torch.sparse import SparseSemiStructuredTensorCUTLASS
    from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

    def pack(weight):
        packed, meta = sparse_semi_structured_from_dense_cutlass(weight)
        return SparseSemiStructuredTensorCUTLASS(weight.shape, packed, meta, None, None, None)

    pretend(pack)
    monkeypatch.setattr(semi_structured, "_trial", lambda *_: "")
    model, _ = compress.load(checkpoint("llama"), dtype=torch.bfloat16)
    layer = model.model.layers[1].mlp
    layer.up_proj = pruned(nn.Linear(64, 32, bias=False)).bfloat16()
    report = convert(model)
    assert report.converted == ("model.layers.1.mlp.up_proj",)
    assert describe_execution(model) == "2:4 products (CUTLASS) in 1 of 22 linears on cpu, bfloat16"
    for use in (lambda: compress.save(model, tmp_path / "a"), lambda: compress.apply(model, [])):
        with pytest.raises(CompressError, match="ordinary weights"):
            use()
    assert "converted already" in convert(model).dense["model.layers.1.mlp.up_proj"]


def test_load_without_a_gpu(checkpoint, helpers, tmp_path, tokens):
    folder = checkpoint("llama")
    with pytest.warns(UserWarning, match="only CUDA GPUs"):
        model, _ = compress.load(folder, semi_structured=True)
    assert isinstance(model.semi_structured, SemiStructured)
    plain, _ = compress.load(folder)
    assert torch.equal(helpers.logits(model, tokens), helpers.logits(plain, tokens))
    assert describe_execution(plain) == "dense products on cpu, float32"
    assert "only CUDA GPUs" in describe_execution(model)
    compress.save(model, tmp_path / "again")
    with pytest.raises(CompressError, match="can run 2:4 products here"):
        compress.load(folder, semi_structured="require")
    with pytest.raises(CompressError, match="semi_structured"):
        compress.load(folder, semi_structured="yes")


def test_zeros_that_save_nothing_are_called_so(checkpoint, helpers, tmp_path):
    steps = [{"method": "magnitude", "pattern": "2:4"}]
    run = compress.run(helpers.recipe(checkpoint("llama"), steps), tmp_path / "run")
    assert "save no time" in describe_execution(compress.load(run.model)[0])


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sparse_products_on_the_gpu(dtype, checkpoint, helpers, tmp_path, tokens):
    wide = {"hidden_size": 128, "intermediate_size": 256}
    steps = [{"method": "magnitude", "pattern": "2:4"}]
    run = compress.run(helpers.recipe(checkpoint("llama", **wide), steps), tmp_path / "run")
    dense, _ = compress.load(run.model, dtype=dtype, device="cuda")
    model, _ = compress.load(run.model, dtype=dtype, device="cuda", semi_structured="require")
    assert len(model.semi_structured.converted) == 21
    expected = helpers.logits(dense, tokens.cuda()).float()
    found = helpers.logits(model, tokens.cuda()).float()
    assert helpers.difference(found, expected) < 0.05
    assert "2:4 products" in describe_execution(model)
    with pytest.raises(CompressError, match="ordinary weights"):
        compress.save(model, tmp_path / "saved")
    with pytest.raises(CompressError, match="ordinary weights"):
        compress.apply(model, ["magnitude"])


@needs_gpu
def test_backends_of_this_gpu_agree_with_the_dense_product():
    net = Net(torch.float16).cuda()
    x = torch.randn(5, 7, 128, device="cuda", dtype=torch.float16)  # rows of no round number
    before = net(x)
    report = convert(net)
    assert report.converted
    assert float((net(x) - before).abs().max()) < 0.02 * float(before.abs().max())
