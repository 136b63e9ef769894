"""The loss of a language model, alone or beside a teacher, without logits for a whole batch.

[tokens, vocabulary] logits are the largest tensor of training a small model: 400 MB for 2,048
tokens and 49,152 words, three times over with gradients and a teacher. Here they exist for a few
hundred tokens at a time and are computed once more in the backward pass.
"""

from __future__ import annotations

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from compress.errors import CompressError
from compress.models.anatomy import Anatomy
from compress.models.halves import tail_logits, trunk_hidden
from compress.train.moment import Moment
from compress.train.teacher import Apart, Lesson, ModelTeacher, Teacher, model_inputs

IGNORED = -100
_LOGIT_BYTES = 64 * 2**20  # of one chunk in float32; the backward pass needs three times as much


class DistillationOptions(BaseModel):
    """How much a model learns from the uncompressed one (Hinton et al. 2015, arXiv 1503.02531)."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    labels: float = Field(1.0, ge=0, description="weight of the cross entropy with the text")
    logits: float = Field(1.0, ge=0, description="weight of KL(teacher || student)")
    temperature: float = Field(1.0, gt=0, description="of both models' distributions in the KL")
    hidden: float = Field(0.0, ge=0, description="weight of the hidden states' relative error")
    layers: tuple[int, ...] = Field(
        (), description="blocks whose outputs are compared, from 0; the last where none is named"
    )


class LanguageLoss:
    """Mean loss a predicted token, in nats, of a causal or masked language model.

    A causal model predicts each next token; a masked one the batch's ``labels`` (-100 elsewhere).
    Of a batch in which nothing is to be predicted it is 0.

    Args:
        model, anatomy: any AutoModelForCausalLM or AutoModelForMaskedLM.
        distillation: None to learn from the text alone.
        teacher: who observes batches; by default the model itself, as it is at that time.
    """

    def __init__(
        self,
        model: nn.Module,
        anatomy: Anatomy,
        distillation: DistillationOptions | None = None,
        teacher: Teacher | None = None,
    ) -> None:
        self.model, self.anatomy, self.distillation = model, anatomy, distillation
        self.layers = compared_layers(distillation, len(anatomy.blocks))
        self.teacher = teacher or ModelTeacher(model, anatomy, {i: i for i in self.layers})
        self.vocabulary = model.get_output_embeddings().weight.shape[0]

    def prepare(self, batch: dict[str, torch.Tensor], _moment: Moment) -> dict[str, torch.Tensor]:
        """The batch as it is: calibration has masked it where the model needs masks."""
        return batch

    def observe(self, batch: dict[str, torch.Tensor]) -> Lesson:
        """What the teacher, as it is now, has to say about a batch; call it without gradients."""
        return self.teacher.observe(batch)

    def __call__(
        self, batch: dict[str, torch.Tensor], lesson: Lesson | None = None
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """The loss (a scalar) and its parts, named ``cross_entropy``, ``kl`` and ``hidden``.

        Raises:
            CompressError: hidden states are compared that are not of one width.
        """
        inputs, targets = model_inputs(batch), self.targets(batch)
        last, layers = trunk_hidden(self.model, self.anatomy, inputs, self.layers)
        count = (targets != IGNORED).sum().clamp_min(1)
        # Zeros with a graph: a batch in which nothing is to be predicted has gradients of zero.
        sums = last[:, :0].sum().float().expand(2)
        span = max(1, _LOGIT_BYTES // (4 * self.vocabulary * len(targets)))
        for start in range(0, targets.shape[1], span):
            piece = slice(start, start + span)
            if bool((targets[:, piece] != IGNORED).any()):
                cut = _cut(inputs, targets, piece)
                apart = None if lesson is None else lesson.apart(piece, cut)
                sums = sums + checkpoint(
                    self._chunk, last[:, piece], apart, cut, targets[:, piece],
                    use_reentrant=False,
                )  # fmt: skip
        cross_entropy, divergence = sums / count
        figures = {"cross_entropy": float(cross_entropy.detach())}
        if lesson is None:
            return cross_entropy, figures
        weights = self.distillation
        loss = weights.labels * cross_entropy + weights.logits * divergence
        figures["kl"] = float(divergence.detach())
        if self.layers:
            mask = batch.get("attention_mask")
            pairs = [(layers[i], lesson.layers[i]) for i in self.layers]
            error = sum(hidden_error(mine, theirs, mask) for mine, theirs in pairs) / len(pairs)
            loss = loss + weights.hidden * error
            figures["hidden"] = float(error.detach())
        return loss, figures

    def targets(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The token to predict at each position [batch, length], -100 where there is none.

        A model that sees both ways and learns from a teacher alone needs no labels: without them
        the two are compared wherever there is a token.

        Raises:
            CompressError: a masked model's batch has no labels.
        """
        labels = batch.get("labels")
        if type(self.model).__name__.endswith("ForMaskedLM") or _bidirectional(self.model):
            if labels is None and self.distillation is not None and not self.distillation.labels:
                ids = batch["input_ids"]
                seen = batch.get("attention_mask")
                return ids if seen is None else ids.masked_fill(seen == 0, IGNORED)
            if labels is None:
                raise CompressError(
                    f"labels in each batch, for {type(self.model).__name__}: the masked tokens, "
                    "-100 elsewhere",
                    f"batches of {', '.join(sorted(batch))}",
                    "Give batches {input_ids, labels}, or calibrate a recipe on text",
                )
            return labels
        targets = batch["input_ids"] if labels is None else labels
        if "attention_mask" in batch:
            targets = targets.masked_fill(batch["attention_mask"] == 0, IGNORED)
        return functional.pad(targets[:, 1:], (0, 1), value=IGNORED)

    def _chunk(
        self,
        hidden: torch.Tensor,
        apart: Apart | None,
        inputs: dict[str, torch.Tensor],
        targets: torch.Tensor,
    ) -> torch.Tensor:
        """Sums over a few positions: cross entropy, KL(teacher || student)."""
        logits = tail_logits(self.model, self.anatomy, inputs, hidden).float()
        chosen = targets != IGNORED
        total = functional.cross_entropy(logits[chosen], targets[chosen], reduction="sum")
        if apart is None or not self.distillation.logits:
            return torch.stack([total, torch.zeros_like(total)])
        return torch.stack([total, apart(logits[chosen], chosen, self.distillation.temperature)])


