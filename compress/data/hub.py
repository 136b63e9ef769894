"""Texts and rows of data sets on a Hugging Face hub, streamed: only what is used is fetched."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from compress.data.catalog import LINES, whole_file
from compress.data.readers import Chat, texts_of
from compress.errors import CompressError
from compress.system import hub_process
from compress.system.hub_process import HubError

TIMEOUT = 10.0  # seconds until a hub that does not answer is called unreachable
MAX_BYTES = 64 * 2**20  # of text; some data sets have terabytes, and no run needs so much


def read_hub_dataset(
    dataset: str,
    subset: str | None,
    split: str,
    *,
    field: str = "text",
    limit: int | None = None,
    data_root: str | Path | None = None,
    have: Sequence[str] = (),
    endpoint: str | None = None,
) -> list[str | Chat]:
    """The first documents of a split, at most ``limit`` and at most 64 MiB.

    Args:
        dataset: ``owner/name``.
        subset: its configuration, or None for the only one.
        split: its split.
        field: the column with the text.
        limit: documents to read.
        data_root: the data root that was searched without success, for messages.
        have: what the data root has of this data set, for messages.
        endpoint: the hub's address; HF_ENDPOINT or the public hub if None.

    Raises:
        CompressError: a hub that does not answer (told within seconds), no such data set, subset,
            split or field.
    """
    lines = dataset in LINES
    where = _Place(dataset, data_root, have)
    with _rows(where, subset, split, endpoint) as rows:
        texts = texts_of(rows, field, dataset, keep_blank=lines)
        texts = list(_limited(texts, None if lines else limit))
    return [whole_file(dataset, split, texts)] if lines else texts


def read_hub_rows(
    dataset: str,
    subset: str | None,
    split: str,
    *,
    limit: int | None = None,
    data_root: str | Path | None = None,
    have: Sequence[str] = (),
    endpoint: str | None = None,
) -> list[dict[str, Any]]:
    """The first rows of a split with all their columns, at most ``limit`` and 64 MiB.

    Arguments and errors are those of :func:`read_hub_dataset`.
    """
    found: list[dict[str, Any]] = []
    size = 0
    with _rows(_Place(dataset, data_root, have), subset, split, endpoint) as rows:
        for row in rows:
            if (limit is not None and len(found) >= limit) or size >= MAX_BYTES:
                break
            size += sum(map(_size, row.values()))
            found.append(row)
    return found


def _size(value: Any) -> int:
    """Characters of a text, or of the bytes of an image in base64."""
    if isinstance(value, dict):
        return sum(map(_size, value.values()))
    return len(value) if isinstance(value, str) else 0


class _Place(NamedTuple):
    """What is asked for, and what there is of it without a hub, for messages."""

    dataset: str
    data_root: str | Path | None
    have: Sequence[str]

    @property
    def advice(self) -> str:
        if self.data_root is None:
            return (
                "Give a folder with local copies (--data-root DIR), a file as the source, or, for "
                "a text, python:pydoc_data.topics, which every Python has"
            )
        held = f"has {', '.join(self.have)} of it" if self.have else "has nothing of it"
        return (
            f"The data root {self.data_root} {held}; put the split at "
            f"{self.dataset}/<split>.jsonl below it"
        )


@contextmanager
def _rows(
    where: _Place, subset: str | None, split: str, endpoint: str | None
) -> Iterator[Iterator[dict[str, Any]]]:
    """The rows as they come; what goes wrong on the way is told."""
    _ask_hub(where, endpoint)
    try:
        with closing(_arriving(where.dataset, subset, split)) as rows:
            yield rows
    except HubError as error:
        if "ValueError" in error.types:  # an unknown subset or split, the known ones in the text
            raise CompressError(
                f"a subset and split of {where.dataset}", f"{subset!r}, {split!r}: {error}",
                "Set subset and split",
            ) from error  # fmt: skip
        raise CompressError(
            f"the rows of {where.dataset}", f"{error.types[0]}: {error}", where.advice
        ) from error
    except TimeoutError as error:
        raise CompressError(
            f"the rows of {where.dataset}", f"none within {hub_process.SILENCE:.0f} s",
            where.advice,
        ) from error  # fmt: skip


def _arriving(dataset: str, subset: str | None, split: str) -> Iterator[dict[str, Any]]:
    """The rows as they come; a TimeoutError when none does."""
    with hub_process.asked("rows", dataset=dataset, subset=subset, split=split) as asked:
        while "row" in (answer := asked.answer(hub_process.SILENCE)):
            yield answer["row"]


def _ask_hub(where: _Place, endpoint: str | None) -> None:
    """One short request, since the loader itself retries for minutes."""
    import huggingface_hub
    from huggingface_hub import errors

    try:
        huggingface_hub.HfApi(endpoint=endpoint).dataset_info(where.dataset, timeout=TIMEOUT)
    except errors.RepositoryNotFoundError as error:
        raise CompressError(
            "a file, or the id of a data set on the hub", f"{where.dataset!r}, which is neither",
            "Check the spelling; a private or gated one needs a login (hf auth login)",
        ) from error  # fmt: skip
    except errors.HFValidationError as error:
        raise CompressError(
            "a file that exists, or a data set id of the form owner/name", repr(where.dataset)
        ) from error
    except Exception as error:
        line = (str(error).strip().splitlines() or [""])[0]
        raise CompressError(
            f"a usable answer from the hub about the data set {where.dataset}",
            f"{type(error).__name__}: {line}", where.advice,
        ) from error  # fmt: skip


def _limited(texts: Iterator[str | Chat], limit: int | None) -> Iterator[str | Chat]:
    size, number = 0, 0
    for text in texts:
        if (limit is not None and number >= limit) or size >= MAX_BYTES:
            return
        content = text if isinstance(text, str) else "".join(str(m["content"]) for m in text)
        size += len(content.encode(errors="replace"))
        number += bool(content.strip())  # blank ones are no documents
        yield text
