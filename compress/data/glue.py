"""The tasks of GLUE (Wang et al. 2018, https://arxiv.org/abs/1804.07461): columns and labels.

As in the hub's data set nyu-mll/glue. Local copies often have other columns for the same thing
(RTE's in SuperGLUE, the STS benchmark's own file), so a task knows several names.
"""

from __future__ import annotations

from dataclasses import dataclass

DATASET = "nyu-mll/glue"


@dataclass(frozen=True)
class GlueTask:
    """One task.

    Attributes:
        columns: of the text and, for pairs, of the second text; the first that a row has is taken.
        names: of the labels by number; empty where a number is predicted.
        label: columns of the label.
        validation: the split that is measured on.
    """

    columns: tuple[tuple[str, ...], ...]
    names: tuple[str, ...] = ()
    label: tuple[str, ...] = ("label",)
    validation: str = "validation"


_PAIR = (("sentence1", "sentence2"),)
_PREMISE = (("premise", "hypothesis"),)
_ENTAILMENT = ("entailment", "not_entailment")

GLUE: dict[str, GlueTask] = {
    "cola": GlueTask((("sentence",),), ("unacceptable", "acceptable")),
    "sst2": GlueTask((("sentence",),), ("negative", "positive")),
    "mrpc": GlueTask(_PAIR, ("not_equivalent", "equivalent")),
    "qqp": GlueTask((("question1", "question2"),), ("not_duplicate", "duplicate")),
    "stsb": GlueTask(_PAIR, (), ("label", "score")),
    "mnli": GlueTask(
        _PREMISE, ("entailment", "neutral", "contradiction"), validation="validation_matched"
    ),
    "qnli": GlueTask((("question", "sentence"),), _ENTAILMENT),
    "rte": GlueTask(_PAIR + _PREMISE, _ENTAILMENT),
    "wnli": GlueTask(_PAIR, ("not_entailment", "entailment")),
}
