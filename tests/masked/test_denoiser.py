"""Denoisers: legal tokens only, visible tokens certain, all tokens seen, costs counted."""

from __future__ import annotations

import pytest
import torch

from compress.generators import Denoiser, MaskedGeneration, legal_logits, subs_log_probs

NEVER = float("-inf")


def masked_rows(mask: int) -> torch.Tensor:
    ids = torch.randint(10, 200, (3, 12), generator=torch.Generator().manual_seed(1))
    ids[:, 3:9] = mask
    return ids


def test_only_legal_tokens(text):
    denoiser = text()
    logits = denoiser.logits(masked_rows(denoiser.spec.mask_id))
    legal = denoiser.spec.legal(logits.shape[-1])
    assert logits.dtype == torch.float32
    assert (logits[..., ~legal] == NEVER).all() and torch.isfinite(logits[..., legal]).all()


def test_subs_probabilities(text):
    denoiser = text()
    mask = denoiser.spec.mask_id
    ids = masked_rows(mask)
    probabilities = denoiser.log_probs(ids).exp()
    assert torch.allclose(probabilities.sum(-1), torch.ones(ids.shape), atol=1e-5)
    assert (probabilities[..., mask] == 0).all()
    visible = ids != mask
    one_hot = torch.nn.functional.one_hot(ids, probabilities.shape[-1]).float()
    assert torch.equal(probabilities[visible], one_hot[visible])


def test_no_gradient_at_visible_tokens():
    logits = torch.randn(1, 4, 5, generator=torch.Generator().manual_seed(0))
    logits[..., 4] = NEVER
    logits.requires_grad_()
    ids = torch.tensor([[4, 1, 4, 2]])
    log_probs = subs_log_probs(logits, ids, mask_id=4)
    log_probs.gather(-1, torch.tensor([[[0], [1], [3], [2]]])).sum().backward()
    assert (logits.grad[0, [1, 3]] == 0).all() and (logits.grad[0, [0, 2]] != 0).any()
    assert torch.isfinite(logits.grad).all()


def test_shift_of_dream(tiny, tokenizer):
    model = tiny("llama", is_causal=False)
    plain = MaskedGeneration.of(model, tokenizer)
    ids = masked_rows(plain.mask_id)
    straight = Denoiser(model, plain).logits(ids)
    shifted = Denoiser(model, plain.model_copy(update={"shift": True})).logits(ids)
    assert torch.equal(shifted[:, 1:], straight[:, :-1])
    assert torch.equal(shifted[:, 0], straight[:, 0])


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "bert"])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_the_flag_decides_whether_the_first_token_sees_the_last(tiny, family, bidirectional):
    if family == "bert":
        model = tiny(family, is_decoder=not bidirectional)
    else:
        model = tiny(family, **({"is_causal": False} if bidirectional else {}))
    spec = MaskedGeneration(mask_id=6)
    ids = masked_rows(6)
    other = ids.clone()
    other[:, -1] += 1
    with torch.no_grad():
        first, second = (legal_logits(model, rows, spec)[:, 0, 10:200] for rows in (ids, other))
    assert bool(((first - second).abs() > 1e-4).any()) == bidirectional


def test_guidance(images):
    denoiser = images()
    ids = torch.full((2, 17), denoiser.spec.mask_id)
    ids[:, 0] = torch.tensor([16, 20])
    free = ids.clone()
    free[:, 0] = denoiser.spec.class_id(None)
    conditional, unconditional = denoiser.logits(ids), denoiser.logits(free)
    legal = denoiser.spec.legal(ids.max() + 1)
    guided = denoiser.guided(ids, 2.0)
    expected = conditional + 2.0 * (conditional - unconditional)
    assert torch.allclose(guided[..., legal], expected[..., legal], atol=1e-4)
    assert (guided[..., ~legal] == NEVER).all()
    assert torch.equal(denoiser.guided(ids, 0.0), conditional)


def test_guidance_changes_nothing_where_classes_do_not_matter(images):
    denoiser = images()
    ids = torch.full((1, 17), denoiser.spec.mask_id)
    ids[:, 0] = 16
    embedding = denoiser.model.get_input_embeddings().weight
    with torch.no_grad():
        embedding[16] = embedding[denoiser.spec.class_id(None)]
    given = denoiser.logits(ids)
    for weight in (0.5, 3.0):
        guided = denoiser.guided(ids, weight)
        assert torch.allclose(guided[..., :16], given[..., :16], atol=1e-4)


def test_guidance_without_a_prompt_hides_it(text):
    denoiser = text()
    ids = masked_rows(denoiser.spec.mask_id)
    prompt = torch.zeros(ids.shape, dtype=torch.bool)
    prompt[:, :3] = True
    hidden = denoiser.unconditional(ids, prompt)
    assert (hidden[:, :3] == denoiser.spec.mask_id).all() and torch.equal(hidden[:, 3:], ids[:, 3:])


def test_counters_and_mode(text):
    denoiser = text()
    denoiser.model.train()
    ids = masked_rows(denoiser.spec.mask_id)
    first, second = denoiser.logits(ids), denoiser.logits(ids)
    assert torch.equal(first, second) and denoiser.model.training  # no dropout, mode put back
    assert vars(denoiser.counters) == {
        "calls": 2, "rows": 6, "block_forwards": 6, "token_block_forwards": 2 * 3 * 12 * 3
    }  # fmt: skip
    denoiser.model.eval()


def test_padding_is_not_read(text):
    denoiser = text()
    ids = masked_rows(denoiser.spec.mask_id)
    padded = torch.cat([ids, torch.zeros(3, 4, dtype=torch.long)], dim=1)
    mask = (torch.arange(16) < 12).long().expand(3, -1)
    alone, beside = denoiser.logits(ids), denoiser.logits(padded, mask)[:, :12]
    legal = denoiser.spec.legal(alone.shape[-1])
    assert torch.allclose(alone[..., legal], beside[..., legal], atol=1e-4)
