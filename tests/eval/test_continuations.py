"""Continuations are the likeliest tokens one by one, as transformers generates them."""

from __future__ import annotations

import pytest
import torch

import compress
from compress.eval.quality.continuations import LENGTH, PROMPT, continuations
from compress.eval.report import load_report


@pytest.mark.parametrize("family", ["llama", "mamba"])
def test_they_are_what_transformers_generates(family, tiny, tokenizer, text):
    model = tiny(family)
    tokens = torch.tensor(tokenizer(text.read_text())["input_ids"])[:400]
    found = continuations(model, tokenizer, tokens, 3)
    prompts = torch.stack([tokens[:PROMPT], tokens[188 : 188 + PROMPT], tokens[-PROMPT:]])
    ids = model.generate(
        prompts, do_sample=False, max_new_tokens=LENGTH, min_new_tokens=LENGTH, pad_token_id=0,
        eos_token_id=None,
    )  # fmt: skip
    assert [c.prompt for c in found] == tokenizer.batch_decode(prompts)
    for made, row in zip(found, ids[:, PROMPT:], strict=True):
        assert tokenizer.decode(row).startswith(made.text)
    assert continuations(model, tokenizer, tokens[:10], 3) == ()


def test_a_report_shows_both_models(checkpoint, text, helpers, tmp_path):
    evaluation = helpers.evaluation(text, continuations=2)
    recipe = helpers.recipe(checkpoint("llama"), ["magnitude"], evaluation=evaluation)
    report = compress.run(recipe, tmp_path / "run").report
    assert [c.prompt for c in report.before.continuations] == [
        c.prompt for c in report.after.continuations
    ]
    assert load_report(tmp_path / "run") == report
    page = (tmp_path / "run" / "report.html").read_text()
    assert page.count('<div class="texts">') == 2 and page.count("<b>compressed</b>") == 2
