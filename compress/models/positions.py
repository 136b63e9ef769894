"""How many positions a model has: the longest sequence that it can read."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# Numbered from padding_idx + 1, so that the first places of the table are never used.
_BEHIND_PADDING = frozenset({
    "camembert", "data2vec-text", "esm", "ibert", "longformer", "luke", "mpnet", "roberta",
    "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod",
})  # fmt: skip


def positions_of(config: PreTrainedConfig) -> int | None:
    """Tokens of the longest sequence that a model has positions for.

    None where the config names no number (ALiBi, state spaces) or one that is no limit.
    """
    found = getattr(config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(found, int) or found < 2:
        return None
    if config.model_type.removeprefix("compress_") in _BEHIND_PADDING:
        found -= (getattr(config, "pad_token_id", None) or 0) + 1
    return found
