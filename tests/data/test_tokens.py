"""Token streams and windows: exact, disjoint, seeded, and clear about what is too short."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from compress.data.text import Text
from compress.data.tokens import check_ids, check_tokenizer, token_digest, token_stream
from compress.data.tokens import token_windows as windows
from compress.errors import CompressError

SENTENCE = "the quick brown fox jumps over a lazy dog and then under it again while nobody sees"
WORDS = SENTENCE.split()


def prose(words: int) -> str:
    generator = torch.Generator().manual_seed(1)
    picks = torch.randint(len(WORDS), (words,), generator=generator).tolist()
    return " ".join(WORDS[i] + (".\n" if n % 17 == 0 else "") for n, i in enumerate(picks))


def trained(pre_tokenizer) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=["<unk>", "<s>"])
    tokenizer.train_from_iterator([prose(2000)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>")


@pytest.fixture(scope="module", params=["bytes", "metaspace"])
def tokenizer(request):
    kinds = {
        "bytes": pre_tokenizers.ByteLevel(add_prefix_space=False),
        "metaspace": pre_tokenizers.Metaspace(),
    }
    return trained(kinds[request.param])


@pytest.mark.parametrize("max_tokens", [1, 100, 1500, 10**6])
def test_stopping_early_gives_the_tokens_of_the_whole(tokenizer, max_tokens):
    text = prose(20_000)
    whole = token_stream(text, tokenizer)
    assert torch.equal(token_stream(text, tokenizer, max_tokens), whole[:max_tokens])


def test_dense_text_is_read_far_enough(tokenizer):
    # Tokens of far more than eight characters: the first guess of the prefix is too short.
    text = ("x" * 300 + " ") + prose(20_000)
    text = "while nobody sees " * 30_000 + text
    whole = token_stream(text, tokenizer)
    assert torch.equal(token_stream(text, tokenizer, 9000), whole[:9000])


def test_joined_documents_are_one_stream(tokenizer):
    text = Text(("the fox", "a dog"), "\n\n", "two")
    assert torch.equal(token_stream(text, tokenizer), token_stream("the fox\n\na dog", tokenizer))


def test_no_special_tokens_and_no_warning(tokenizer, caplog):
    tokenizer.model_max_length = 8
    stream = token_stream(prose(100), tokenizer)
    assert tokenizer.bos_token_id not in stream.tolist()
    assert not caplog.records and stream.dtype == torch.int64 and len(stream) > 8


@pytest.mark.parametrize("text", ["", "  \n "])
def test_empty_text(tokenizer, text):
    with pytest.raises(CompressError, match="empty"):
        token_stream(text, tokenizer)


def test_head_windows():
    stream = torch.arange(100)
    assert torch.equal(
        windows(stream, samples=3, length=10, offset=5), torch.arange(5, 35).view(3, 10)
    )


def test_random_windows_are_disjoint_and_seeded():
    stream = torch.arange(1000)
    first = windows(stream, samples=20, length=16, selection="random", seed=3)
    again = windows(stream, samples=20, length=16, selection="random", seed=3)
    other = windows(stream, samples=20, length=16, selection="random", seed=4)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert len(first.unique()) == first.numel()
    assert torch.equal(first, first[:, :1] + torch.arange(16))


def test_windows_do_not_share_memory_with_the_stream():
    stream = torch.arange(20)
    windows(stream, samples=2, length=10).zero_()
    assert stream[5] == 5


@pytest.mark.parametrize("selection", ["head", "random"])
def test_too_short_text_gives_the_numbers(selection):
    with pytest.raises(CompressError) as caught:
        windows(torch.arange(99), samples=10, length=10, selection=selection)
    message = str(caught.value)
    assert "10 x 10 = 100" in message and "99 tokens" in message and "9 such" in message
    assert "Lower samples or length" in message


@pytest.mark.parametrize("bad", [{"samples": 0}, {"length": 0}, {"offset": -1}])
def test_senseless_numbers(bad):
    with pytest.raises(CompressError, match="at least 1"):
        windows(torch.arange(99), **{"samples": 1, "length": 1, **bad})


def test_tokenizer_larger_than_the_model(tokenizer):
    size = max(tokenizer.get_vocab().values()) + 1
    check_tokenizer(tokenizer, LlamaConfig(vocab_size=size))
    with pytest.raises(CompressError, match=f"vocabulary of {size - 1}, got id {size - 1}"):
        check_tokenizer(tokenizer, LlamaConfig(vocab_size=size - 1))


def test_ids_outside_the_vocabulary():
    check_ids(torch.tensor([0, 9]), LlamaConfig(vocab_size=10))
    for ids in ([0, 10], [-1, 3]):
        with pytest.raises(CompressError, match="token ids from 0 to 9"):
            check_ids(torch.tensor(ids), LlamaConfig(vocab_size=10))


def test_digest_is_of_values_and_shape():
    ids = torch.arange(12)
    assert token_digest(ids) == token_digest(ids.to(torch.int32))
    assert token_digest(ids.view(3, 4)) == token_digest(ids.view(4, 3).reshape(3, 4))
    assert len({token_digest(x) for x in (ids, ids.view(3, 4), ids.view(4, 3), ids + 1)}) == 4
