"""Texts for calibration, training and evaluation, from files, hubs and Python itself."""

from __future__ import annotations

import hashlib
import io
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from compress.data.catalog import LINES, Local, canonical, find, splits, whole_file
from compress.data.chat import render_chats
from compress.data.readers import (
    TEXT,
    Chat,
    expand,
    is_file_source,
    read_documents,
    read_python_module,
)
from compress.errors import CompressError
from compress.system.intake import at_home, user_path

_PART = re.compile(r"all|(head|tail):(0?\.\d+|1(?:\.0*)?)")


def _known_part(value: str) -> str:
    if not _PART.fullmatch(value):
        raise ValueError(f"expected all, head:F or tail:F with F in (0, 1], got {value!r}")
    return value


Part = Annotated[str, AfterValidator(_known_part)]  # of a sequence, see take_part


class TextSpec(BaseModel):
    """Which text, which part of it, and how its documents are joined."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str = Field(
        description="a hub data set (owner/name), a file or pattern (.txt .jsonl .json .parquet "
        ".csv .tsv, also .gz), a folder that datasets' save_to_disk wrote, or python:<module> for "
        "texts in Python's standard library (python:pydoc_data.topics)"
    )
    subset: str | None = Field(None, description="configuration of a hub data set")
    split: str = Field("train", description="split of a hub data set")
    field: str | None = Field(
        None,
        description="column with texts, or conversations; by default 'text', else 'messages'",
    )
    part: Part = Field(
        "all",
        description="all, head:F or tail:F, a fraction F of the documents (of the lines, where "
        "there is one document); heads and tails that sum to at most 1 share nothing",
    )
    lines: bool = Field(
        False,
        description="plain text files: a document a line, for sequences of proteins or molecules; "
        "else a file is one document",
    )
    join: str = Field("\n\n", description="put between documents (GPTQ's convention)")
    limit: int | None = Field(None, gt=0, description="read at most so many documents")


@dataclass(frozen=True)
class Text:
    """Documents and where they came from.

    Attributes:
        documents: in the order of the source, none of them empty.
        join: what stands between them in :attr:`text`.
        description: one line for a report: source, part, what is special about it.
    """

    documents: tuple[str, ...]
    join: str
    description: str

    @cached_property
    def text(self) -> str:
        """The documents joined to one string."""
        return self.join.join(self.documents)

    @cached_property
    def bytes(self) -> int:
        """Length of :attr:`text` in UTF-8."""
        return len(self.text.encode())

    @cached_property
    def digest(self) -> str:
        """sha256 of :attr:`text` in UTF-8, as hex."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def load_text(
    spec: TextSpec | str,
    data_root: str | Path | None = None,
    *,
    endpoint: str | None = None,
    tokenizer: Any = None,
) -> Text:
    """Read the text that ``spec`` describes.

    Args:
        spec: a spec, or a source alone.
        data_root: a folder with local copies of hub data sets (see :mod:`compress.data.catalog`);
            asked first, before any network is used.
        endpoint: the hub's address; HF_ENDPOINT or the public hub if None.
        tokenizer: the model's, whose chat template makes text of rows with ``messages``.

    Raises:
        CompressError: a source that does not exist, does not parse, has no such field or is empty,
            a field that holds no text, conversations without a chat template, or a hub that does
            not answer.
    """
    spec = TextSpec(source=spec) if isinstance(spec, str) else spec
    if data_root is not None and not user_path(data_root, "a data root").is_dir():
        raise CompressError("an existing folder as data root", repr(str(data_root)))
    documents, about = _read(spec, data_root, endpoint)
    documents = [d for d in documents if isinstance(d, list) or d.strip()][: spec.limit]
    documents, about = render_chats(documents, about, tokenizer)
    documents = take_part(documents, spec.part)
    if not documents:
        raise CompressError(
            f"a text with something in it from {spec.source}",
            "an empty one" if spec.part == "all" else f"nothing in part {spec.part}",
            "Choose another source, split or part",
        )
    part = "" if spec.part == "all" else f", part {spec.part}"
    return Text(tuple(documents), spec.join, about + part)


def take_part(documents: Sequence[str], part: str) -> list[str]:
    """The head or tail of ``documents``, or of the lines where there is only one document."""
    if part == "all":
        return list(documents)
    if len(documents) == 1:
        lines = take_part(_padded(documents[0].splitlines(keepends=True)), part)
        joined = "".join(lines)
        return [joined] if joined.strip() else []
    which, _, fraction = part.partition(":")
    # Rounded down, so that head:F and tail:1-F never overlap; 1e-9 forgives 0.3 * 10 = 2.999...
    count = math.floor(float(fraction) * len(documents) + 1e-9)
    return list(documents[:count] if which == "head" else documents[len(documents) - count :])


def _padded(lines: list[str]) -> list[str]:
    """At least two units, so that a part of a single line ends instead of asking again."""
    return lines if len(lines) > 1 else [*lines, ""]


def _read(
    spec: TextSpec, data_root: str | Path | None, endpoint: str | None
) -> tuple[list[str | Chat], str]:
    """The documents and a line about them."""
    field = spec.field or TEXT
    if spec.source.startswith("python:"):
        module = spec.source.removeprefix("python:")
        version = ".".join(map(str, sys.version_info[:3]))
        return read_python_module(module), f"documentation in Python {version} ({module})"
    if is_file_source(spec.source):
        paths = expand(spec.source, spec.split)
        separator = "\n" if spec.lines else None
        documents = [
            d
            for path in paths
            for d in read_documents(path, Local(str(path), separator=separator), field)
        ]
        return documents, spec.source + (f" ({len(paths)} files)" if len(paths) > 1 else "")
    return _read_dataset(spec, data_root, endpoint)


def _read_dataset(
    spec: TextSpec, data_root: str | Path | None, endpoint: str | None
) -> tuple[list[str | Chat], str]:
    dataset, subset = canonical(spec.source, spec.subset)
    name = f"{dataset} {subset} {spec.split}".replace("  ", " ")
    have: list[str] = []
    if data_root is not None:
        root = at_home(data_root)
        found = find(root, spec.source, spec.subset, spec.split)
        if found is not None:
            path, local = found
            lines = dataset in LINES
            field = spec.field or local.field or TEXT
            documents = read_documents(path, local, field, keep_blank=lines)
            if lines:
                if len(documents) == 1:  # the file itself, not rows
                    documents = list(io.StringIO(documents[0], newline="\n"))
                documents = [whole_file(dataset, spec.split, documents)]
            note = f" ({local.note})" if local.note else ""
            return documents, f"{name} from {path.name}{note}"
        have = splits(root, dataset)
    from compress.data.hub import read_hub_dataset

    return read_hub_dataset(
        dataset, subset or None, spec.split, field=spec.field or TEXT, limit=spec.limit,
        data_root=data_root, have=have, endpoint=endpoint,
    ), name  # fmt: skip
