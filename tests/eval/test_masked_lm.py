"""Masked models in lm-eval: scores by hand, through our harness and through lm-eval's own."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import torch

from compress.errors import CompressError

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.registry import get_model  # noqa: E402

from compress.eval.quality.masked_lm import MaskedLM  # noqa: E402
from compress.eval.quality.tasks import TaskSpec, run_tasks  # noqa: E402
from compress.generators import Denoiser, SamplerOptions, sample  # noqa: E402


@pytest.fixture(scope="module")
def model(tiny):
    return tiny("bert")


def ask(lm: MaskedLM, *pairs: tuple[str, str]) -> list[tuple[float, bool]]:
    return lm.loglikelihood(
        [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    )


def log_probs(model, tokenizer, ids: list[int]) -> torch.Tensor:
    """Of the legal tokens, without special ones."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0].double()
    logits[:, tokenizer.all_special_ids] = -torch.inf
    logits[:, len(tokenizer) :] = -torch.inf
    return logits.log_softmax(-1)


def test_pseudo_likelihood_by_hand(model, tokenizer) -> None:
    lm = MaskedLM(model, tokenizer, score="pll", batch_size=2)
    ids, mask = tokenizer("the cat")["input_ids"], tokenizer.mask_token_id
    total = 0.0
    for place in range(3, 7):
        hidden = [mask if i == place else token for i, token in enumerate(ids)]
        total += log_probs(model, tokenizer, hidden)[place, ids[place]].item()
    assert ask(lm, ("the", " cat"))[0][0] == pytest.approx(total, rel=1e-5)


def test_the_bound_of_one_token_is_exact_and_of_two_unbiased(model, tokenizer) -> None:
    mask = tokenizer.mask_token_id
    head, (a, b) = tokenizer("the-")["input_ids"], tokenizer("ca")["input_ids"]
    one = log_probs(model, tokenizer, [*head, mask])[4, a].item()
    lm = MaskedLM(model, tokenizer, draws=1)
    assert ask(lm, ("the-", "c"))[0][0] == pytest.approx(one, rel=1e-5)
    both = log_probs(model, tokenizer, [*head, mask, mask])
    first = log_probs(model, tokenizer, [*head, mask, b])[4, a].item()
    second = log_probs(model, tokenizer, [*head, a, mask])[5, b].item()
    # k = 2 hides both with weight 1, k = 1 hides either with weight 2: half each.
    exact = 0.5 * (both[4, a].item() + both[5, b].item()) + 0.5 * (first + second)
    found = ask(MaskedLM(model, tokenizer, draws=400), ("the-", "ca"))[0][0]
    assert found == pytest.approx(exact, rel=0.02)


def test_greedy_means_that_decoding_gives_the_answer(model, tokenizer) -> None:
    lm, context = MaskedLM(model, tokenizer), tokenizer("the cat")["input_ids"]
    row = torch.tensor([[*context, *[tokenizer.mask_token_id] * 3]])
    options = SamplerOptions(steps=3, order="low_confidence", temperature=0.0)
    answer = sample(Denoiser(model, lm.spec), options, rows=row).generated[0].tolist()
    other = [answer[0], answer[1], answer[2] - 1 if answer[2] > 7 else 8]
    asked = [(None, context, answer), (None, context, other)]
    (_, yes), (_, no) = lm._loglikelihood_tokens(asked)
    assert yes and not no
    request = Instance("generate_until", {}, ("the cat", {"until": [], "max_gen_toks": 3}), 0)
    assert lm.generate_until([request]) == [tokenizer.decode(answer)]
    first = tokenizer.decode(answer[:1])
    stopped = Instance("generate_until", {}, ("the cat", {"until": [first], "max_gen_toks": 3}), 0)
    assert lm.generate_until([stopped]) == [""]


def test_long_contexts_lose_their_beginning(model, tokenizer) -> None:
    lm = MaskedLM(model, tokenizer, score="pll")
    assert lm.longest == 128
    long, short = ask(lm, ("x" * 300 + "y" * 124, "cats"), ("y" * 124, "cats"))
    assert long == short
    texts = [Instance("loglikelihood_rolling", {}, ("ab" * n,), 0) for n in (64, 96)]
    whole, more = lm.loglikelihood_rolling(texts)
    assert more < whole < 0


def test_answers_of_nothing_but_unknown_tokens_have_a_score(model, tokenizer) -> None:
    lm = MaskedLM(model, tokenizer, score="pll")
    unknown = tokenizer.unk_token
    assert lm.tok_encode(unknown) == [tokenizer.unk_token_id]
    ((score, greedy), known) = ask(lm, ("the", 2 * unknown), ("the", "cat"))
    assert score == pytest.approx(-2 * math.log(len(tokenizer))) and not greedy
    assert known == ask(lm, ("the", "cat"))[0]
    texts = ["a" * 128, "a" * 128 + unknown, unknown]
    requests = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in texts]
    whole, longer, nothing = lm.loglikelihood_rolling(requests)
    assert longer == whole < 0 and nothing == 0


def test_through_our_harness_and_through_lm_eval(model, tokenizer, checkpoint, tmp_path) -> None:
    path = tmp_path / "piqa/validation.jsonl"
    path.parent.mkdir()
    pairs = itertools.product(["open a jar", "dry a cup"], [0, 1])
    documents = [{"goal": g, "sol1": "twist it", "sol2": "eat it", "label": n} for g, n in pairs]
    path.write_text("".join(json.dumps(d) + "\n" for d in documents))
    found = run_tasks(model, tokenizer, ["piqa"], data_root=tmp_path, masked=TaskSpec(score="pll"))
    assert found.score == "pll" and found.tasks["piqa"].metrics["acc"].value == 0.5
    assert get_model("compress_masked") is MaskedLM
    theirs = MaskedLM.create_from_arg_string(
        f"pretrained={checkpoint('bert')},score=pll", {"batch_size": 4, "device": "cpu"}
    )
    ours = MaskedLM(model, tokenizer, score="pll")
    assert ask(theirs, ("open", " a jar"))[0][0] == pytest.approx(
        ask(ours, ("open", " a jar"))[0][0], rel=1e-5
    )


def test_refusals(model, tokenizer, tiny, tmp_path: Path) -> None:
    with pytest.raises(CompressError, match="bound or pll"):
        MaskedLM(model, tokenizer, score="likelihood")
    with pytest.raises(CompressError, match="at least one draw"):
        MaskedLM(model, tokenizer, draws=0)
    with pytest.raises(CompressError, match="tokenizer"):
        MaskedLM(model, None)
    with pytest.raises(CompressError, match="is_causal"):
        MaskedLM(tiny("llama"), tokenizer)
    with pytest.raises(CompressError, match="empty"):
        ask(MaskedLM(model, tokenizer), ("the", ""))
