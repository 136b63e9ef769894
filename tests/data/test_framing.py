"""What stands around a text: found out from the tokenizer, the same for every user of text."""

from __future__ import annotations

import pytest
import torch

from compress.data.calibration import calibration_batches
from compress.data.calibration_spec import CalibrationSpec
from compress.data.framing import Frame, frame_for, pad_rows
from compress.data.text import load_text
from compress.data.tokens import token_digest, token_stream, token_windows
from compress.errors import CompressError
from compress.generators import MaskedGeneration
from compress.train.create.material import frame_of, prepare, read_data
from compress.train.create.spec import TrainSpec

BOS, EOS, CLS, SEP, MASK = 1, 2, 4, 5, 6


@pytest.fixture
def spec(text):
    def make(**fields):
        fields = {"text": {"source": str(text)}, "samples": 8, "length": 24, "batch": 4, **fields}
        return CalibrationSpec(**fields)

    return make


@pytest.mark.parametrize(
    ("template", "family", "window", "document"),
    [
        ("$A", "llama", ((), ()), ((), ())),
        ("[BOS] $A", "llama", ((BOS,), ()), ((BOS,), ())),
        ("[CLS] [BOS] $A", "llama", ((CLS, BOS), ()), ((CLS, BOS), ())),
        # A window of a stream does not end where a text ends; a document does.
        ("[BOS] $A [EOS]", "llama", ((BOS,), ()), ((BOS,), (EOS,))),
        ("$A [EOS]", "llama", ((), ()), ((), (EOS,))),
        ("[CLS] $A [SEP]", "bert", ((CLS,), (SEP,)), ((CLS,), (SEP,))),
        ("$A", "bert", ((), ()), ((), ())),  # that there is a [CLS] does not mean that it is added
    ],
)
def test_the_frame_is_what_the_tokenizer_adds(
    framing_tokenizer, tiny, template, family, window, document
):
    tokenizer, config = framing_tokenizer(template), tiny(family).config
    for documents, (prefix, suffix) in ((False, window), (True, document)):
        frame = frame_for(config, tokenizer, documents=documents)
        assert (frame.prefix, frame.suffix) == (prefix, suffix)
        assert bool(frame.note) == bool(prefix or suffix)
        off = frame_for(config, tokenizer, documents=documents, special_tokens=False)
        assert len(off) == 0 and off.note.startswith("without") == bool(prefix or suffix)


def test_a_generator_has_what_its_description_says(framing_tokenizer, tiny):
    config, tokenizer = tiny("bert").config, framing_tokenizer("[CLS] $A [SEP]")
    MaskedGeneration(mask_id=MASK, prefix=(BOS,)).store(config)
    assert frame_for(config, tokenizer).prefix == (BOS,)
    assert frame_for(config, tokenizer).suffix == ()


def test_rows_and_padding():
    frame = Frame((1, 9), (2,))
    ids, seen = pad_rows([frame.around(torch.tensor(r)) for r in ([5, 6], [7])], 0)
    assert ids.tolist() == [[1, 9, 5, 6, 2], [1, 9, 7, 2, 0]]
    assert seen.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]
    assert frame.positions(5).tolist() == [True, True, False, False, True]


def test_a_tokenizer_that_adds_nothing_changes_nothing(spec, text, tiny, tokenizer):
    made = calibration_batches(spec(), tokenizer, tiny("llama").config)
    windows = token_windows(token_stream(load_text(str(text)), tokenizer), samples=8, length=24)
    assert torch.equal(torch.cat([b["input_ids"] for b in made.batches]), windows)
    assert made.digest == token_digest(windows) and made.tokens == windows.numel()
    assert made.description == load_text(str(text)).description


