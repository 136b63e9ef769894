"""What a GGUF file says beside its tensors, in the keys of ggml's docs/gguf.md."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from compress.models.sources.gguf import ROPE_PARAMETERS
from compress.models.sources.source import Source
from compress.runtimes.decoder import Decoder
from compress.runtimes.gguf.blocks import TYPES
from compress.runtimes.gguf.vocabulary import add_vocabulary


def open_writer(
    decoder: Decoder,
    arch: str,
    source: Source,
    plan: Mapping[str, tuple[tuple[int, ...], str]],
    path: Path,
    tokenizer: bool,
) -> Any:
    """A ``gguf.GGUFWriter`` that has written everything but the values of the tensors.

    Args:
        arch: llama.cpp's name of the architecture.
        plan: name of every tensor -> its shape and type, in the order in which they will come.
    """
    import gguf

    layer = decoder.layers[0]
    writer = gguf.GGUFWriter(path, arch)
    writer.add_type("model")
    writer.add_name(_name(source))
    if source.license:
        writer.add_license(source.license)
    writer.add_context_length(decoder.positions)
    writer.add_embedding_length(decoder.hidden)
    writer.add_block_count(len(decoder.layers))
    writer.add_feed_forward_length(layer.ffn)
    writer.add_head_count(layer.heads)
    writer.add_head_count_kv(layer.kv_heads)
    writer.add_key_length(decoder.head_dim)
    writer.add_value_length(decoder.head_dim)
    writer.add_rope_dimension_count(decoder.head_dim)
    writer.add_rope_freq_base(decoder.theta)
    if decoder.rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(decoder.rope["factor"])
    if decoder.rope.get("rope_type", "default") != "default":
        # Of llama3's frequencies the format holds the result alone; readers of configs want these.
        writer.add_string(ROPE_PARAMETERS, json.dumps(decoder.rope))
    writer.add_layer_norm_rms_eps(decoder.eps)
    writer.add_vocab_size(decoder.vocabulary)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(_file_type([kind for _, kind in plan.values()]))
    if tokenizer:
        add_vocabulary(writer, source.folder, decoder.vocabulary)
    else:
        writer.add_tokenizer_model("none")
    for name, (shape, kind) in plan.items():
        raw = gguf.GGMLQuantizationType[kind]
        stored = gguf.quant_shape_to_byte_shape(shape, raw) if kind in (*TYPES, "BF16") else shape
        numpy_type = {"F32": np.float32, "F16": np.float16}.get(kind, np.uint8)
        count = int(np.prod(stored)) * np.dtype(numpy_type).itemsize
        writer.add_tensor_info(name, stored, np.dtype(numpy_type), count, raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    return writer


def _name(source: Source) -> str:
    """What viewers call the model: a hub's id, or the folder's name; of a run's, the run's."""
    if source.kind != "folder":
        return source.origin.partition("@")[0]
    folder = source.folder
    return folder.parent.name if folder.name == "model" else folder.name


def _file_type(kinds: list[str]) -> int:
    """What llama.cpp calls a file of these types: by the most frequent of its matrices."""
    import gguf

    matrices = Counter(kind for kind in kinds if kind != "F32")
    if not matrices:
        return int(gguf.LlamaFileType.ALL_F32)
    return int(gguf.LlamaFileType[f"MOSTLY_{matrices.most_common(1)[0][0]}"])
