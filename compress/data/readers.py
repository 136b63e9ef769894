"""Read documents from files, and the documentation that ships inside Python."""

from __future__ import annotations

import ast
import csv
import glob
import importlib.util
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from compress.data.catalog import SUFFIXES, Local
from compress.data.storage import (
    PACKED,
    is_packed,
    is_saved,
    opened,
    plain,
    saved_rows,
    saved_splits,
)
from compress.errors import CompressError, did_you_mean
from compress.system.intake import parse_json, regular_file, user_path
from compress.system.memory import available

_ROWS = (".jsonl", ".json", ".parquet", ".csv", ".tsv")
_COPIES = 3  # of a file's text at the same time: as read, as documents, joined
_EXPECTED = "a file, a pattern of files or the id of a data set"

TEXT, CHAT = "text", "messages"  # the usual columns of texts and of conversations
Chat = list[dict[str, Any]]


def is_file_source(source: str) -> bool:
    """Whether a source names a file or a pattern of files, and not a hub data set."""
    known = source.lower().endswith((*SUFFIXES, ".raw", ".md", ".rst", PACKED))
    if known or any(c in source for c in "*?["):
        return True
    path = user_path(source, _EXPECTED)
    return path.is_file() or is_saved(path) or bool(saved_splits(path))


def expand(source: str, split: str = "train") -> list[Path]:
    """The files that a path or pattern names, sorted, or the folder of a saved data set.

    Args:
        split: of a folder with several.

    Raises:
        CompressError: there are none.
    """
    path = user_path(source, _EXPECTED)
    if path.is_file() or is_saved(path):
        return [path]
    if splits := saved_splits(path):
        if split not in splits:
            raise CompressError(
                f"a split of the data set in {path}", repr(split), did_you_mean(split, splits)
            )
        return [path / split]
    if not any(c in source for c in "*?["):
        regular_file(path, "a text file")  # says what stands in its way: nothing, a FIFO, a folder
    found = sorted(Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file())
    if not found:
        raise CompressError("a text file or a pattern that matches some", repr(source),
                            "Check the path")  # fmt: skip
    return found


def read_documents(
    path: Path, layout: Local, field: str, *, keep_blank: bool = False
) -> list[str | Chat]:
    """The documents of one file, in its order.

    Args:
        path: .jsonl, .json, .parquet, .csv or .tsv with rows, or anything else as UTF-8 text.
        layout: separator and columns, where the file does not tell.
        field: the column with the text.
        keep_blank: give "" for rows without a text, which are left out otherwise.

    Raises:
        CompressError: a file that does not parse or is larger than memory, or rows without a text
            in the field.
    """
    if is_saved(path):
        return list(texts_of(saved_rows(path), field, path.name, keep_blank))
    with _readable(path) as suffix:
        if suffix == ".parquet":
            return _parquet(path, field, keep_blank)
        if suffix in _ROWS:
            return list(texts_of(_rows_in(path, suffix, layout), field, path.name, keep_blank))
        # newline="" keeps the bytes as they are: a digest must not depend on the platform.
        with opened(path, newline="") as file:
            text = file.read()
    if layout.separator is None:
        return [text]
    return [part for part in (p.strip("\r\n") for p in text.split(layout.separator)) if part]


def read_rows(path: Path, layout: Local) -> list[dict[str, Any]]:
    """The rows of a table with all their columns, in the file's order.

    Args:
        path: .jsonl, .json, .parquet, .csv or .tsv.
        layout: columns, where the file does not tell.

    Raises:
        CompressError: another kind of file, one that does not parse or is larger than memory, or
            rows that are no objects.
    """
    if is_saved(path):
        return list(saved_rows(path))
    with _readable(path) as suffix:
        if suffix not in _ROWS:
            raise CompressError(
                f"a file with rows ({', '.join(_ROWS)})", str(path), "Give each example a row"
            )
        rows = list(_rows_in(path, suffix, layout))
    if not all(isinstance(row, dict) for row in rows):
        raise CompressError(f"rows with named columns in {path.name}", "other rows")
    return rows


@contextmanager
def _readable(path: Path) -> Iterator[str]:
    """Tell what makes a file unreadable; gives its suffix."""
    regular_file(path, "a text file")
    _check_size(path)
    suffix = Path(path.stem if is_packed(path) else path.name).suffix.lower()
    try:
        yield suffix
    except (ValueError, OSError, csv.Error) as error:  # UnicodeDecodeError is a ValueError
        raise CompressError(
            f"a readable {suffix or 'text'} file in UTF-8", f"{path}: {error}",
            "Check the file's format and encoding",
        ) from error  # fmt: skip


def _rows_in(path: Path, suffix: str, layout: Local) -> Iterator[Any]:
    """The rows of a file whose kind is one of :data:`_ROWS`."""
    if suffix == ".jsonl":
        with opened(path) as file:
            yield from _json_lines(file)
    elif suffix == ".json":
        with opened(path) as file:
            yield from _rows(parse_json(file.read()))
    elif suffix == ".parquet":
        import pyarrow.parquet

        try:
            yield from pyarrow.parquet.read_table(plain(path)).to_pylist()
        except pyarrow.ArrowException as error:  # some are of Python's types, some are not
            raise ValueError(str(error)) from error
    else:
        yield from _table(path, suffix, layout.columns)


