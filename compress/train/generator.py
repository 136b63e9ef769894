"""The loss of a masked generator, alone or beside a teacher, at fresh masks in every step."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from compress.generators import MaskedGeneration, corrupt, legal_logits, mask_ratios, masked_loss
from compress.generators.ratios import TRAINING_PRIORS
from compress.train.language import IGNORED, DistillationOptions
from compress.train.moment import Moment

Batch = dict[str, torch.Tensor]


class GeneratorLoss:
    """The training loss that the model's description names; see :class:`LanguageLoss`.

    The masks that calibration batches come with are put aside: a model that must predict at all
    mask ratios learns from new ones in every step.

    Args:
        model: whose config describes a masked generator.
        distillation: None to learn from the tokens alone; hidden states are not compared.
        teacher: the model that observes; by default the model itself, as it is at that time.
    """

    def __init__(
        self,
        model: nn.Module,
        distillation: DistillationOptions | None = None,
        teacher: nn.Module | None = None,
    ) -> None:
        self.model, self.distillation, self.teacher = model, distillation, teacher or model
        self.spec = MaskedGeneration.of(model)

    def prepare(self, batch: Batch, moment: Moment) -> Batch:
        """Mask each row of a batch at a ratio of its own."""
        ids = batch["input_ids"]
        if "labels" in batch:
            ids = torch.where(batch["labels"] == IGNORED, ids, batch["labels"])
        generator = moment.generator()
        prior = TRAINING_PRIORS[self.spec.weighting]
        ratios = mask_ratios(len(ids), prior, generator, length=ids.shape[1])
        noisy, labels = corrupt(ids, self.spec, ratios, generator)
        lengths = (~self.spec.fixed(ids)).sum(dim=1)
        rest = {k: v for k, v in batch.items() if k not in ("input_ids", "labels")}
        return rest | {
            "input_ids": noisy, "labels": labels, "ratios": ratios, "lengths": lengths,
        }  # fmt: skip

    def observe(self, batch: Batch) -> torch.Tensor:
        """The teacher's log-probabilities at masked positions [masked, vocabulary]."""
        return self._logits(batch, self.teacher)[batch["labels"] != IGNORED].log_softmax(-1)

    def __call__(
        self, batch: Batch, teacher: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """The loss (a scalar) and its parts, named ``masked_loss`` and ``kl``."""
        logits, labels = self._logits(batch, self.model), batch["labels"]
        loss = masked_loss(
            logits, labels, batch["ratios"], self.spec.weighting, lengths=batch["lengths"]
        )
        figures = {"masked_loss": float(loss.detach())}
        if teacher is None:
            return loss, figures
        weights = self.distillation
        heat = weights.temperature
        apart = functional.kl_div(
            (logits[labels != IGNORED] / heat).log_softmax(-1).nan_to_num(neginf=-1e4),
            (teacher / heat).log_softmax(-1).nan_to_num(neginf=-1e4),
            reduction="sum",
            log_target=True,
        ) / max(1, len(teacher))  # a likelihood bound may leave a batch without any mask
        figures["kl"] = float(apart.detach())
        return weights.labels * loss + weights.logits * heat**2 * apart, figures

    def _logits(self, batch: Batch, model: nn.Module) -> torch.Tensor:
        return legal_logits(
            model, batch["input_ids"], self.spec, batch.get("attention_mask")
        ).float()
