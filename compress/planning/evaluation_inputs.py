"""Everything that an evaluation reads, read once and before any work."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.data.codebook import Codebook
from compress.data.examples import Examples
from compress.data.examples_spec import ExamplesSpec
from compress.data.given import GivenText
from compress.data.labelled import load_rows, rows_digest
from compress.data.processor import ImageProcessor
from compress.data.text import TextSpec
from compress.data.tokens import token_digest
from compress.errors import CompressError
from compress.eval import EvaluationSpec
from compress.models.heads import Head, head_of
from compress.models.inputs import ImageRows, Rows
from compress.planning.evaluation_material import (
    GeneratorMaterial,
    check_objective,
    generator_material,
)
from compress.planning.evaluation_text import TextMaterial, text_material


@dataclass(frozen=True)
class EvaluationInputs:
    """What models of one kind and tokenizer are evaluated on.

    Attributes:
        spec: what is measured.
        reader: the tokenizer, the codebook or the image processor; None where nothing has to be
            read.
        text: the evaluation text, where there is one.
        source: of the text.
        generator: what is beyond a stream of tokens, for masked generators.
        generates: whether models are evaluated as masked generators.
        examples: labelled texts or images and what models read of them, for heads of labels.
    """

    spec: EvaluationSpec
    reader: Any
    text: TextMaterial | None
    source: str | None
    generator: GeneratorMaterial
    generates: bool
    examples: tuple[Examples, Rows | ImageRows] | None = None

    @property
    def rows(self) -> Rows | ImageRows | None:
        """What models with a head of labels answer."""
        return self.examples and self.examples[1]

    @property
    def digest(self) -> str | None:
        """What a run's results depend on, for its lock; None where nothing was read."""
        if self.rows is not None:
            return rows_digest(self.rows)
        if self.generator.sequences is not None:
            return token_digest(self.generator.sequences.tokens)
        return None if self.text is None else self.text.pinned

    @property
    def paired(self) -> bool:
        """Whether anything is measured against the original."""
        return self.generates or self.spec.latency_spec() is not None

    def entries(self) -> tuple[Any, ...]:
        """What a report says of the data."""
        from compress.eval.report import DataEntry

        found = []
        if self.generator.images is not None:
            found.append(
                DataEntry(
                    role="evaluation",
                    name=self.spec.images["source"],
                    sha256=self.digest,
                    tokens=self.generator.sequences.tokens.numel(),
                    detail=self.generator.images.description,
                )
            )
        if self.examples is not None:
            read, rows = self.examples
            found.append(
                DataEntry(
                    role="evaluation",
                    name=self.spec.examples["source"],
                    sha256=self.digest,
                    bytes=read.bytes,
                    tokens=int(rows.lengths.sum()),
                    detail=read.description,
                )
            )
        if self.text is not None:
            found.append(self.text.entry(self.source))
        return tuple(found)


def evaluation_inputs(
    text: TextSpec | GivenText | None,
    spec: EvaluationSpec,
    config: Any,
    reader: Any,
    data_root: str | Path | None,
    head: Head | None = None,
    given: Examples | None = None,
) -> EvaluationInputs:
    """Read the texts or images of an evaluation and make tokens of them.

    Args:
        text: which text, as :func:`compress.planning.recipe.split_evaluation` found it, or one in
            memory.
        config: of the model.
        reader: its tokenizer or its codebook.
        data_root: folder with local copies of data sets.
        head: of labels, where the model has one; by default the one that its config names.
        given: examples in memory, in the place of those that the spec describes.

    Raises:
        CompressError: what :func:`check_objective`, :func:`text_material`,
            :func:`generator_material` and :func:`compress.data.labelled.load_rows` raise; a text
            without a tokenizer; fewer tokens than one window.
    """
    generates = check_objective(config, spec, reader)
    read, generator, examples = None, GeneratorMaterial(), None
    if spec.examples is not None:
        described = ExamplesSpec.model_validate(spec.examples) if given is None else given
        try:
            examples = load_rows(
                described, head or head_of(config), reader, config, spec.length, data_root
            )
        except CompressError as error:
            raise error.within("evaluation") from None
    if text is not None:
        ids = isinstance(text, GivenText) and bool(text.rows)
        if (reader is None and not ids) or isinstance(reader, (Codebook, ImageProcessor)):
            raise CompressError(
                "a tokenizer, to read the evaluation text with",
                "none" if reader is None else "a model of images",
                "Give the model's tokenizer, or put its files beside the weights",
                where="evaluation",
            )
        read = text_material(text, spec, config, reader, data_root, generates=generates)
        _check_length(spec, read)
    if generates:
        generator = generator_material(spec, config, reader, read and read.text, data_root)
    return EvaluationInputs(
        spec, reader, read, text and text.source, generator, generates, examples
    )


def _check_length(spec: EvaluationSpec, read: TextMaterial) -> None:
    window = spec.window or 2
    if read.documents is None and len(read.tokens) < window:
        raise CompressError(
            f"an evaluation text of at least one window ({window} tokens)",
            f"{len(read.tokens)} tokens",
            "Lower evaluation.window or choose a longer text",
        )
