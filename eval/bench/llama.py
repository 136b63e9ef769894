"""Llamas of any size with random weights, written without ever being in memory."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from compress.system.shards import ShardWriter, TensorSpec

STANDARD_DEVIATION = 0.02  # LlamaConfig.initializer_range


def write_llama(
    folder: Path, config: LlamaConfig, dtype: torch.dtype, *, seed: int = 0, tokenizer: bool = True
) -> Path:
    """Write a checkpoint with normal random weights, unless a complete one is there.

    Memory holds one tensor. config.json comes last, so a folder with one is whole.

    Args:
        config: of the model, embeddings not tied.
        dtype: of the files.
        seed: the same one gives the same bytes.
        tokenizer: put a byte-level tokenizer beside the weights.
    """
    if (folder / "config.json").exists():
        return folder
    with torch.device("meta"):
        state = LlamaForCausalLM(config).to(dtype).state_dict()
    generator = torch.Generator().manual_seed(seed)
    specs = {name: TensorSpec.of(tensor) for name, tensor in state.items()}
    with ShardWriter(folder, specs) as writer:
        for name, tensor in state.items():
            if tensor.dim() == 1:  # norms
                values = torch.ones(tensor.shape)
            else:
                values = torch.randn(tensor.shape, generator=generator).mul_(STANDARD_DEVIATION)
            writer.write(name, values.to(dtype))
    if tokenizer:
        byte_tokenizer().save_pretrained(folder)
    config.dtype, config.architectures = dtype, ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    return folder


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte: 256 ids that fit every vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made)
