"""Grids that a plan refuses: schemes that no one checkpoint can have, groups that do not divide."""

from __future__ import annotations

import re

import pytest

import compress
from compress.errors import CompressError
from compress.linear.grid import QuantScheme, group_size_fix

FIRST = {"method": "rtn", "bits": 4, "group_size": 16, "symmetric": False, "include": ["*.mlp.*"]}
SECOND = {**FIRST, "bits": 8, "include": ["*"], "exclude": ["*.mlp.*"]}


@pytest.fixture
def plan(checkpoint):
    """``plan(step, ...)`` for the model of a kind."""
    return lambda *steps, kind="llama": compress.plan(
        {"model": str(checkpoint(kind)), "steps": list(steps)}
    )


@pytest.fixture
def live(tiny):
    """``live(step, ...)`` of a model with other widths: a random llama of the given ones."""

    def change(*steps, hidden=64, ffn=128):
        config = tiny("llama").config
        config.update({
            "hidden_size": hidden, "intermediate_size": ffn, "num_attention_heads": 4,
            "num_key_value_heads": 4, "head_dim": hidden // 4,
        })  # fmt: skip
        return compress.apply(type(tiny("llama"))(config).eval(), list(steps))

    return change


@pytest.mark.parametrize(
    "second", [SECOND, {**SECOND, "symmetric": True}, {"method": "w8a8", "exclude": ["*.mlp.*"]}]
)
def test_a_plan_refuses_zero_points_among_several_schemes(plan, second):
    with pytest.raises(CompressError, match=r"steps\.1.*one scheme.*2 schemes \(4 bits"):
        plan(FIRST, second)


def test_what_one_checkpoint_can_have_passes(plan):
    assert len(plan(FIRST, {**SECOND, "bits": 4}).steps) == 2
    assert len(plan({**FIRST, "symmetric": True}, {**SECOND, "symmetric": True}).steps) == 2


def test_live_models_are_refused_before_the_first_step(tiny, monkeypatch):
    def started(*_args, **_options):
        raise AssertionError("a step was begun")

    monkeypatch.setattr("compress.api.run_live", started)
    with pytest.raises(CompressError, match=r"steps\.1.*one scheme"):
        compress.apply(tiny("llama"), [FIRST, SECOND])


def test_a_source_that_is_quantised_counts(tiny, tmp_path):
    compress.save(compress.apply(tiny("llama"), [FIRST]), tmp_path / "first")
    recipe = {"model": str(tmp_path / "first"), "steps": [SECOND]}
    with pytest.raises(CompressError, match=r"steps\.0.*one scheme"):
        compress.plan(recipe)
    assert compress.plan({**recipe, "steps": [{**SECOND, "bits": 4}]}).steps


def test_a_suggested_group_size_suits_all_layers(live):
    # 48 divides 96, the first width that fails, but not 160.
    step = {"method": "rtn", "group_size": 64}
    with pytest.raises(CompressError, match=re.escape("from [32, 16, 8] or null")):
        live(step, hidden=96, ffn=160)
    assert live({**step, "group_size": 32}, hidden=96, ffn=160)


def test_tables_count_where_they_are_rounded(live):
    step = {"method": "rtn", "group_size": 64, "include": ["*.down_proj"]}
    with pytest.raises(CompressError, match=re.escape("from [40, 32, 20, 16] or null")):
        live(step, hidden=96, ffn=160)
    with pytest.raises(CompressError, match=re.escape("from [32, 16, 8] or null") + ".*embeddings"):
        live({**step, "embeddings": 8}, hidden=96, ffn=160)


def test_no_group_size_fits(live):
    with pytest.raises(CompressError, match="Set group_size: null .*, or exclude the layer"):
        live({"method": "rtn", "group_size": 64}, hidden=64, ffn=100)


def test_a_grid_says_which_groups_divide():
    with pytest.raises(CompressError, match=re.escape("from [96, 72, 64, 48] or null")):
        QuantScheme(bits=4, group_size=128).groups(576)
    assert "Set group_size: null" in group_size_fix([100, 64], 128)
