"""Text from data sets on a Hugging Face hub, streamed: only what is used is fetched."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from compress.data.catalog import LINES
from compress.errors import CompressError, did_you_mean

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
) -> list[str]:
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
    _ask_hub(dataset, data_root, have, endpoint)
    import datasets

    try:
        rows = datasets.load_dataset(dataset, subset, split=split, streaming=True)
        lines = dataset in LINES
        texts = list(_limited(_texts(rows, field, dataset, lines), None if lines else limit))
    except CompressError:
        raise
    except ValueError as error:  # an unknown subset or split, with the known ones in the text
        raise CompressError(
            f"a subset and split of {dataset}", f"{subset!r}, {split!r}: {error}",
            "Set subset and split",
        ) from error  # fmt: skip
    except Exception as error:  # the library, its file systems and its HTTP clients all differ
        raise CompressError(
            f"the rows of {dataset}", f"{type(error).__name__}: {error}",
            _advice(data_root, have, dataset),
        ) from error  # fmt: skip
    return ["".join(text or LINES[dataset] for text in texts)] if lines else texts


def _ask_hub(
    dataset: str, data_root: str | Path | None, have: Sequence[str], endpoint: str | None
) -> None:
    """One short request, since the loader itself retries for minutes."""
    import huggingface_hub
    from huggingface_hub import errors

    try:
        huggingface_hub.HfApi(endpoint=endpoint).dataset_info(dataset, timeout=TIMEOUT)
    except errors.RepositoryNotFoundError as error:
        raise CompressError(
            "a file, or the id of a data set on the hub", f"{dataset!r}, which is neither",
            "Check the spelling; a private or gated one needs a login (hf auth login)",
        ) from error  # fmt: skip
    except errors.HFValidationError as error:
        raise CompressError(
            "a file that exists, or a data set id of the form owner/name", repr(dataset)
        ) from error
    except Exception as error:
        line = (str(error).strip().splitlines() or [""])[0]
        raise CompressError(
            f"a usable answer from the hub about the data set {dataset}",
            f"{type(error).__name__}: {line}", _advice(data_root, have, dataset),
        ) from error  # fmt: skip


def _advice(data_root: str | Path | None, have: Sequence[str], dataset: str) -> str:
    if data_root is None:
        return (
            "Give a folder with local copies (--data-root DIR), a text file as the source, or "
            "python:pydoc_data.topics, which every Python has"
        )
    held = f"has {', '.join(have)} of it" if have else "has nothing of it"
    return f"The data root {data_root} {held}; put the split at {dataset}/<split>.jsonl below it"


def _texts(rows, field: str, dataset: str, keep_blank: bool) -> Iterator[str]:
    for row in rows:
        if field not in row:
            raise CompressError(
                f"the field {field!r} in {dataset}", f"fields {', '.join(row)}",
                f"Set field. {did_you_mean(field, list(row))}",
            )  # fmt: skip
        if keep_blank or str(row[field] or "").strip():
            yield str(row[field])


def _limited(texts: Iterator[str], limit: int | None) -> Iterator[str]:
    size = 0
    for number, text in enumerate(texts):
        if (limit is not None and number >= limit) or size >= MAX_BYTES:
            return
        size += len(text.encode())
        yield text