def compared_layers(distillation: DistillationOptions | None, blocks: int) -> tuple[int, ...]:
    """Blocks whose outputs are compared with a teacher's, of a model of so many."""
    if distillation is None or not distillation.hidden:
        return ()
    return distillation.layers or (blocks - 1,)


def check_compared(distillation: DistillationOptions | None, blocks: int) -> None:
    """Refuse blocks to compare that a model does not have.

    Raises:
        CompressError: a number below 0, or of no block.
    """
    layers = () if distillation is None else distillation.layers
    missing = [i for i in layers if not 0 <= i < blocks]
    if missing:
        raise CompressError(
            f"distillation.layers from 0 to {blocks - 1}", str(missing[0]),
            "Blocks are counted in the compressed model",
        )  # fmt: skip


def other_width(mine: int, theirs: int, fix: str) -> CompressError:
    """The error of a student whose residual stream is not as wide as its teacher's."""
    return CompressError(
        f"hidden states of the teacher's width, {theirs}, to compare them",
        f"a student of width {mine}", fix,
    )  # fmt: skip


def relative_error(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean over tokens of |output - target|^2 / |target|^2, states [..., hidden size]."""
    apart = (output - target).square().mean(-1)
    return (apart / target.square().mean(-1).clamp_min(1e-12)).mean()


def hidden_error(
    mine: torch.Tensor, theirs: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """:func:`relative_error` of a student's hidden states, of tokens that are no padding.

    Args:
        mine, theirs: of the student and the teacher, [batch, length, hidden size].
        mask: [batch, length], 0 where there is padding; None where there is none.

    Raises:
        CompressError: states of another width.
    """
    if mine.shape[-1] != theirs.shape[-1]:
        raise other_width(
            mine.shape[-1], theirs.shape[-1],
            "Set distillation.hidden: 0, which leaves the predictions",
        )  # fmt: skip
    if mask is None:
        return relative_error(mine, theirs)
    return relative_error(mine[mask != 0], theirs[mask != 0])


def _cut(
    inputs: dict[str, torch.Tensor], targets: torch.Tensor, piece: slice
) -> dict[str, torch.Tensor]:
    """A few positions of all inputs that have positions."""
    return {k: v[:, piece] if v.shape[:2] == targets.shape else v for k, v in inputs.items()}


def _bidirectional(model: nn.Module) -> bool:
    return getattr(model.config, "is_causal", None) is False
