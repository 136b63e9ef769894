"""Models with a head of labels: which question the head answers, and what a wrong answer costs.

A head is told by the ending of its class's name, as in :data:`compress.models.loading.TASKS`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional

from compress.errors import CompressError
from compress.linear.matrix import features, is_linear
from compress.models.inputs import IGNORED

Task = Literal[
    "sequence", "token", "image"
]  # what gets an answer: a text or pair, a token, an image

ENDINGS: dict[str, Task] = {
    "ForSequenceClassification": "sequence", "ForTokenClassification": "token",
    "ForImageClassification": "image", "ForImageClassificationWithTeacher": "image",
}  # fmt: skip
_MULTI = "multi_label_classification"


@dataclass(frozen=True)
class Head:
    """What a model says of its inputs.

    Attributes:
        task: what gets an answer.
        names: of the labels, by their numbers; empty where a number is predicted (regression).
    """

    task: Task
    names: tuple[str, ...] = ()

    @property
    def regression(self) -> bool:
        return not self.names

    @property
    def outputs(self) -> int:
        """Logits of one answer."""
        return max(1, len(self.names))

    def fields(self) -> dict[str, Any]:
        """What config.json says of the head."""
        if self.regression:
            return {"num_labels": 1, "problem_type": "regression"}
        named = {
            "id2label": dict(enumerate(self.names)),
            "label2id": {name: number for number, name in enumerate(self.names)},
        }
        if self.task == "token":  # classes of such heads look at nothing else
            return named
        return {**named, "problem_type": "single_label_classification"}

    def answers(self, values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Answers that count: of a head that answers each token those of tokens, not of padding.

        Args:
            values: [rows, ...], or [rows, length, ...] of a head that answers tokens.
            mask: [rows, length], 0 where there is padding; None where there is none.
        """
        return values if self.task != "token" or mask is None else values[mask != 0]

    def losses(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Loss of each answer that has a label, float32 [answers]: nats, or the squared error.

        Args:
            logits: [..., outputs].
            labels: numbers of labels, or the numbers to be predicted, [...]; :data:`IGNORED` where
                a label is missing.
        """
        logits = logits.float().reshape(-1, logits.shape[-1])
        if self.regression:
            return (logits[:, 0] - labels.flatten().to(logits)).square()
        labels = labels.flatten().long()
        known = labels != IGNORED
        return functional.cross_entropy(logits[known], labels[known], reduction="none")

    def divergences(self, logits: torch.Tensor, wanted: torch.Tensor, heat: float) -> torch.Tensor:
        """How far each answer is from a teacher's, float32 [answers].

        KL(teacher || student) of distributions softened by ``heat``, times its square (Hinton et
        al. 2015, arXiv 1503.02531); of a regression the squared difference.

        Args:
            logits, wanted: of the student and the teacher, [..., outputs].
        """
        logits, wanted = (x.float().reshape(-1, x.shape[-1]) for x in (logits, wanted))
        if self.regression:
            return (logits - wanted).square()[:, 0]
        apart = functional.kl_div(
            functional.log_softmax(logits / heat, -1),
            functional.log_softmax(wanted / heat, -1),
            reduction="none",
            log_target=True,
        )
        return apart.sum(-1) * heat**2


def head_of(model: Any) -> Head | None:
    """The head of labels of a model, or the one that a config's ``architectures`` name.

    None for a model without one.

    Raises:
        CompressError: a head that gives several labels at once.
    """
    config = model if not isinstance(model, nn.Module) else getattr(model, "config", None)
    if isinstance(model, nn.Module):
        names = [cls.__name__ for cls in type(model).__mro__]
    else:
        names = [n for n in getattr(config, "architectures", None) or () if isinstance(n, str)]
    found = (task for end, task in ENDINGS.items() for name in names if name.endswith(end))
    task = next(found, None)
    if task is None or config is None:
        return None
    if task != "token" and config.problem_type == _MULTI:
        raise CompressError(
            "a head that gives each input one label, or a number", f"problem_type {_MULTI}",
            "Only these are evaluated and trained; compress such a model without labels",
        )  # fmt: skip
    if task == "token":
        return Head(task, tuple(str(config.id2label[i]) for i in range(config.num_labels)))
    # Without a problem_type transformers takes a single output for a regression.
    single = config.problem_type is None and config.num_labels == 1
    if single or config.problem_type == "regression":
        return Head(task)
    return Head(task, tuple(str(config.id2label[i]) for i in range(config.num_labels)))


def answering_layer(model: nn.Module) -> nn.Module | None:
    """The linear whose outputs are the logits of a head of labels; None where there is no head.

    It is the last one with so many outputs: heads are made behind what they read, and a layer in
    between may happen to be as wide.
    """
    head = head_of(model)
    if head is None:
        return None
    fitting = [m for m in model.modules() if is_linear(m) and features(m)[0] == head.outputs]
    return fitting[-1] if fitting else None
