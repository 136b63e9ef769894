"""A network as a denoiser: token ids with masks in, logits of legal tokens out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import CompressError
from compress.generators.description import ClassCondition, MaskedGeneration
from compress.models.positions import positions_of

NEVER = float("-inf")


@dataclass
class Counters:
    """What the evaluations of a network have cost.

    Attributes:
        calls: network evaluations (forwards of a batch).
        rows: sequences that went through the network; with guidance a sample counts twice.
        block_forwards: blocks executed, over all calls.
        token_block_forwards: tokens times blocks, over all calls.
    """

    calls: int = 0
    rows: int = 0
    block_forwards: int = 0
    token_block_forwards: int = 0

    def add(self, rows: int, length: int, blocks: int) -> None:
        self.calls += 1
        self.rows += rows
        self.block_forwards += blocks
        self.token_block_forwards += rows * length * blocks

    def since(self, before: Counters) -> Counters:
        """The difference to an earlier state."""
        return Counters(**{k: v - getattr(before, k) for k, v in vars(self).items()})

    def copy(self) -> Counters:
        return Counters(**vars(self))


def legal_logits(
    model: nn.Module, ids: Tensor, spec: MaskedGeneration, attention_mask: Tensor | None = None
) -> Tensor:
    """Logits of a network with everything that is no legal token at minus infinity.

    The zero masking probability of SUBS (Sahoo et al. 2024, MDLM, https://arxiv.org/abs/2406.07524,
    section 3.2.3), and Dream's shift: with it the prediction of token i is read at i - 1, that of
    token 0 at 0. Gradients flow.

    Args:
        model: any model whose output has ``logits`` [rows, length, vocabulary].
        ids: int64 [rows, length].
        attention_mask: [rows, length], 0 at padding; None for no padding.

    Returns:
        float32 [rows, length, vocabulary].
    """
    mask = torch.ones_like(ids) if attention_mask is None else attention_mask
    logits = model(input_ids=ids, attention_mask=mask).logits.float()
    if spec.shift:
        logits = torch.cat([logits[:, :1], logits[:, :-1]], dim=1)
    illegal = ~spec.legal(logits.shape[-1]).to(logits.device)
    return logits.masked_fill(illegal, NEVER)


def subs_log_probs(logits: Tensor, ids: Tensor, mask_id: int) -> Tensor:
    """Log-probabilities in which visible tokens are certain ("carry-over unmasking" of SUBS).

    Args:
        logits: [rows, length, vocabulary], illegal tokens at minus infinity.
        ids: int64 [rows, length].

    Returns:
        Like ``logits``: log-softmax where ``ids`` is the mask; elsewhere 0 at the visible token and
        minus infinity at all others, without a gradient.
    """
    certain = torch.full_like(logits, NEVER).scatter(-1, ids[..., None], 0.0)
    return torch.where((ids == mask_id)[..., None], logits.log_softmax(-1), certain)


class Denoiser:
    """A masked generator that counts what it costs. Calling it is :meth:`logits`.

    Args:
        model: an ``AutoModelForMaskedLM``, or a causal model with ``is_causal=False`` in its
            config. Left in the mode (training or not) it is in.
        spec: the description; by default the one in the model's config.

    Attributes:
        counters: :class:`Counters` since the denoiser was made.

    Raises:
        CompressError: no description, or one that does not fit the model.
    """

    def __init__(self, model: nn.Module, spec: MaskedGeneration | None = None) -> None:
        self.spec = MaskedGeneration.of(model) if spec is None else spec
        self.spec.check(model)
        self.model = model
        self.counters = Counters()
        self._config: Any = model.config.get_text_config()

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def blocks(self) -> int:
        """Blocks that one evaluation executes."""
        return int(getattr(self._config, "num_hidden_layers", 0))

    @property
    def vocab_size(self) -> int | None:
        return getattr(self._config, "vocab_size", None)

    @property
    def positions(self) -> int | None:
        """The longest sequence that the model has positions for."""
        return positions_of(self._config)

    @torch.no_grad()
    def logits(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits [rows, length, vocabulary] in float32, illegal tokens at minus infinity.

        Args:
            ids: int64 [rows, length].
            attention_mask: [rows, length], 0 at padding.
        """
        training = self.model.training
        if training:
            self.model.eval()
        try:
            mask = None if attention_mask is None else attention_mask.to(self.device)
            logits = legal_logits(self.model, ids.to(self.device), self.spec, mask)
        finally:
            if training:
                self.model.train()
        self.counters.add(ids.shape[0], ids.shape[1], self.blocks)
        return logits

    __call__ = logits

    def log_probs(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Log-probabilities [rows, length, vocabulary]; visible tokens are certain."""
        logits = self.logits(ids, attention_mask)
        return subs_log_probs(logits, ids.to(logits.device), self.spec.mask_id)

    def guided(self, ids: Tensor, weight: Tensor | float, prompt: Tensor | None = None) -> Tensor:
        """Logits with classifier-free guidance: l_c + w (l_c - l_u).

        Ho and Salimans 2022 (https://arxiv.org/abs/2207.12598), eq. 6. Conditional and
        unconditional rows are one evaluation of twice the rows.

        Args:
            ids: int64 [rows, length].
            weight: w, a number or [rows]; 0 is the conditional model and costs nothing more.
            prompt: bool [rows, length], tokens that the unconditional rows hide.

        Returns:
            float32 [rows, length, vocabulary].

        Raises:
            CompressError: a model without anything to leave out.
        """
        weight = torch.as_tensor(weight, dtype=torch.float32)
        if not bool((weight != 0).any()):
            return self.logits(ids)
        both = self.logits(torch.cat([ids, self.unconditional(ids, prompt)]))
        given, free = both.chunk(2)
        weight = weight.to(both.device).reshape(-1, 1, 1)
        # Minus infinity minus minus infinity is no number; these entries stay as they are.
        return torch.where(given == NEVER, given, given + weight * (given - free))

    def unconditional(self, ids: Tensor, prompt: Tensor | None = None) -> Tensor:
        """The same rows without their class (the "no class" token) or their prompt (masked)."""
        condition = self.spec.condition
        if isinstance(condition, ClassCondition):
            result = ids.clone()
            result[:, condition.position] = self.spec.class_id(None)
            return result
        if prompt is None or not bool(prompt.any()):
            raise CompressError(
                "a class or a prompt to guide by", "neither", "Set guidance to 0", where="sampler"
            )
        return ids.masked_fill(prompt.to(ids.device), self.spec.mask_id)
