"""Fewer heads and neurons of one number in every block of a BERT, then a fine-tuning."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from compress.eval.bench.rows import Row
from compress.eval.bench.vib.outcomes import Outcome
from compress.eval.bench.vib.sst2 import WIDTH_SHARES, base_model, curve, run, training


def narrowed(part: str, options: dict[str, Any], work: Path, arguments: Namespace) -> list[Row]:
    """One method at all sizes.

    Args:
        options: of both steps.
    """
    config = AutoConfig.from_pretrained(base_model(work, arguments))
    tuning = training(arguments).model_dump(mode="json")
    distillation = {"labels": 1.0, "logits": 1.0}

    def measured(share: float, seed: int) -> Outcome:
        heads, neurons = _kept(config, share)
        steps = [
            {"method": "head_width", "keep": heads, **options},
            {"method": "ffn_width", "keep": neurons, "round_to": 1, **options},
            {"method": "distill", "scope": "model", "outer": True, "training": tuning,
             "distillation": distillation},
        ]  # fmt: skip
        return Outcome.of_run(
            run(work, f"{part}-{round(100 * share)}", steps, seed, arguments)
        )  # fmt: skip

    return curve(part, WIDTH_SHARES, measured, work, arguments)


def _kept(config: Any, share: float) -> tuple[int, int]:
    """Heads and neurons of a block with which a share of all parameters of a BERT is gone.

    Heads go by the share of the blocks' weights that has to go; neurons meet the size.
    """
    hidden, blocks = config.hidden_size, config.num_hidden_layers
    size = hidden // config.num_attention_heads
    of_head, of_neuron = 4 * hidden * size + 3 * size, 2 * hidden + 1
    inside = config.num_attention_heads * of_head + config.intermediate_size * of_neuron
    outside = (
        hidden * (config.vocab_size + config.max_position_embeddings + config.type_vocab_size + 2)
        + hidden * (hidden + 1) + config.num_labels * (hidden + 1) + 6 * hidden * blocks
    )  # fmt: skip
    gone = share * (blocks * inside + outside) / blocks
    heads = max(1, round(config.num_attention_heads * (1 - gone / inside)))
    left = inside - gone - heads * of_head
    return heads, max(1, int(left // of_neuron))