def test_calibration_samples_begin_with_bos(spec, text, tiny, framing_tokenizer):
    tokenizer, config = framing_tokenizer("[BOS] $A"), tiny("llama").config
    made = calibration_batches(spec(), tokenizer, config)
    ids = torch.cat([b["input_ids"] for b in made.batches])
    assert ids.shape == (8, 24) and (ids[:, 0] == BOS).all()
    stream = token_stream(load_text(str(text)), tokenizer)
    assert torch.equal(ids[:, 1:].flatten(), stream[: 8 * 23])
    assert made.description.endswith("[BOS] in front of each window")
    off = calibration_batches(spec(special_tokens=False), tokenizer, config)
    assert torch.equal(torch.cat([b["input_ids"] for b in off.batches]).flatten(), stream[: 8 * 24])
    assert off.description.endswith("without [BOS] around each window")


@pytest.mark.parametrize("generates", [False, True])
def test_special_tokens_are_never_masked(spec, tiny, framing_tokenizer, generates):
    tokenizer, config = framing_tokenizer("[CLS] $A [SEP]"), tiny("bert").config
    if generates:
        MaskedGeneration.of(config, tokenizer).store(config)
    made = calibration_batches(spec(mask_ratio=1.0), tokenizer, config)
    ids = torch.cat([b["input_ids"] for b in made.batches])
    assert (ids[:, 0] == CLS).all() and (ids[:, -1] == SEP).all()
    assert (ids[:, 1:-1] == MASK).all()
    assert (torch.cat(made.labels)[:, [0, -1]] == -100).all()


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_documents_are_samples_of_their_own(spec, tiny, framing_tokenizer, tmp_path, family):
    source = tmp_path / "lines.jsonl"
    texts = ["ab", "c" * 40, "def", "g" * 10]
    source.write_text("".join(f'{{"text": "{t}"}}\n' for t in texts))
    tokenizer = framing_tokenizer("[CLS] $A [SEP]")
    given = spec(
        text={"source": str(source)}, packing="documents", samples=4, length=12, batch=2,
        mask_ratio=0,
    )  # fmt: skip
    made = calibration_batches(given, tokenizer, tiny(family).config)
    first, second = made.batches
    assert first["input_ids"].shape == second["input_ids"].shape == (2, 12)
    assert first["attention_mask"].sum(1).tolist() == [4, 12]
    assert second["attention_mask"].sum(1).tolist() == [5, 12]
    for batch in made.batches:
        ends = batch["attention_mask"].sum(1) - 1
        assert batch["input_ids"].gather(1, ends[:, None]).flatten().tolist() == [SEP, SEP]
    assert made.tokens == 33 and made.description.endswith("each document")
    alone = calibration_batches(
        given.model_copy(update={"batch": 1}), tokenizer, tiny(family).config
    )
    assert all("attention_mask" not in batch for batch in alone.batches)
    masked = calibration_batches(
        given.model_copy(update={"mask_ratio": 1.0}), tokenizer, tiny("bert").config
    )
    assert sum(int((y != -100).sum()) for y in masked.labels) == 33 - 8  # padding is not masked
    with pytest.raises(CompressError, match="at least 5 documents"):
        calibration_batches(given.model_copy(update={"samples": 5}), tokenizer, tiny(family).config)


def test_training_windows_begin_with_bos(text, own_checkpoint, framing_tokenizer):
    folder = own_checkpoint("llama")
    framing_tokenizer("[BOS] $A").save_pretrained(folder)
    section = {"from": str(folder), "text": {"source": str(text)}, "length": 16,
               "training": {"steps": 1}}  # fmt: skip
    for fields, front in (({}, BOS), ({"special_tokens": False}, None)):
        spec = TrainSpec(**section, **fields)
        data = read_data(spec, None, folder)
        rows = prepare(spec, data, folder, 0, frame_of(spec, folder)).rows
        ids = rows.get(torch.tensor([0, 3]))["input_ids"]
        assert ids.shape == (2, 16) and ((ids[:, 0] == BOS).all() == (front == BOS))
        assert torch.equal(ids[0, 4:], ids[1, 1:-3]) if front else True
