"""dump_block and load_block are inverse, on a meta block of the original config too."""

from __future__ import annotations

import copy

import pytest
import torch

from compress.checkpoint.config import apply_records, keep_layers, read_records
from compress.checkpoint.records import BlockRecord, dump_block, load_block, record_block
from compress.errors import CompressError
from compress.models.anatomy import anatomy_of


def dump_all(model, dtype=torch.float32):
    return [
        dump_block(model.get_submodule(block.path), block, dtype)
        for block in anatomy_of(model).blocks
    ]


def meta_twin(model):
    """The class and original config of a model, on the meta device."""
    with torch.device("meta"):
        return type(model)(copy.deepcopy(model.config)).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "modernbert"])
@pytest.mark.parametrize("what", ["heads in one layer", "W4 asymmetric", "narrower, low rank, W4"])
def test_dump_of_load_is_the_same_bytes(tiny, family, what, dtype):
    model = tiny.change(tiny.build(family), what)
    dumped = dump_all(model, dtype)
    twin = meta_twin(model)
    for block, (tensors, record) in zip(anatomy_of(twin).blocks, dumped, strict=True):
        record = BlockRecord.model_validate_json(record.model_dump_json())
        load_block(twin.get_submodule(block.path), tensors, record, anatomy=block)
    for (tensors, record), (again, record_again) in zip(dumped, dump_all(twin, dtype), strict=True):
        assert record == record_again
        assert list(tensors) == list(again)
        assert all(tensors[n].dtype == again[n].dtype for n in tensors)
        assert all(torch.equal(tensors[n], again[n]) for n in tensors)


def test_loaded_blocks_compute_the_same(tiny):
    model = tiny.change(tiny.build("llama"), "narrower, low rank, W4")
    other = tiny.build("llama")
    expected, before = tiny.logits(model), tiny.logits(other)
    for block, (tensors, record) in zip(anatomy_of(other).blocks, dump_all(model), strict=True):
        load_block(other.get_submodule(block.path), tensors, record, anatomy=block)
    assert torch.equal(tiny.logits(other), expected)
    assert not torch.equal(before, expected)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda t: t.pop("mlp.up_proj.weight_packed"), "none named weight_packed"),
        (lambda t: t.pop("input_layernorm.weight"), "none named input_layernorm.weight"),
        (lambda t: t.update(extra=torch.zeros(1)), "also extra"),
        (
            lambda t: t.update({"input_layernorm.weight": torch.zeros(3)}),
            r"shape \[32\], got \[3\]",
        ),
        (lambda t: t.update({"mlp.up_proj.weight_scale": torch.ones(64, 1)}), r"shape \[64, 4\]"),
        (lambda t: t["mlp.up_proj.weight_shape"].add_(1), r"weight_shape \[64, 32\]"),
    ],
)
def test_a_damaged_block_is_refused(tiny, damage, words):
    model = tiny.change(tiny.build("llama"), "W4")
    tensors, record = dump_all(model)[0]
    damage(tensors)
    twin = meta_twin(model)
    with pytest.raises(CompressError, match=words):
        load_block(twin.get_submodule(anatomy_of(twin).blocks[0].path), tensors, record)


def records_of(model):
    return [record_block(model.get_submodule(b.path), b) for b in anatomy_of(model).blocks]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "opt", "bert", "modernbert"])
def test_config_holds_the_records(tiny, family):
    for what in tiny.changes:
        model = tiny.change(tiny.build(family), what)
        anatomy = anatomy_of(model)
        first = f"{anatomy.blocks[0].path}.{anatomy.blocks[0].linears[0]}"
        model.get_submodule(first).zeros = "2:4"
        records = records_of(model)
        config = apply_records(model.config, anatomy.family, records, anatomy.blocks_path)
        assert read_records(config, anatomy.family, len(records)) == records
        # Through the file, and applied to a config that already carries records.
        again = type(config).from_dict(config.to_dict())
        assert read_records(again, anatomy.family, len(records)) == records
        twice = apply_records(again, anatomy.family, records, anatomy.blocks_path)
        assert twice.to_dict() == config.to_dict()


@pytest.mark.parametrize("family", ["llama", "gpt2", "modernbert"])
def test_layers_are_renumbered_with_all_they_carry(tiny, family):
    model = tiny.change(tiny.build(family), "narrower, low rank, W4")
    anatomy = anatomy_of(model)
    records = records_of(model)
    config = apply_records(model.config, anatomy.family, records, anatomy.blocks_path)
    fewer = keep_layers(config, anatomy.family, [0, 2], anatomy.blocks_path)
    assert getattr(fewer, anatomy.family.layers) == 2
    assert read_records(fewer, anatomy.family, 2) == [records[0], records[2]]
    types = getattr(config, "layer_types", None)
    if types is not None:
        assert list(fewer.layer_types) == [types[0], types[2]]


def test_the_original_config_is_left_alone(tiny):
    model = tiny.change(tiny.build("llama"), "narrower, low rank, W4")
    anatomy, before = anatomy_of(model), model.config.to_dict()
    apply_records(model.config, anatomy.family, records_of(model), anatomy.blocks_path)
    assert model.config.to_dict() == before


def test_uneven_groups_are_refused(tiny):
    model = tiny.build("llama")
    anatomy = anatomy_of(model)
    records = records_of(model)
    records[1] = records[1].model_copy(update={"widths": {"heads": 3, "kv_heads": 2, "ffn": 64}})
    with pytest.raises(CompressError, match="2 heads for every key/value head"):
        apply_records(model.config, anatomy.family, records, anatomy.blocks_path)


def test_foreign_quantisation_is_refused(tiny):
    model = tiny.change(tiny.build("llama"), "W4")
    anatomy = anatomy_of(model)
    config = apply_records(model.config, anatomy.family, records_of(model), anatomy.blocks_path)
    config.quantization_config["config_groups"]["group_0"]["targets"] = ["Linear"]
    with pytest.raises(CompressError, match="'Linear'"):
        read_records(config, anatomy.family, 3)


def test_mixed_asymmetric_schemes_are_refused(tiny):
    model = tiny.change(tiny.build("llama"), "W4 asymmetric")
    anatomy = anatomy_of(model)
    records = records_of(model)
    scheme = records[0].quantization["mlp.up_proj"].model_copy(update={"bits": 8})
    changed = {**records[0].quantization, "mlp.up_proj": scheme}
    records[0] = records[0].model_copy(update={"quantization": changed})
    with pytest.raises(CompressError, match="one scheme"):
        apply_records(model.config, anatomy.family, records, anatomy.blocks_path)
