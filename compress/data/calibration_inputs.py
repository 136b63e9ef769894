"""Calibration inputs as Python users have them, made into batches that a live model takes."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compress.data.chat import render_chats
from compress.data.framing import frame_for
from compress.data.pictures import COLUMNS, in_channels, picture, undecoded
from compress.data.processor import ImageProcessor
from compress.data.readers import CHAT, TEXT, Chat, is_chat
from compress.data.tokens import check_ids, check_tokenizer
from compress.errors import CompressError
from compress.models.images import PIXELS, image_shape
from compress.models.inputs import LABELS
from compress.models.positions import positions_of

Batch = dict[str, torch.Tensor]
PAIR = "text_pair"  # beside a text: the second one of a pair

FORMS = (
    "token ids [samples, length] (a tensor, an array), what a tokenizer returns, or an iterable of "
    "samples or batches (lists of ids, tensors, dicts of model inputs, a DataLoader, a "
    "datasets.Dataset); texts, pairs {text, text_pair}, conversations and images {image} together "
    "with `tokenizer`, or the image processor in its place"
)
# Tokenizers and data sets hand these out whether or not the model has a use for them.
_EXTRAS = {
    "token_type_ids", "special_tokens_mask", "offset_mapping", "overflow_to_sample_mapping",
    "length", "num_truncated_tokens",
}  # fmt: skip


def calibration_inputs(
    given: Any, model: Any, tokenizer: Any = None, *, length: int = 512
) -> list[Batch]:
    """Batches of model inputs on the model's device, checked against its vocabulary and positions.

    A matrix of ids, or a mapping of such (what a tokenizer returns), becomes a batch a row without
    its padding; an iterable keeps its batches. Each text is a sample of its own, with what the
    tokenizer adds to a text, cut to ``length``; a conversation becomes one through the tokenizer's
    chat template.

    Args:
        given: see :data:`FORMS`; None gives no batches.
        model: live.
        tokenizer: for texts.
        length: tokens of a text, special ones included, at most.

    Raises:
        CompressError: another form, ids that are no whole numbers or outside the vocabulary,
            sequences beyond the model's positions, inputs that the model does not take, empty or
            not finite ones, texts without a tokenizer.
    """
    if given is None:
        return []
    reader = _Reader(model, tokenizer, length)
    batches = [
        reader.checked(batch, f"calibration batch {number}")
        for number, batch in enumerate(reader.batches(given))
    ]
    labelled = sum("labels" in batch for batch in batches)
    if labelled not in (0, len(batches)):
        raise CompressError(
            "labels in all calibration batches or in none", f"{labelled} of {len(batches)}"
        )
    return [{k: v.to(model.device) for k, v in batch.items()} for batch in batches]


class _Reader:
    """Reads calibration inputs for one model."""

    def __init__(self, model: Any, tokenizer: Any, length: int) -> None:
        self.model, self.config, self.tokenizer = model, model.config, tokenizer
        self.accepted = set(inspect.signature(type(model).forward).parameters) - {"self"}
        self.main = getattr(model, "main_input_name", "input_ids")
        self.positions = positions_of(self.config)
        self.length = min(length, self.positions or length)
        self.frame = None
        # Models with one type of tokens are given none.
        self._typed = (getattr(self.config, "type_vocab_size", None) or 0) > 1

    def batches(self, given: Any) -> Iterator[Batch]:
        if isinstance(given, str) and self.tokenizer is not None:
            _refuse_path(given)
            given = [given]
        if isinstance(given, (torch.Tensor, np.ndarray)):
            yield from self._rows({"input_ids": _tensor(given, "input_ids")})
        elif isinstance(given, Mapping):
            for part in _alike(given):
                yield from self._rows({k: _tensor(v, k) for k, v in part.items()})
        elif isinstance(given, (str, Path, bytes)) or not isinstance(given, Iterable):
            raise _not_a_form(given)
        else:
            # A table has columns that are nobody's inputs; a list of dicts says what it means.
            loose = bool(getattr(getattr(given, "dataset", given), "column_names", None))
            for item in undecoded(given):
                texts = item.get(TEXT, item) if isinstance(item, Mapping) else item
                if isinstance(texts, (list, tuple)) and _all_texts(texts):  # of a DataLoader
                    yield from map(self._text, texts)
                else:
                    yield self._item(item, loose)

    def _rows(self, inputs: Batch) -> Iterator[Batch]:
        """A batch a row, without padding where the mask shows it."""
        inputs = self._known(inputs, loose=False)
        counts = {len(v) if v.dim() else 0 for v in inputs.values()}
        ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
        if ids is not None and ids.dim() != 2:
            raise CompressError("calibration token ids of shape [samples, length]",
                                str(list(ids.shape)))  # fmt: skip
        if len(counts) != 1:
            raise CompressError("calibration inputs with one row a sample", f"{counts} rows")
        sequences = {k for k, v in inputs.items() if ids is not None and v.shape == ids.shape}
        for row in range(counts.pop()):
            batch = {k: v[row : row + 1] for k, v in inputs.items()}
            if mask is not None and "attention_mask" in sequences:
                seen = mask[row].bool()
                if not seen.any():
                    continue  # nothing but padding
                batch = {k: v[:, seen] if k in sequences else v for k, v in batch.items()}
                del batch["attention_mask"]
            yield batch

    def _item(self, item: Any, loose: bool) -> Batch:
        if isinstance(item, str) or is_chat(item):
            return self._text(item)
        if isinstance(item, Mapping):
            image = next((n for n in COLUMNS if n in item and PIXELS not in item), None)
            if image is not None and self.main == PIXELS:
                return self._image(item[image])
            for text in () if self.accepted & set(item) else (item.get(TEXT), item.get(CHAT)):
                if isinstance(text, str) and isinstance(item.get(PAIR), str):
                    return self._pair(text, item[PAIR])
                if isinstance(text, str) or is_chat(text):
                    return self._text(text)
            if loose and not self.accepted & set(item):
                raise CompressError(
                    "a data set with a column input_ids, text or messages",
                    f"columns {', '.join(map(str, item))}",
                    "Select or rename the column, or give its values as a list",
                )
            known = self._known(dict(item), loose)
            tensors = {k: _tensor(v, k) for k, v in known.items()}
            labels = tensors.pop(LABELS, None)
            whole = any(tensor.dim() > 1 for tensor in tensors.values())
            batch = {k: _batched(tensor, k) for k, tensor in tensors.items()}
            if labels is not None:  # one a row, or one a token: of a batch, or of one sample
                batch[LABELS] = labels if whole else labels[None]
            return batch
        if isinstance(item, Sequence) and len(item) == 1 and isinstance(item[0], torch.Tensor):
            item = item[0]  # what a DataLoader over a TensorDataset yields
        if isinstance(item, (torch.Tensor, np.ndarray, Sequence)) and not isinstance(item, bytes):
            return {"input_ids": _batched(_tensor(item, "input_ids"), "input_ids")}
        raise _not_a_form(item, "a sample that is ")

    def _known(self, inputs: dict[str, Any], loose: bool) -> dict[str, Any]:
        unknown = set(inputs) - self.accepted - {"labels"}
        wrong = set() if loose else unknown - _EXTRAS
        if wrong:
            raise CompressError(
                f"inputs that {type(self.model).__name__} takes", ", ".join(sorted(wrong)),
                "Leave them out",
            )  # fmt: skip
        return {k: v for k, v in inputs.items() if k not in unknown and v is not None}

    def _text(self, text: str | Chat) -> Batch:
        if self.tokenizer is None or not callable(self.tokenizer):
            raise CompressError(
                "calibration texts together with a tokenizer", f"the text {text!r:.40} alone",
                "Give compress.apply tokenizer=… too",
            )  # fmt: skip
        text = render_chats([text], "the calibration data", self.tokenizer)[0][0]
        if self.frame is None:
            check_tokenizer(self.tokenizer, self.config)
            self.frame = frame_for(self.config, self.tokenizer, documents=True)
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if not ids:
            raise CompressError(
                "calibration texts with something in them", repr(text[:40]), "Leave it out"
            )
        room = max(1, self.length - len(self.frame))
        return {"input_ids": self.frame.around(torch.tensor([ids[:room]], dtype=torch.int64))}

    def _pair(self, first: str, second: str) -> Batch:
        """Two texts as the tokenizer joins them; of a long pair the longer text is cut."""
        if self.tokenizer is None or not callable(self.tokenizer):
            raise CompressError(
                "calibration texts together with a tokenizer", f"the text {first!r:.40} alone",
                "Give compress.apply tokenizer=… too",
            )  # fmt: skip
        check_tokenizer(self.tokenizer, self.config)
        read = self.tokenizer(
            first, second, truncation=True, max_length=self.length, return_tensors="pt",
            return_token_type_ids=self._typed,
        )  # fmt: skip
        return {name: values for name, values in read.items() if name != "attention_mask"}

    def _image(self, image: Any) -> Batch:
        """An image through the image processor."""
        if self.tokenizer is None:
            raise CompressError(
                "calibration images together with an image processor", "images alone",
                "Give compress.apply tokenizer=… too (what compress.load returned)",
            )  # fmt: skip
        array = in_channels(picture(image), image_shape(self.config)[0])
        return {PIXELS: ImageProcessor.of(self.tokenizer).pixels(array)[None]}

    def checked(self, batch: Batch, where: str) -> Batch:
        """Refuse what the model would fail on, or silently go wrong with, in its depths."""
        needed = {self.main, "input_ids", "inputs_embeds"} & self.accepted
        if not needed & set(batch):
            raise CompressError(
                " or ".join(sorted(needed)), f"only {', '.join(batch) or 'nothing'}", where=where
            )
        for name, tensor in batch.items():
            _check_values(name, tensor, where)
        ids = batch.get("input_ids")
        if ids is None or self.main != "input_ids":
            return batch
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise CompressError(
                "token ids in whole numbers", str(ids.dtype).removeprefix("torch."), where=where
            )
        ids = ids.long()
        if ids.dim() == 2 and self.positions and ids.shape[1] > self.positions:
            raise CompressError(
                f"sequences of at most {self.positions} tokens, the model's positions",
                f"{ids.shape[1]} tokens", "Cut them", where=where,
            )  # fmt: skip
        try:
            check_ids(ids, self.config)
        except CompressError as error:
            raise error.within(where) from None
        return {**batch, "input_ids": ids}


def _alike(inputs: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """What a tokenizer returns without padding, row by row: rows differ in length."""
    nested = [
        isinstance(v, list) and all(isinstance(row, list) for row in v) for v in inputs.values()
    ]
    if not (nested and all(nested)) or len({len(v) for v in inputs.values()}) != 1:
        yield inputs
        return
    for row in zip(*inputs.values(), strict=True):
        yield {name: [values] for name, values in zip(inputs, row, strict=True)}


def _all_texts(values: Sequence[Any]) -> bool:
    return bool(values) and all(isinstance(value, str) for value in values)


def _refuse_path(text: str) -> None:
    """Its name is no text to calibrate on."""
    with suppress(OSError, ValueError):  # too long for a name, or with characters none can have
        if not Path(text).is_file():
            return
        raise CompressError(
            "calibration texts", f"the name of a file, {text!r}", "Read it: Path(...).read_text()"
        )


def _tensor(value: Any, name: str) -> torch.Tensor:
    """A tensor of what is one, or of nested lists of numbers."""
    if isinstance(value, Sequence) and any(isinstance(v, torch.Tensor) for v in value):
        raise CompressError(
            f"one tensor as {name}", f"a {type(value).__name__} of {len(value)} tensors",
            "Stack them [samples, length]. (A DataLoader's default collation turns lists of ids on "
            "their side: set the data set's format to torch, or give a collate_fn)",
        )  # fmt: skip
    try:
        tensor = value if isinstance(value, torch.Tensor) else torch.as_tensor(np.asarray(value))
    except (TypeError, ValueError) as error:
        raise CompressError(
            f"numbers in rows of one length as {name}", f"{type(value).__name__} ({error})",
            f"Calibration takes {FORMS}",
        ) from None  # fmt: skip
    if tensor.is_meta:
        raise CompressError(f"{name} with values", "a tensor on the meta device")
    return tensor


def _batched(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """One sample as a batch of one; batches as they are."""
    if tensor.dim() == 0:
        raise CompressError(f"a sequence as {name} of a sample", f"the number {tensor.item()}",
                            f"Calibration takes {FORMS}")  # fmt: skip
    return tensor[None] if tensor.dim() == 1 else tensor


def _check_values(name: str, tensor: torch.Tensor, where: str) -> None:
    if not tensor.numel():
        raise CompressError(f"{name} with something in it", str(list(tensor.shape)), where=where)
    # -inf is what an additive mask holds.
    bad = torch.isnan if "mask" in name else lambda x: ~torch.isfinite(x)
    if tensor.is_floating_point() and bool(bad(tensor).any()):
        raise CompressError(f"finite {name}", "NaN or infinite values", where=where)


def _not_a_form(given: Any, what: str = "") -> CompressError:
    return CompressError(f"calibration: {FORMS}", f"{what}{type(given).__name__} {given!r:.60}")