def read_python_module(name: str) -> list[str]:
    """The texts of a standard library module's module-level ``dict[str, str]``s, in source order.

    ``pydoc_data.topics`` holds the language reference that ``help()`` shows. The module's source is
    parsed and never run.

    Raises:
        CompressError: not a module of the standard library, or none with such texts.
    """
    origin = _stdlib_source(name)
    texts: list[str] = []
    for statement in ast.parse(origin.read_text(encoding="utf-8")).body:
        if not isinstance(statement, ast.Assign | ast.AnnAssign) or statement.value is None:
            continue
        try:
            value = ast.literal_eval(statement.value)
        except (ValueError, TypeError, SyntaxError):
            continue
        if isinstance(value, dict) and all(isinstance(v, str) for v in value.values()):
            texts += value.values()
    if not texts:
        raise CompressError(
            f"texts in python:{name} (a dict of strings)", "none", "Use python:pydoc_data.topics"
        )
    return texts


def _stdlib_source(name: str) -> Path:
    if name.split(".")[0] not in sys.stdlib_module_names:
        raise CompressError(
            "a module of Python's standard library", f"python:{name}",
            "Use python:pydoc_data.topics, or write the texts to a file",
        )  # fmt: skip
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        spec = None
    origin = Path(spec.origin).resolve() if spec and spec.has_location and spec.origin else None
    library = Path(sysconfig.get_path("stdlib")).resolve()
    # A file of the same name beside the script would be found first; it is not the library.
    if origin is None or origin.suffix != ".py" or not origin.is_relative_to(library):
        raise CompressError(f"the source of python:{name} in {library}", str(origin or "none"))
    return origin


def _json_lines(file: Iterable[str]) -> Iterator[Any]:
    for number, line in enumerate(file, 1):
        if line.strip():
            try:
                yield parse_json(line)
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from error


def _rows(data: Any) -> list[Any]:
    """The rows of a JSON file: a list, or an object with one list in it."""
    if isinstance(data, dict):
        lists = [value for value in data.values() if isinstance(value, list)]
        data = lists[0] if len(lists) == 1 else None
    if not isinstance(data, list):
        raise ValueError("neither a list of rows nor an object that holds one")
    return data


def _table(path: Path, suffix: str, columns: tuple[str, ...]) -> Iterator[dict[str, str]]:
    tab = suffix == ".tsv"
    with opened(path, newline="") as file:
        # Tab-separated corpora do not quote: a lone quotation mark would swallow lines.
        quoting = csv.QUOTE_NONE if tab else csv.QUOTE_MINIMAL
        names = columns or None
        yield from csv.DictReader(file, names, delimiter="\t" if tab else ",", quoting=quoting)


def _parquet(path: Path, field: str, keep_blank: bool) -> list[str | Chat]:
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(plain(path))
        names = file.schema_arrow.names
        field = CHAT if field == TEXT and field not in names and CHAT in names else field
        if field not in names:
            raise _no_field(field, names, path.name)
        column = file.read(columns=[field]).column(field).to_pylist()
    except pyarrow.ArrowException as error:  # some are of Python's types, some are not
        raise ValueError(str(error)) from error
    return list(texts_of(({field: value} for value in column), field, path.name, keep_blank))


def texts_of(
    rows: Iterable[Any], field: str, where: str, keep_blank: bool = False
) -> Iterator[str | Chat]:
    """The texts of rows: strings, or objects with a string or a conversation in ``field``.

    A conversation is a list of ``{"role": ..., "content": ...}``. It is looked for under
    ``messages`` where the field is the default one and rows do not have it. Missing values are left
    out.

    Args:
        where: file or data set, for messages.
        keep_blank: give "" where a value is missing or empty.

    Raises:
        CompressError: a row without the field, or with something else in it.
    """
    for number, row in enumerate(rows, 1):
        if isinstance(row, str):
            yield _encodable(row)
            continue
        if not isinstance(row, dict):
            raise _no_field(field, [], where)
        key = CHAT if field == TEXT and field not in row and CHAT in row else field
        if key not in row:
            raise _no_field(field, list(row), where)
        value = row[key]
        if value is None or value == "":
            if keep_blank:
                yield ""
        elif isinstance(value, str):
            yield _encodable(value)
        elif is_chat(value):
            yield value
        else:
            raise CompressError(
                f"text in the field {key!r} of each row of {where}",
                f"{type(value).__name__} in row {number}: {repr(value)[:80]}",
                "Set field to a column of strings, or of conversations: lists of objects with "
                "role and content",
            )


def is_chat(value: Any) -> bool:
    """Whether a value is a conversation: messages with a role and a content each."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in value)
    )


def _encodable(text: str) -> str:
    """``text`` with replacement characters for halves of characters, which JSON can spell."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _check_size(path: Path) -> None:
    size, free = path.stat().st_size, available()
    if _COPIES * size > free:
        raise CompressError(
            f"a text file that fits into memory ({free / 1e9:.1f} GB are free)",
            f"{path} of {size / 1e9:.1f} GB", "Take a part of it: calibration needs a few MB",
        )  # fmt: skip


def _no_field(field: str, known: list[str], where: str) -> CompressError:
    known = [name for name in known if isinstance(name, str)]  # None: a line with too many columns
    return CompressError(
        f"the field {field!r} in each row of {where}", f"fields {', '.join(known) or 'none'}",
        f"Set field. {did_you_mean(field, known)}" if known else "Each row must be an object",
    )  # fmt: skip
