"""Hub data sets as files under a data root, for machines without a hub.

``--data-root DIR`` makes :func:`find` look in two places, in this order:

1. ``DIR/<data set id>/[<subset>/]<split>.<jsonl|json|txt|parquet|csv|tsv>``, for any id;
2. the table below, for the layout that docs/data.md describes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

SUFFIXES = (".jsonl", ".json", ".txt", ".parquet", ".csv", ".tsv")


@dataclass(frozen=True)
class Local:
    """One split of one data set as a file.

    Attributes:
        path: relative to the data root.
        field: the column with the text; None for plain text.
        separator: what stands between the documents of a plain text; None for one document.
        columns: names of the columns of a table without a header line.
        note: how the file differs from the hub's split, if it does.
    """

    path: str
    field: str | None = None
    separator: str | None = None
    columns: tuple[str, ...] = ()
    note: str = ""


_STSB = ("genre", "filename", "year", "id", "score", "sentence1", "sentence2")
_COLA = ("source", "label", "mark", "sentence")
_HEAD = "the first 1,000,000 bytes of the split, empty lines removed"

# (data set, subset, split) -> file. A subset of "" is the only one or the default.
CATALOG: dict[tuple[str, str, str], Local] = {
    ("Salesforce/wikitext", "wikitext-2-raw-v1", "train"): Local(
        "wikitext-2-raw/wiki.train.head_1MB_nonempty.txt", note=_HEAD
    ),
    ("Salesforce/wikitext", "wikitext-2-raw-v1", "validation"): Local(
        "wikitext-2-raw/wiki.valid.raw"
    ),
    ("Salesforce/wikitext", "wikitext-2-raw-v1", "test"): Local("wikitext-2-raw/wiki.test.raw"),
    ("Salesforce/wikitext", "wikitext-2-v1", "validation"): Local("wikitext-2/valid.txt"),
    ("Salesforce/wikitext", "wikitext-2-v1", "test"): Local("wikitext-2/test.txt"),
    ("allenai/c4", "en", "validation"): Local(
        "c4/c4_validation_2k.jsonl", "text", note="2,000 documents of the split"
    ),
    ("roneneldan/TinyStories", "", "train"): Local(
        "tinystories/tinystories_sample_2MiB.txt", separator="<|endoftext|>",
        note="2 MiB of the split",
    ),
    ("karpathy/tiny_shakespeare", "", "train"): Local("tiny_shakespeare/input.txt"),
    ("sotu", "", "train"): Local("sotu/sotu_all.txt", note="77 State of the Union addresses"),
    ("EleutherAI/lambada_openai", "", "test"): Local("lambada/lambada_test.jsonl", "text"),
    ("cimec/lambada", "", "validation"): Local(
        "lambada/lambada_development_plain_text.txt", separator="\n"
    ),
    ("cimec/lambada", "", "test"): Local("lambada/lambada_test_plain_text.txt", separator="\n"),
    ("uspto50k", "", "train"): Local("uspto50k/src-train.txt", separator="\n"),
    ("uspto50k", "", "validation"): Local("uspto50k/src-val.txt", separator="\n"),
    ("uspto50k", "", "test"): Local("uspto50k/src-test.txt", separator="\n"),
    ("therasabdab", "heavy", "train"): Local(
        "therasabdab/TheraSAbDab_clean.tsv", "Heavy Sequence"
    ),
    ("therasabdab", "light", "train"): Local(
        "therasabdab/TheraSAbDab_clean.tsv", "Light Sequence"
    ),
    ("allenai/ai2_arc", "ARC-Easy", "validation"): Local(
        "arc/ARC-Easy.validation.jsonl", "question"
    ),
    ("allenai/ai2_arc", "ARC-Challenge", "validation"): Local(
        "arc/ARC-Challenge.validation.jsonl", "question"
    ),
    ("google/boolq", "", "validation"): Local("boolq/validation.jsonl", "passage"),
    ("ybisk/piqa", "", "validation"): Local("piqa/validation.jsonl", "goal"),
    ("allenai/winogrande", "winogrande_xl", "validation"): Local(
        "winogrande/winogrande_xl.validation.jsonl", "sentence"
    ),
    ("Rowan/hellaswag", "", "validation"): Local(
        "hellaswag/olmes_1000_of_validation.jsonl", "query",
        note="1,000 rows of the split, fields query, choices, gold",
    ),
    ("nyu-mll/glue", "sst2", "train"): Local("sst2/train.tsv", "sentence"),
    ("nyu-mll/glue", "sst2", "validation"): Local("sst2/dev.tsv", "sentence"),
    ("nyu-mll/glue", "mrpc", "train"): Local("mrpc/glue_train_rebuilt.jsonl", "sentence1"),
    ("nyu-mll/glue", "mrpc", "validation"): Local("mrpc/glue_validation.jsonl", "sentence1"),
    ("nyu-mll/glue", "cola", "train"): Local(
        "cola/in_domain_train.tsv", "sentence", columns=_COLA
    ),
    ("nyu-mll/glue", "cola", "validation"): Local(
        "cola/mixed_dev.tsv", "sentence", columns=_COLA
    ),
    ("nyu-mll/glue", "rte", "train"): Local(
        "rte/train.jsonl", "premise", note="fields of SuperGLUE: premise, hypothesis"
    ),
    ("nyu-mll/glue", "rte", "validation"): Local("rte/glue_validation.jsonl", "sentence1"),
    ("nyu-mll/glue", "stsb", "train"): Local("stsb/sts-train.tsv", "sentence1", columns=_STSB),
    ("nyu-mll/glue", "stsb", "validation"): Local("stsb/sts-dev.tsv", "sentence1", columns=_STSB),
}  # fmt: skip

# Data sets whose rows are the lines of one text, with what stands for a blank line. They are put
# together to the file again, so that a recipe gives the same tokens from the hub and from any local
# copy. WikiText's training text goes without blank lines, as the usual local copy of it does (and
# as most calibration does, which leaves empty rows out); texts that are measured keep them.
LINES = {"Salesforce/wikitext": " \n"}
_WITHOUT_BLANK_LINES = ("train",)


def whole_file(dataset: str, split: str, lines: Iterable[str]) -> str:
    """The text of a data set in :data:`LINES` from its lines, blank ones as "" or as they are."""
    blank = LINES[dataset]
    if split.partition("[")[0] in _WITHOUT_BLANK_LINES:
        return "".join(line for line in lines if line.strip())
    return "".join(line if line.strip() else blank for line in lines)


# Older ids that papers and recipes still use.
ALIASES = {
    "wikitext": "Salesforce/wikitext", "c4": "allenai/c4", "ai2_arc": "allenai/ai2_arc",
    "boolq": "google/boolq", "piqa": "ybisk/piqa", "winogrande": "allenai/winogrande",
    "hellaswag": "Rowan/hellaswag", "glue": "nyu-mll/glue", "lambada": "cimec/lambada",
    "tiny_shakespeare": "karpathy/tiny_shakespeare", "TinyStories": "roneneldan/TinyStories",
}  # fmt: skip

# The subset that papers mean when they name none.
DEFAULT_SUBSETS = {"Salesforce/wikitext": "wikitext-2-raw-v1", "allenai/c4": "en"}


def canonical(dataset: str, subset: str | None) -> tuple[str, str]:
    """The full id and the subset ("" for the only one)."""
    dataset = ALIASES.get(dataset, dataset)
    return dataset, subset or DEFAULT_SUBSETS.get(dataset, "")


def find(root: Path, dataset: str, subset: str | None, split: str) -> tuple[Path, Local] | None:
    """The file for a split under ``root`` and how to read it, or None."""
    dataset, subset = canonical(dataset, subset)
    folder = root / dataset / subset if subset else root / dataset
    for suffix in (*SUFFIXES, *(f"{suffix}.gz" for suffix in SUFFIXES)):
        path = folder / f"{split}{suffix}"
        if _inside(path, root):
            return path, Local(str(path.relative_to(root)))
    local = CATALOG.get((dataset, subset, split))
    if local is not None and _inside(root / local.path, root):
        return root / local.path, local
    return None


def _inside(path: Path, root: Path) -> bool:
    """Whether there is such a file, and not by a link out of the root."""
    return path.is_file() and path.resolve().is_relative_to(root.resolve())


def splits(root: Path, dataset: str) -> list[str]:
    """What ``root`` has of a data set by the table, as "subset/split" or "split", for messages."""
    dataset, _ = canonical(dataset, None)
    return [
        f"{subset}/{split}" if subset else split
        for (name, subset, split), local in CATALOG.items()
        if name == dataset and (root / local.path).is_file()
    ]
