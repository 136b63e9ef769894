"""A compressed model in memory to a folder, and the proof that the folder holds that model."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from compress.checkpoint.config import apply_records, layer_count
from compress.checkpoint.embeddings import (
    marked,
    read_embeddings,
    stored_outer,
    stored_outer_shapes,
)
from compress.checkpoint.guards import guards, is_guard
from compress.checkpoint.records import BlockRecord, dump_block, record_block
from compress.checkpoint.stock import stock_sizes
from compress.checkpoint.storage import HALF
from compress.errors import CompressError
from compress.linear.packed import packed_weights
from compress.models.anatomy import Anatomy, anatomy_of
from compress.models.loading import auto_class as _auto_class
from compress.models.loading import load_config
from compress.models.supported import check_kind, check_not_packed
from compress.system.files import new_folder
from compress.system.intake import reason
from compress.system.shards import MAX_SHARD_BYTES, ShardWriter, TensorSpec, write_json
from compress.system.tensors import check_finite


def save_model(
    model: PreTrainedModel,
    folder: str | os.PathLike[str],
    tokenizer: Any = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> PreTrainedConfig:
    """Write a model that was compressed in place as a Hugging Face checkpoint, whole or not at all.

    Blocks are converted to their stored form one at a time, in the dtype of the model.

    Args:
        folder: new or empty.
        tokenizer: anything with ``save_pretrained``; written beside the weights.

    Returns:
        The config as written.

    Raises:
        CompressError: the folder is not empty, the disk is full, no config can express the model's
            widths, a weight that the config ties to another is one of its own, or the generation
            config or the tokenizer cannot be saved; nothing is left behind.
    """
    folder = Path(folder).resolve()  # a link to an empty folder stays one
    require_empty(folder)
    check_kind(model)
    check_not_packed(model)
    anatomy = anatomy_of(model)
    records = [record_block(model.get_submodule(block.path), block) for block in anatomy.blocks]
    config = config_for(model, anatomy, records)
    # Two passes: the files' headers come first, and hold the shapes of what packing will yield.
    specs = {name: TensorSpec.of(t) for name, t in stored_tensors(model, anatomy)}
    with new_folder(folder, "the checkpoint") as partial:
        # What other code may refuse to write comes before gigabytes of weights.
        if getattr(model, "generation_config", None) is not None and model.can_generate():
            with _saving(
                "a generation config",
                "Correct model.generation_config, or set it to None, and save again",
            ):
                model.generation_config.save_pretrained(partial)
        if tokenizer is not None:
            with _saving("a tokenizer", "Save without one (tokenizer=None), or load it again"):
                tokenizer.save_pretrained(partial)
        with ShardWriter(partial, specs, max_shard_bytes) as writer:
            for name, tensor in stored_tensors(model, anatomy):
                if tensor.is_floating_point():
                    check_finite(name, tensor, where="the model to save")
                writer.write(name, tensor)
        write_config(config, partial)
    return config


@contextlib.contextmanager
def _saving(what: str, fix: str) -> Iterator[None]:
    """Name what could not be saved: ``save_pretrained`` raises errors of any type."""
    try:
        yield
    except Exception as error:
        raise CompressError(f"{what} that can be saved", reason(error), fix) from error


def config_for(
    model: PreTrainedModel, anatomy: Anatomy, records: list[BlockRecord]
) -> PreTrainedConfig:
    """Return the config of a model as its blocks are now, layer count included."""
    base = stock_sizes(model.config)
    if layer_count(base, anatomy.family) != len(records):
        raise CompressError(
            f"as many blocks as config.json says ({layer_count(base, anatomy.family)})",
            str(len(records)),
            "Set model.config by compress.checkpoint.config.keep_layers when blocks are removed",
        )
    # The class knows what it is; a config that was made by hand often does not.
    base.architectures = base.architectures or [type(model).__name__]
    base.dtype = model.dtype
    # What the config says of the widths may be behind: the model was changed in place.
    return apply_records(
        base, anatomy.family, records, anatomy.blocks_path, anatomy.blocks[0].hidden,
        marked(model) or None,
    )  # fmt: skip


def stored_tensors(model: PreTrainedModel, anatomy: Anatomy) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield a model's tensors in storage form, one block's at a time; tied ones once.

    Raises:
        CompressError: as :func:`tied_names`.
    """
    tied = tied_names(model)
    outer = (
        (name, tensor)
        for name, tensor in model.state_dict().items()
        if anatomy.is_outer(name) and name not in tied
    )
    yield from stored_outer(model, outer, model.dtype)
    for block in anatomy.blocks:
        module = model.get_submodule(block.path)
        wide = _wide(module) if model.dtype in HALF else set()
        stored, record = dump_block(module, block, model.dtype, wide)
        for name, tensor in {**stored, **guards(record)}.items():
            yield f"{block.path}.{name}", tensor


def _wide(block: nn.Module) -> set[str]:
    """Names of what a model in half precision keeps in float32, which a checkpoint does as well."""
    return {name for name, tensor in block.state_dict().items() if tensor.dtype == torch.float32}


def tied_names(model: PreTrainedModel) -> set[str]:
    """Names of the weights that a checkpoint leaves out: readers tie them to others.

    Raises:
        CompressError: a weight that config.json would tie to another is one of its own, which
            would be lost.
    """
    # The model's own list is of the time when it was made; the config may have changed since.
    by_config = model.get_expanded_tied_weights_keys(all_submodels=True)
    ties = {n: s for n, s in model.all_tied_weights_keys.items() if n in by_config}
    state = model.state_dict(keep_vars=True)
    for name, source in ties.items():
        if name in state and not (source in state and _same_memory(state[name], state[source])):
            raise CompressError(
                f"{name} to be {source} itself, as config.tie_word_embeddings says",
                "a weight of its own",
                "Set model.config.tie_word_embeddings = False to keep both, or tie them again by "
                "model.tie_weights()",
            )
    return set(ties)


