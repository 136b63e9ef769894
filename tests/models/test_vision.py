"""Vision encoders: the same anatomy and methods, calibrated on pixels."""

from __future__ import annotations

import pytest
import torch
import transformers

import compress
from compress.errors import CompressError
from compress.linear.matrix import matrix
from compress.models.anatomy import ATTENTION_OUT, DOWN, QKV, UP, anatomy_of

SIZES = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "image_size": 16, "patch_size": 4, "num_channels": 1, "num_labels": 5,
}  # fmt: skip
CLASSES = [
    ("ViTConfig", "ViTForImageClassification"),
    ("ViTConfig", "ViTModel"),
    ("DeiTConfig", "DeiTForImageClassification"),
    ("DeiTConfig", "DeiTModel"),
]
STEPS = {
    "magnitude": {"pattern": "2:4"},
    "wanda": {"pattern": "2:4"},
    "sparsegpt": {"pattern": "2:4"},
    "rtn": {"bits": 4, "group_size": 16},
    "gptq": {"bits": 4, "group_size": 16},
    "w8a8": {},
    "shortgpt": {"remove": 1},
    "ffn_width": {"share": 0.25},
    "head_width": {"share": 0.5},
    "svd": {"ratio": 0.6},
    "asvd": {"ratio": 0.6},
    "svd_llm": {"ratio": 0.6},
}


def build(config_name, class_name):
    torch.manual_seed(0)
    config = getattr(transformers, config_name)(**SIZES)
    model = getattr(transformers, class_name)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(1)
    return [{"pixel_values": torch.randn(2, 1, 16, 16, generator=generator)} for _ in range(4)]


def outputs(model, images):
    with torch.no_grad():
        made = model.eval()(images[0]["pixel_values"])
    return made.logits if "logits" in made else made.last_hidden_state


@pytest.mark.parametrize(("config_name", "class_name"), CLASSES)
def test_anatomy(config_name, class_name):
    anatomy = anatomy_of(build(config_name, class_name))
    assert len(anatomy.blocks) == 3
    for block in anatomy.blocks:
        assert [s.kind for s in block.sites] == [QKV, ATTENTION_OUT, UP, DOWN]
        assert block.widths == {"heads": 4, "kv_heads": 4, "ffn": 64} and block.head_dim == 8
        assert not any(s.bound for s in block.sites)


@pytest.mark.parametrize("method", STEPS)
@pytest.mark.parametrize("place", [0, 2], ids=["vit", "deit"])
def test_methods_on_pixels(method, place, images, helpers, tmp_path):
    model = build(*CLASSES[place])
    before = outputs(model, images)
    model = compress.apply(model, [{"method": method, **STEPS[method]}], images)
    after = outputs(model, images)
    assert torch.isfinite(after).all() and helpers.difference(after, before) > 1e-3
    compress.save(model, tmp_path)
    again, tokenizer = compress.load(tmp_path, packed=False)  # integer sums round otherwise
    assert tokenizer is None
    assert helpers.difference(outputs(again, images), after) < 1e-5
    if method == "head_width":
        attention = again.get_submodule(anatomy_of(again).blocks[0].path).attention
        assert attention.num_attention_heads == 2


def test_bare_encoder(images, helpers, tmp_path):
    """No head, no logits: compressed live, and read back by its own class."""
    model = build("ViTConfig", "ViTModel")
    model = compress.apply(model, [{"method": "sparsegpt", "pattern": "2:4"}], images)
    compress.save(model, tmp_path)
    again = transformers.AutoModel.from_pretrained(tmp_path)
    assert helpers.difference(outputs(again, images), outputs(model, images)) < 1e-5


def test_calibration_sees_the_pixels(images):
    """Other images, other weights: what a block gets is what the patches became."""
    made = []
    for scale in (1.0, -2.0):
        model = build("ViTConfig", "ViTForImageClassification")
        batches = [{"pixel_values": scale * b["pixel_values"].abs()} for b in images]
        compress.apply(model, [{"method": "sparsegpt", "pattern": "2:4"}], batches)
        made.append(matrix(model.vit.layers[0].mlp.fc2))
    assert not torch.equal(*made)


def test_what_judges_and_learns_by_labels_asks_for_them(images):
    model = build("ViTConfig", "ViTForImageClassification")
    found = compress.inspect(model)
    assert found["family"] == "table" and found["vocabulary"] == 0 and found["labels"] == 5
    drop = {"method": "sleb", "remove": 1}
    with pytest.raises(CompressError, match="a label for each calibration input"):
        compress.apply(model, [drop], images)
    labelled = [{**batch, "labels": torch.tensor([0, 3])} for batch in images]
    zeros = {"method": "magnitude", "pattern": "2:4"}
    training = {"steps": 2, "batch": 2, "precision": "float32"}
    learn = {"method": "distill", "scope": "model", "training": training}
    compress.apply(model, [drop, zeros, learn], labelled)
    assert len(anatomy_of(model).blocks) == 2 and torch.isfinite(outputs(model, images)).all()
