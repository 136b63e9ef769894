"""A llama-like checkpoint as its exporters see it: sizes, rotary frequencies, weights by role.

Blocks of these families compute ``x + o(attention(q, k, v))`` and ``x + down(silu(gate) * up)``
behind an RMS norm each; what may differ is a bias, a norm a head on queries and keys (Qwen3), a
layer without rotary positions (SmolLM3), widths from layer to layer. One block is in memory at a
time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compress.checkpoint.embeddings import read_embeddings
from compress.checkpoint.records import apply_record
from compress.checkpoint.state import ModelState
from compress.checkpoint.stock import stock_config
from compress.errors import CompressError
from compress.linear.grid import QuantScheme
from compress.linear.layer import features_of
from compress.models.loading import load_config
from compress.models.positions import positions_of
from compress.models.stream import StreamedModel
from compress.runtimes.weights import Matrix, is_removed, matrices, table
from compress.system.tensors import TensorIndex

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
ATTENTION = {"q": "self_attn.q_proj", "k": "self_attn.k_proj",
             "v": "self_attn.v_proj", "o": "self_attn.o_proj"}  # fmt: skip
MLP = {"gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}
TABLES = {"embedding": "model.embed_tokens", "head": "lm_head"}
ROLES = {**ATTENTION, **MLP}


@dataclass(frozen=True)
class Layer:
    """The sizes of a block.

    Attributes:
        attention, mlp: whether it has that sub-layer; one that was removed adds nothing.
        rotary: whether its queries and keys are turned by their positions.
    """

    heads: int
    kv_heads: int
    ffn: int
    attention: bool = True
    mlp: bool = True
    rotary: bool = True


@dataclass(frozen=True)
class LayerWeights:
    """The values of a block; ``maps`` by role, as :func:`compress.runtimes.weights.matrices`."""

    norms: dict[str, torch.Tensor]  # input, post_attention and, where there are, q and k
    maps: dict[str, tuple[Matrix, ...]]


@dataclass(frozen=True)
class Decoder:
    """A checkpoint of one of :data:`FAMILIES`.

    Attributes:
        family: its stock model type.
        positions: tokens that it can read; of a model with a sliding window at most as many as
            the window, within which attention is what it is without one.
        frequencies: of the rotary positions, [head_dim / 2], float32.
        rotary_scale: factor on sines and cosines.
        rope: config's ``rope_parameters``.
    """

    family: str
    state: ModelState
    streamed: StreamedModel
    layers: tuple[Layer, ...]
    hidden: int
    head_dim: int
    vocabulary: int
    positions: int
    eps: float
    tied: bool
    frequencies: torch.Tensor
    rotary_scale: float
    rope: dict[str, Any]

    @property
    def theta(self) -> float:
        """Base of the rotary frequencies."""
        return float(self.rope["rope_theta"])

    @property
    def uniform(self) -> bool:
        """Whether all layers have the same sizes."""
        return len({(y.heads, y.kv_heads, y.ffn) for y in self.layers}) == 1

    @property
    def count(self) -> int:
        """Number of blocks."""
        return len(self.layers)

    def modules(self, index: int) -> dict[str, nn.Module]:
        """The maps of a block by role, without values unless it is being looked at."""
        block = self.streamed.block(index)
        return {role: block.get_submodule(path) for role, path in ROLES.items()}

    def path(self, index: int, role: str) -> str:
        """Name of the map of a role in the checkpoint."""
        return f"{self.streamed.anatomy.blocks[index].path}.{ROLES[role]}"

    def blocks(self) -> Iterator[LayerWeights]:
        """The values of the blocks in their order, one in memory at a time."""
        for index in range(len(self.layers)):
            block = self.streamed.block(index)
            self.state.load(index, block, self.streamed.anatomy)
            norms = {
                name: block.get_submodule(path).weight.detach().float()
                for name, path in _NORMS.items()
                if _has(block, path)
            }
            maps = {r: matrices(m, self.path(index, r)) for r, m in self.modules(index).items()}
            yield LayerWeights(norms, maps)
            self.streamed.release_block(index)

    def last_norm(self) -> torch.Tensor:
        """The weight of the norm in front of the head, float32."""
        return self.state.source.get("model.norm.weight").float()

    def table(self, role: str) -> Matrix:
        """The embedding or the head."""
        return table(self.state, TABLES[role])

    def table_scheme(self, role: str) -> QuantScheme | None:
        """The grid that a step has rounded it to."""
        return read_embeddings(self.state.config).get(TABLES[role])


_NORMS = {"input": "input_layernorm", "post_attention": "post_attention_layernorm",
          "q": "self_attn.q_norm", "k": "self_attn.k_norm"}  # fmt: skip


def open_decoder(
    folder: Path, runtime: str, trust_remote_code: bool = False, more: tuple[str, ...] = ()
) -> Decoder:
    """Read what a folder holds; no weights yet.

    Args:
        runtime: name of the exporter, for errors.
        more: families that it knows beside these.

    Raises:
        CompressError: another family, or something in it that no exporter knows.
    """
    config = load_config(folder, trust_remote_code=trust_remote_code)
    family = config.model_type.removeprefix("compress_")
    if family not in FAMILIES:
        raise CompressError(
            f"a family that the {runtime} exporter knows: {', '.join((*FAMILIES, *more))}",
            f"one of type {family!r}", "Run it with transformers (compress.load)",
        )  # fmt: skip
    stock = stock_config(config)
    if stock.hidden_act not in ("silu", "swish"):
        raise CompressError("silu between the linears of the FFN", repr(stock.hidden_act))
    state = ModelState.of_checkpoint(TensorIndex.open(folder), config, trust_remote_code)
    streamed = state.streamed()
    for index, record in enumerate(state.records):
        apply_record(streamed.block(index), record, streamed.anatomy.blocks[index])
    head_dim = streamed.anatomy.blocks[0].head_dim
    layers = tuple(
        _layer(
            streamed.block(i), head_dim, bool((getattr(stock, "no_rope_layers", None) or {i: 1})[i])
        )
        for i in range(len(state.records))
    )
    fresh = type(streamed.model.model.rotary_emb)(stock)
    if fresh.rope_type in ("dynamic", "longrope"):
        raise CompressError(
            "rotary frequencies that are the same at every length", repr(fresh.rope_type),
            "Run it with transformers (compress.load)",
        )  # fmt: skip
    positions = positions_of(config) or 4096
    window = _window(stock)
    return Decoder(
        family=family,
        state=state,
        streamed=streamed,
        layers=layers,
        hidden=stock.hidden_size,
        head_dim=head_dim,
        vocabulary=stock.vocab_size,
        positions=min(positions, window) if window else positions,
        eps=stock.rms_norm_eps,
        tied="lm_head.weight" not in state.readable.names(),
        frequencies=fresh.inv_freq.detach().float(),
        rotary_scale=float(fresh.attention_scaling),
        rope=dict(stock.rope_parameters),
    )


def _layer(block: nn.Module, head_dim: int, rotary: bool) -> Layer:
    rows = {role: features_of(block.get_submodule(path))[0] for role, path in ROLES.items()}
    return Layer(
        heads=rows["q"] // head_dim,
        kv_heads=rows["k"] // head_dim,
        ffn=rows["up"],
        attention=not is_removed(block.get_submodule(ATTENTION["o"])),
        mlp=not is_removed(block.get_submodule(MLP["down"])),
        rotary=rotary,
    )


def _window(config: object) -> int | None:
    """Tokens that some layer sees at most, None where all see all."""
    if getattr(config, "use_sliding_window", True) is False:
        return None
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and "sliding_attention" not in kinds:
        return None
    return getattr(config, "sliding_window", None)


def _has(block: nn.Module, path: str) -> bool:
    try:
        block.get_submodule(path)
    except AttributeError:
        return False
    return True
