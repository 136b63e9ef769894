"""What can be said of a dense-sparse factorisation, and the form that follows from it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from compress.linear.dense_sparse import stored_bytes
from compress.linear.dictionary import Form
from compress.methods.base import LinearMethod
from compress.methods.factorize.forms import form_for
from compress.methods.factorize.sensitivity import LEVELS
from compress.train.options import TrainingOptions


class DenseSparseOptions(LinearMethod):
    """The options of :class:`.dense_sparse.DenseSparseMethod`."""

    ratio: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Share of the bytes of a matrix that stay, indices counted: 0.5 is half the "
        "size. Give this, or blocks, rank and nonzeros.",
    )
    width: int | None = Field(
        None,
        ge=1,
        description="With ratio: inputs of a block, the divisor next to it; by default what gives "
        "the dictionary three tenths of the bytes.",
    )
    atoms: float = Field(
        2.0,
        ge=1,
        description="With ratio: atoms for each input of a block. More of them lose less; the time "
        "grows with their square.",
    )
    blocks: int = Field(1, ge=1, description="With rank: blocks that the inputs are cut into.")
    rank: int | None = Field(None, ge=1, le=2**16, description="Atoms of each block's dictionary.")
    nonzeros: int | None = Field(
        None, ge=1, description="With rank: atoms of each block that an output is made of."
    )
    allocation: Literal["uniform", "sensitivity"] = Field(
        "uniform",
        description="With ratio: the same for every matrix, or more for those that lose more, "
        "all together the same.",
    )
    weighting: Literal["activation", "fisher", "plain"] = Field(
        "activation",
        description="What errors are measured in: the outputs on calibration inputs; these, each "
        "weighted by how much the loss depends on it; or the weights themselves.",
    )
    windows: int = Field(
        64,
        ge=1,
        description="With weighting: fisher, calibration sequences, at most, whose gradients are "
        "taken.",
    )
    coding: Literal["directions", "pursuit", "correlation"] = Field(
        "directions",
        description="How atoms are chosen: alternating directions, batch orthogonal matching "
        "pursuit (slow where nonzeros are many), or those that go best by themselves.",
    )
    rounds: int = Field(10, ge=1, description="Sparse codings, with a new dictionary between two.")
    damping: float = Field(
        1e-3, ge=0, description="Share of the mean square of the inputs added to all of them."
    )
    seed: int | None = Field(
        None, ge=0, description="Of the outputs that dictionaries begin with; the run's where none "
        "is given.",
    )  # fmt: skip
    refine: TrainingOptions | None = Field(
        None,
        description="Afterwards train dictionaries and values of each block on the dense block's "
        "outputs; a batch counts calibration batches.",
    )

    @model_validator(mode="after")
    def _one_target(self):
        if (self.ratio is None) == (self.rank is None):
            raise ValueError("give either ratio (of bytes that stay) or rank and nonzeros")
        if (self.rank is None) != (self.nonzeros is None):
            raise ValueError("rank and nonzeros go together")
        if self.rank is not None and self.nonzeros > self.rank:
            raise ValueError(f"nonzeros {self.nonzeros} are more than the atoms there are")
        if self.ratio is None and (self.allocation != "uniform" or self.width is not None):
            raise ValueError("allocation and width go with ratio")
        if self.ratio is not None and self.blocks != 1:
            raise ValueError("blocks go with rank; with ratio give width")
        if self.allocation == "sensitivity" and self.ratio <= LEVELS[0]:
            raise ValueError(f"a ratio above {LEVELS[0]}, below which no matrix is taken")
        return self

    def form(
        self, out_features: int, in_features: int, value_bytes: int, ratio: float | None = None
    ) -> Form | None:
        """The form of a matrix; None where it is left alone."""
        if self.rank is None:
            share = self.ratio if ratio is None else ratio
            if share >= 1:
                return None
            return form_for(out_features, in_features, share, value_bytes, self.atoms, self.width)
        form = Form(self.blocks, self.rank, self.nonzeros)
        taken = stored_bytes(
            out_features, in_features, form.blocks, form.rank, form.nonzeros, value_bytes
        )
        return form if taken < value_bytes * out_features * in_features else None

    def largest_form(self, out: int, width: int, value_bytes: int) -> Form | None:
        """The form of a matrix [out, width] that takes the most memory to find."""
        most = LEVELS[-2] if self.allocation == "sensitivity" else None
        return self.form(out, width, value_bytes, most)