def _same_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are one: the same object, or two views of the same values."""
    return a is b or (
        a.device == b.device
        and a.device.type != "meta"
        and (a.data_ptr(), a.dtype, a.shape, a.stride())
        == (b.data_ptr(), b.dtype, b.shape, b.stride())
    )


def write_config(config: PreTrainedConfig, folder: str | os.PathLike[str]) -> None:
    """Write config.json whole or not at all."""
    values = json.loads(config.to_json_string())
    write_json(Path(folder) / "config.json", values)


def require_empty(folder: Path) -> None:
    """Raise unless the folder is missing or empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CompressError(
            "a new or empty output folder",
            f"{folder}, which holds something already",
            "Choose another folder or remove its content",
        )


def verify(
    folder: str | os.PathLike[str],
    expected: torch.Tensor,
    inputs: Mapping[str, torch.Tensor],
    auto_class: Any = None,
    tolerance: float = 1e-4,
    trust_remote_code: bool = False,
) -> float:
    """Open a checkpoint the way a user would and compare its logits with the model in memory.

    Args:
        expected: logits of the model in memory on ``inputs``.
        inputs: keyword arguments of the model's forward.
        auto_class: AutoModelForCausalLM, …; that of the task that config.json names if None.
        tolerance: on the largest difference, as a fraction of the largest expected logit. 1e-4
            leaves room for sums in another order, and none for a weight on the wrong grid point.
        trust_remote_code: allow code that comes with the checkpoint.

    Returns:
        The largest difference over the largest expected logit.

    Raises:
        CompressError: it does not open, tensors are missing or left over, or the logits differ.
    """
    import transformers

    # Rounding to int8 turns a difference of the last bit into one of a code: the logits are to be
    # those of dense products.
    with _quiet(transformers.logging), packed_weights(False):
        try:
            if auto_class is None:
                auto_class = _auto_class(load_config(folder, trust_remote_code=trust_remote_code))
            model, info = auto_class.from_pretrained(
                folder, dtype=expected.dtype, output_loading_info=True,
                trust_remote_code=trust_remote_code,
            )  # fmt: skip
        except Exception as error:  # classes that do not fit the weights raise whatever they hit
            raise _bad_checkpoint(folder, f"{type(error).__name__}: {error}") from error
    problems = [
        f"{what.replace('_', ' ')}: {', '.join(sorted(map(str, info[what]))[:3])}"
        for what in ("missing_keys", "unexpected_keys", "mismatched_keys")
        if info.get(what)
    ]
    if problems:
        raise _bad_checkpoint(folder, "; ".join(problems))
    with torch.no_grad():
        logits = model.eval()(**inputs).logits
    if logits.shape != expected.shape:
        raise _bad_checkpoint(folder, f"logits of shape {list(logits.shape)}")
    scale = expected.abs().amax().clamp(min=torch.finfo(torch.float32).tiny)
    error = ((logits - expected).abs().amax() / scale).item()
    if not error <= tolerance:
        raise _bad_checkpoint(folder, f"logits that differ by {error:.2e} of the largest")
    return error


def verify_shapes(folder: str | os.PathLike[str], trust_remote_code: bool = False) -> None:
    """Compare the tensors of a checkpoint with what its config implies, loading none.

    For models too large to hold a second time.

    Raises:
        CompressError: names or shapes differ.
    """
    from compress.checkpoint.config import read_records
    from compress.checkpoint.records import apply_record, stored_shapes_of
    from compress.models.experts import fuse_all
    from compress.models.stream import build_meta
    from compress.system.tensors import TensorIndex

    tensors = TensorIndex.open(folder)
    config = load_config(folder, trust_remote_code=trust_remote_code)
    model = build_meta(config, trust_remote_code)
    fuse_all(model)  # what the config says is apart, the records take apart again
    anatomy = anatomy_of(model)
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    expected = {
        name: tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if anatomy.is_outer(name) and name not in tied
    }
    expected = stored_outer_shapes(expected, read_embeddings(config))
    widths = [block.widths for block in anatomy.blocks]
    records = read_records(config, anatomy.family, len(anatomy.blocks), widths)
    for block, record in zip(anatomy.blocks, records, strict=True):
        module = model.get_submodule(block.path)
        apply_record(module, record)
        shapes = stored_shapes_of(module, record)
        expected.update((f"{block.path}.{name}", shape) for name, shape in shapes.items())
    found = {name: tensors.shape(name) for name in tensors.names()}
    found = {name: shape for name, shape in found.items() if not is_guard(name, shape)}
    wrong = sorted(n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n))
    if wrong:
        name = wrong[0]
        raise _bad_checkpoint(
            folder,
            f"{len(wrong)} tensors that differ from config.json, {name} first: "
            f"{found.get(name, 'missing')} for {expected.get(name, 'none')}",
        )


@contextlib.contextmanager
def _quiet(logging: Any) -> Iterator[None]:
    """Silence the library's load report: what it says comes back in the error."""
    level = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _bad_checkpoint(folder: object, got: str) -> CompressError:
    return CompressError(
        f"the checkpoint in {folder} to be the model in memory",
        got,
        "This is a fault of the toolkit: keep the folder and report it",
    )
