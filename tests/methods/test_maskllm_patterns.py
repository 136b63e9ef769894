"""Patterns that MaskLLM cannot learn or keep are refused before anything runs."""

from __future__ import annotations

import pytest

import compress
from compress.errors import CompressError
from compress.methods.sparsity.maskllm.method import MaskLLM

STEPS = {"steps": 1, "batch": 1}


@pytest.mark.parametrize(
    ("options", "message"),
    (
        ({"pattern": "unstructured"}, "N:M"),
        ({"pattern": "0:4"}, "N:M"),
        ({"pattern": "4:4"}, "keeps every weight"),
        ({"pattern": "1:64", "scope": "model"}, "M < 63"),
        ({"pattern": "1:64", "end_to_end": STEPS}, "M < 63"),
        ({"pattern": "1:64", "tuning": STEPS, "tuning_scope": "model"}, "M < 63"),
    ),
)
def test_patterns_that_cannot_be_kept(options, message):
    with pytest.raises(ValueError, match=message):
        MaskLLM(**options)


@pytest.mark.parametrize("pattern", ("unstructured", "4:4"))
def test_they_are_told_as_any_mistake(pattern, tiny):
    with pytest.raises(CompressError, match="pattern"):
        compress.apply(tiny("llama"), [{"method": "maskllm", "pattern": pattern}])


def test_wide_patterns_are_for_blocks():
    assert MaskLLM(pattern="1:64").parsed.m == 64
    assert MaskLLM(pattern="1:32", scope="model").parsed.m == 32
