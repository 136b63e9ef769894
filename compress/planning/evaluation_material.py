"""What masked generators are evaluated on: held-out images or documents, and the judges."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from compress.data.codebook import Codebook
from compress.data.framing import Frame, is_masked_lm
from compress.data.images import Images, ImageSpec, load_images
from compress.data.text import Text
from compress.data.tokens import document_tokens
from compress.errors import CompressError
from compress.eval import EvaluationSpec
from compress.eval.quality.denoising import Sequences, sequences
from compress.eval.quality.generated_text import Scorer
from compress.eval.quality.generation import Judges, RealImages
from compress.generators.description import MaskedGeneration, is_masked_generator
from compress.models.sources.source import load_model, load_tokenizer, resolve


@dataclass(frozen=True)
class GeneratorMaterial:
    """What is beyond a stream of tokens.

    Attributes:
        sequences: what a model is scored on, where that is not the stream cut into windows.
        judges: what its samples are judged with; None for the usual ones of a text.
        images: the held-out images behind the sequences.
    """

    sequences: Sequences | None = None
    judges: Judges | None = None
    images: Images | None = None


def check_objective(config: Any, spec: EvaluationSpec, reader: Any = None) -> bool:
    """Whether a model is evaluated as a masked generator; refuses what it cannot be asked.

    Raises:
        CompressError: a causal model, without the flag, asked for a masked evaluation; a model
            without a mask token; a description that does not fit the config; images or documents
            for a model that is no masked generator.
    """
    generates = spec.objective == "masked" or (
        spec.objective == "auto" and is_masked_generator(config)
    )
    if generates:
        MaskedGeneration.of(config, reader)
    if spec.images and not generates:
        raise CompressError(
            "a masked generator for evaluation.images",
            "a model without masked_generation in its config",
            "Leave it out, or set evaluation.objective to masked for a masked language model",
            where="evaluation",
        )
    if spec.packing == "documents" and not (generates or is_masked_lm(config)):
        raise CompressError(
            "a masked model for evaluation.packing: documents", "a causal one", "Leave it out",
            where="evaluation",
        )  # fmt: skip
    return generates


def generator_material(
    spec: EvaluationSpec,
    config: Any,
    reader: Any,
    text: Text | None,
    data_root: str | Path | None,
) -> GeneratorMaterial:
    """Read what the evaluation of a masked generator needs, before any work.

    Args:
        config: of the model.
        reader: its tokenizer or its codebook.
        text: the evaluation text, where there is one.

    Raises:
        CompressError: images without a codebook, of another size or classes, a text without a
            tokenizer, or a scorer that cannot be loaded.
    """
    if spec.images is not None:
        return _images(spec, config, reader, data_root)
    if isinstance(reader, Codebook) or reader is None:
        return GeneratorMaterial()
    scorer = _scorer(spec.generator.scorer)
    judges = Judges(scorer=scorer, to_text=lambda ids: _decode(reader, ids))
    rows = None
    if text is not None and spec.packing == "documents":
        rows = document_sequences(spec, MaskedGeneration.of(config, reader), reader, text)
    return GeneratorMaterial(rows, judges)


def _images(
    spec: EvaluationSpec, config: Any, codebook: Any, data_root: str | Path | None
) -> GeneratorMaterial:
    if not isinstance(codebook, Codebook):
        raise CompressError(
            "a codebook beside a model that is evaluated on images", "none",
            "Use a model that was trained on images, or evaluate on text", where="evaluation",
        )  # fmt: skip
    wanted = ImageSpec.model_validate({"split": "test", **spec.images})
    held_out = load_images(wanted, data_root)
    other = "train" if wanted.split == "test" else "test"
    train = load_images(ImageSpec(source=wanted.source, split=other), data_root)
    rows = codebook.rows(held_out)
    data = sequences(rows, fixed=MaskedGeneration.of(config).fixed(rows))
    real = RealImages(
        f"{wanted.source} ({other} split)", train.pixels, train.labels,
        held_out.pixels, held_out.labels,
    )  # fmt: skip
    return GeneratorMaterial(data, Judges(decoder=codebook, images=real), held_out)


def document_sequences(
    spec: EvaluationSpec, description: MaskedGeneration, tokenizer: Any, text: Text
) -> Sequences:
    """A document a sequence, cut to the window, until ``max_tokens`` are used.

    Around it stands what the description says, which is what the sampler starts from; the window
    holds it too.

    Raises:
        CompressError: no document with a token to predict.
    """
    if not spec.special_tokens:
        description = description.without_frame()
    frame = Frame(description.prefix, description.suffix)
    kept, used, size = [], 0, 0
    for ids in document_tokens(text, tokenizer, (spec.window or 128) - len(frame)):
        if spec.max_tokens is not None and used >= spec.max_tokens:
            break
        row = frame.around(ids)
        free = int((~description.fixed(row[None])).sum())
        if free:
            kept.append(row)
            used += free
            size += len(tokenizer.decode(ids.tolist(), skip_special_tokens=True).encode())
    if not kept:
        raise CompressError(
            "documents with tokens to predict", "none", "Choose another text", where="evaluation"
        )
    rows = torch.nn.utils.rnn.pad_sequence(kept, batch_first=True, padding_value=0)
    sizes = torch.tensor([len(row) for row in kept])
    return sequences(
        rows, fixed=description.fixed(rows), sizes=sizes, bytes_per_token=size / used or None
    )


def _decode(tokenizer: Any, ids: torch.Tensor) -> list[str]:
    return tokenizer.batch_decode(ids, skip_special_tokens=True)


def _scorer(source: str | None) -> Scorer | None:
    if source is None:
        return None
    found = resolve(source)
    tokenizer, reason = load_tokenizer(found.folder)
    if tokenizer is None:
        raise CompressError("a tokenizer beside the scorer", reason, where="generator.scorer")
    return Scorer(source, load_model(found), tokenizer)
