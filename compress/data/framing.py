"""What stands around a text: the tokens that a tokenizer adds and a model was trained to see.

A causal model whose sequences all began with BOS is another model without it, and so is a masked
one without [CLS] and [SEP]. Here is decided, for calibration, evaluation and training alike, what a
window or a document gets around it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from compress.data.tokens import check_ids
from compress.generators.description import MaskedGeneration, is_masked_generator
from compress.models.heads import head_of
from compress.models.special_tokens import added_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Kind = Literal["causal", "masked", "generator"]


@dataclass(frozen=True)
class Frame:
    """Special tokens around each sequence; they are context, never masked nor predicted.

    Attributes:
        prefix, suffix: their ids, in order; both may be empty.
        note: for a report, what a window has around it; empty where the tokenizer adds nothing.
    """

    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()
    note: str = ""

    def __len__(self) -> int:
        return len(self.prefix) + len(self.suffix)

    def around(self, rows: torch.Tensor) -> torch.Tensor:
        """Token ids [..., n] with the special tokens around them, [..., n + len(self)]."""
        if not len(self):
            return rows
        before, after = (
            torch.tensor(ids, dtype=rows.dtype, device=rows.device).expand(*rows.shape[:-1], -1)
            for ids in (self.prefix, self.suffix)
        )
        return torch.cat([before, rows, after], dim=-1)

    def positions(self, length: int) -> torch.Tensor:
        """Which of ``length`` positions, the special ones included, are special: bool [length]."""
        found = torch.zeros(length, dtype=torch.bool)
        found[: len(self.prefix)] = True
        found[length - len(self.suffix) :] = True
        return found


def frame_for(
    config: PreTrainedConfig,
    tokenizer: Any,
    *,
    special_tokens: bool = True,
    documents: bool = False,
    kind: Kind | None = None,
) -> Frame:
    """What each sequence of a model's text gets around it.

    A masked generator has what its description says: it decides what the sampler starts from. A
    masked language model has what its tokenizer adds on both sides. Of a causal model a window has
    what the tokenizer adds in front; what it adds behind (EOS) belongs to the end of a text, and a
    window does not end where its text ends. Documents do, so they have both.

    Args:
        config: of the model.
        tokenizer: the model's.
        special_tokens: False gives an empty frame.
        documents: sequences are whole documents, not windows of a stream.
        kind: as what the model is used; by default what the config says.

    Raises:
        CompressError: the tokenizer adds ids that the model does not know, or a description that
            does not fit the config.
    """
    each = "document" if documents else "window"
    kind = kind or _kind(config)
    if kind == "generator":
        description = MaskedGeneration.of(config, tokenizer)
        prefix, suffix = description.prefix, description.suffix
    else:
        prefix, suffix = added_tokens(tokenizer)
        if kind == "causal" and not documents:
            suffix = ()
    names = [" ".join(tokenizer.convert_ids_to_tokens(list(ids))) for ids in (prefix, suffix)]
    if not special_tokens:
        left_out = " ".join(filter(None, names))
        return Frame(note=f"without {left_out} around each {each}" if left_out else "")
    check_ids(torch.tensor([*prefix, *suffix], dtype=torch.int64), config)
    places = (f"{names[0]} in front of", f"{names[1]} behind")
    told = " and ".join(p for p, ids in zip(places, (prefix, suffix), strict=True) if ids)
    return Frame(prefix, suffix, f"{told} each {each}" if told else "")


def _kind(config: PreTrainedConfig) -> Kind:
    if is_masked_generator(config):
        return "generator"
    # What answers for a whole text was trained on whole ones, with both ends.
    return "masked" if is_masked_lm(config) or head_of(config) is not None else "causal"


def is_masked_lm(config: PreTrainedConfig) -> bool:
    """True for checkpoints of a masked language model."""
    return any(a.endswith("ForMaskedLM") for a in config.architectures or [])


def pad_rows(rows: Sequence[torch.Tensor], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of unequal length as one matrix.

    Args:
        rows: int64 [n] each.
        pad: the id behind the end of shorter rows.

    Returns:
        ids int64 [rows, longest] and the attention mask of the same shape, 0 behind the end.
    """
    ids = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=pad)
    sizes = torch.tensor([len(row) for row in rows])
    return ids, (torch.arange(ids.shape[1]) < sizes[:, None]).long()


def with_note(description: str, frame: Frame) -> str:
    """A report's line about a text, with what stands around its sequences."""
    return f"{description}; {frame.note}" if frame.note else description
