"""What narrowing heads and neurons have in common: options, checks, and the removal of units."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator

from compress.errors import CompressError
from compress.linear.algebra import absorb_columns, absorb_columns_in_mask, relative_error
from compress.linear.layer import product, reading
from compress.linear.matrix import is_sparse, matrix
from compress.linear.statistics import GRAM, MOMENTS, NOTHING, InputStatistics
from compress.methods.base import HEADS, NEURONS, VALUES, WIDTH, SiteMethod
from compress.methods.passes import Effort, Pass, Shapes, Survey
from compress.methods.width.allocation import allocate, rounded_width
from compress.methods.width.importance import (
    ACTIVATION,
    RESIDUAL,
    activation_scores,
    residual_scores,
    residual_selection,
)
from compress.methods.width.removal import pattern_chunk
from compress.methods.work import BlockSurvey, SiteWork
from compress.models.anatomy import ATTENTION_OUT, Anatomy, BlockAnatomy, Site
from compress.models.outline import BlockOutline, Outline
from compress.models.units import keep_units, unit_columns, units_of_rows


class WidthMethod(SiteMethod):
    """Removes units of a block physically: rows of the producers, columns of the output projection.

    Which units go is decided when the block's turn comes, from inputs that have passed through the
    blocks narrowed before it. The output projection is then fitted, in closed form, to what it used
    to compute on those inputs. Zeros of an earlier step stay zero.

    Measured on two trained llamas (0.26M and 0.94M parameters, 32k tokens for calibration, held-out
    loss in nats a token, dense 2.204 and 1.020), a quarter / half of the neurons or heads removed:

    ============================  =============  =============  =============  =============
    importance, uniform           neurons 0.26M  neurons 0.94M  heads 0.26M    heads 0.94M
    ============================  =============  =============  =============  =============
    residual                      2.718 / 3.448  1.143 / 1.470  2.376 / 2.748  1.197 / 1.535
    activation                    2.744 / 3.492  1.161 / 1.530  2.390 / 2.754  1.197 / 1.553
    magnitude                     2.900 / 3.749  1.205 / 1.716  2.424 / 2.789  1.366 / 1.844
    residual, no correction       3.065 / 4.211  1.482 / 2.980  2.490 / 3.072  1.455 / 2.320
    activation, no correction     3.045 / 4.231  1.455 / 2.747  2.495 / 2.960  1.431 / 2.288
    ============================  =============  =============  =============  =============

    Hence the default. Without the correction ``activation`` is mostly the better choice. Widths by
    layer were better than uniform ones on the larger of the two models, about as good on the other.
    """

    writes: ClassVar[frozenset[str]] = frozenset({VALUES, WIDTH})
    kind: ClassVar[str]  # the site of the output projection; says what is narrowed
    example: ClassVar[dict[str, Any]] = {"share": 0.5}
    unit: ClassVar[str]  # what is removed, in the plural, for messages

    share: float | None = Field(
        None, ge=0, lt=1, description="Share of units to remove. Give this or `keep`."
    )
    keep: int | None = Field(
        None, ge=1, description="Units that stay in a block (the mean, where they differ by block)."
    )
    round_to: int = Field(1, ge=1, description="Widths become multiples of this.")
    importance: Literal["activation", "residual", "magnitude"] = Field(
        RESIDUAL,
        description="`residual`: energy of the output that stays lost after the other units have "
        "made up for a unit, taken anew as units go; `activation`: energy that a unit sends "
        "through the output projection; `magnitude`: sum of squared weights.",
    )
    allocation: Literal["uniform", "per_layer"] = Field(
        "uniform",
        description="`uniform`: all blocks get one width; `per_layer`: one threshold on importance "
        "over all blocks (takes a pass over the uncompressed model).",
    )
    min_share: float = Field(
        0.0, ge=0, lt=1, description="Least share that a block loses, for per_layer."
    )
    max_share: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Largest share that a block loses, for per_layer; default: half of what the "
        "share leaves on top of it.",
    )
    correction: bool = Field(
        True, description="Fit the output projection to its old outputs by least squares."
    )
    damping: float = Field(
        0.001, gt=0, description="Ridge of the fits, as a share of the mean input energy."
    )

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "kind" in vars(cls):
            cls.narrows = frozenset({HEADS if cls.kind == ATTENTION_OUT else NEURONS})

    @model_validator(mode="after")
    def _one_target(self):
        if (self.share is None) == (self.keep is None):
            raise ValueError(f"give either share or keep, the {self.unit} to remove or to leave")
        if self.keep is not None and self.keep % self.round_to:
            raise ValueError(f"keep {self.keep} is no multiple of round_to {self.round_to}")
        if self.share is not None and self.allocation == "per_layer":
            low, high = self.min_share, self._largest_share(self.share)
            if not low <= self.share <= high:
                raise ValueError(f"share {self.share:g} lies outside {low:g} to {high:g}")
        return self

    def _largest_share(self, share: float) -> float:
        return (1 + share) / 2 if self.max_share is None else self.max_share

    @property
    def surveys(self) -> bool:
        return self.allocation == "per_layer"

    def units(self, anatomy: BlockAnatomy) -> int:
        """Number of units in a block."""
        return anatomy.widths["kv_heads" if self.kind == ATTENTION_OUT else "ffn"]

    def uniform_width(self, anatomy: BlockAnatomy) -> int:
        """Units that stay in a block when all blocks are treated alike."""
        if self.keep is not None:
            return self.keep
        return rounded_width(self.units(anatomy), self.share, self.round_to)

    def widths(self, anatomy: BlockAnatomy, kept: int) -> dict[str, int]:
        """All widths of a block in which ``kept`` units stay."""
        if self.kind != ATTENTION_OUT:
            return {**anatomy.widths, "ffn": kept}
        heads = anatomy.heads // anatomy.kv_heads * kept
        return {**anatomy.widths, "heads": heads, "kv_heads": kept}

    def check(self, anatomy: Anatomy, outline: Outline) -> None:
        if anatomy.family.shared_blocks:
            raise CompressError(
                "a model whose layers have weights of their own",
                f"{anatomy.model_type}, whose layers share one set",
                "Use a sparsity, precision or factorisation step",
            )
        for block in outline.blocks:
            self._check_part(block, anatomy.model_type)
            self._check_width(block.anatomy)

    def _check_part(self, block: BlockOutline, model_type: str) -> None:
        anatomy, path = block.anatomy, block.anatomy.path
        site = anatomy.site(self.kind)
        if site is None or not self.units(anatomy):
            raise CompressError(
                f"blocks with {self.unit} that the toolkit recognises",
                f"none in {path} ({model_type})",
                "`compress inspect` shows what was found; a family needs an entry in "
                "compress/models/families.py",
            )
        if site.bound:
            raise CompressError(
                f"{self.unit} that can go one by one",
                f"{path}.{site.bound[0]}, which joins all of them",
                "Use another kind of step for this family",
            )
        producers = units_of_rows(anatomy, self.kind)
        for name, rows in producers.items():
            if len(rows) != block.linears[name].out_features:
                raise CompressError(
                    f"{len(rows)} outputs of {path}.{name} for {self.units(anatomy)} {self.unit}",
                    f"{block.linears[name].out_features}",
                    f"Describe in compress/models/families.py how {model_type} fuses projections",
                )
        for name in (*producers, *site.linears):
            if block.linears[name].quantized:
                raise CompressError(
                    "layers in floating point",
                    f"{path}.{name}, which an earlier step has quantised",
                    f"Put {self.name} before the quantisation",
                )

    def _check_width(self, anatomy: BlockAnatomy) -> None:
        units, kept = self.units(anatomy), self.uniform_width(anatomy)
        if kept > units:
            raise CompressError(
                f"at most {units} {self.unit} to keep, as many as {anatomy.path} has",
                f"keep: {kept}",
                "Lower keep",
            )
        if kept == units and self.share:
            step = min(self.round_to, units)
            raise CompressError(
                f"a share that removes at least {step} of {units} {self.unit}",
                f"{self.share:g}, which rounds to none in {anatomy.path}",
                f"Raise share to {step / units:.2g} or more, or lower round_to",
            )

    def predict(self, outline: Outline) -> Outline:
        def narrow(block: BlockOutline) -> BlockOutline:
            return block.with_widths(self.widths(block.anatomy, self.uniform_width(block.anatomy)))

        predicted = outline.map_blocks(narrow)
        if self.surveys:
            note = (
                f"{self.name}: widths by layer are decided while it runs; the plan counts the "
                "uniform ones, which remove as much in total"
            )
            predicted = replace(predicted, notes=(*predicted.notes, note))
        return predicted

    def targets(self, block: BlockAnatomy, site: Site) -> tuple[str, ...]:
        return site.linears if site.kind == self.kind else ()

    def _scoring_statistic(self) -> str:
        if self.importance == ACTIVATION:
            return GRAM if self.kind == ATTENTION_OUT else MOMENTS
        return GRAM if self.importance == RESIDUAL else NOTHING

    def statistic(self, site: Site) -> str:
        return GRAM if self.correction else self._scoring_statistic()

    def passes(self) -> tuple[Pass, ...]:
        if not self.surveys:
            return super().passes()
        survey = Survey(self.observe, self.decide, self._survey_statistic)
        return survey, *super().passes()

    def _survey_statistic(self, site: Site) -> str:
        return self._scoring_statistic() if site.kind == self.kind else NOTHING

    def observe(self, survey: BlockSurvey) -> list[float]:
        (name,) = survey.anatomy.site(self.kind).linears
        columns = unit_columns(survey.anatomy, self.kind)
        statistics = survey.statistics.get(name)
        return self._scores(survey.block, survey.anatomy, name, statistics, columns).tolist()

    def decide(self, notes: list[Any], anatomy: Anatomy) -> list[int]:
        uniform = [self.uniform_width(block) for block in anatomy.blocks]
        share = 1 - sum(uniform) / sum(len(scores) for scores in notes)
        return allocate(
            notes, sum(uniform), self.round_to, min(self.min_share, share),
            self._largest_share(share),
        )  # fmt: skip

    def solving_bytes(self, shapes: list[tuple[int, int]], gram: bool) -> int:
        ((out, width),) = shapes
        # Inverse, its copies and the refit in float64.
        return (32 if gram else 0) * width**2 + 16 * out * width

    def solving_work(self, shapes: Shapes) -> Effort:
        return Effort(sum(12.0 * width**3 + 4 * out * width**2 for out, width in shapes))

    def solve(self, work: SiteWork) -> None:
        (name,) = work.names
        anatomy = work.anatomy
        units, kept = self.units(anatomy), self.uniform_width(anatomy)
        if work.decision is not None:
            kept = work.decision[anatomy.index]
        work.metrics["kept"] = kept
        if kept == units:
            return
        columns = unit_columns(anatomy, self.kind)
        chunk = pattern_chunk(work, name, kept, columns)
        columns = columns.reshape(units // chunk, -1)
        statistics = work.statistics.get(name)
        best = self._best(work, name, statistics, columns, kept // chunk)
        narrow = self._fitted(work, name, columns[best].reshape(-1))
        staying = torch.arange(units).reshape(-1, chunk)[best].reshape(-1)
        work.kept_columns = keep_units(work.block, anatomy, self.kind, staying, narrow)

    def _best(
        self,
        work: SiteWork,
        name: str,
        statistics: InputStatistics | None,
        columns: torch.Tensor,
        kept: int,
    ) -> torch.Tensor:
        """Indices (on the CPU, ascending) of the units that stay; ``columns`` as in _scores."""
        if self.importance == RESIDUAL:
            weight, label = product(work.linear(name)), work.label(name)
            columns = columns.to(weight.device)
            return residual_selection(weight, statistics, columns, kept, self.damping, label).cpu()
        scores = self._scores(work.block, work.anatomy, name, statistics, columns)
        return scores.argsort(descending=True, stable=True)[:kept].sort().values.cpu()

    def _fitted(self, work: SiteWork, name: str, kept: torch.Tensor) -> torch.Tensor:
        """The output projection without the columns of lost units, for which the others make up."""
        module = work.linear(name)
        weight = matrix(reading(module))
        kept = kept.to(weight.device)
        narrow = weight[:, kept]
        if self.correction:
            gram = work.statistics[name].gram
            work.metrics["error_uncorrected"] = relative_error(weight, narrow, gram, kept)
            if is_sparse(reading(module)):
                narrow = absorb_columns_in_mask(weight, gram, kept, self.damping)
            else:
                narrow = absorb_columns(weight, gram, kept, self.damping, work.label(name))
            work.metrics["error"] = relative_error(weight, narrow, gram, kept)
        return narrow

    def _scores(
        self,
        block: torch.nn.Module,
        anatomy: BlockAnatomy,
        name: str,
        statistics: InputStatistics | None,
        columns: torch.Tensor,
    ) -> torch.Tensor:
        weight = product(block.get_submodule(name))
        columns = columns.to(weight.device)
        if self.importance == ACTIVATION:
            return activation_scores(weight, statistics, columns)
        if self.importance == RESIDUAL:
            label = f"{anatomy.path}.{name}"
            return residual_scores(weight, statistics, columns, self.damping, label)
        energy = weight.new_zeros(self.units(anatomy))
        for path, owners in units_of_rows(anatomy, self.kind).items():
            rows = product(block.get_submodule(path)).square().sum(1)
            energy.index_add_(0, owners.to(rows.device), rows)
        energy = energy.reshape(len(columns), -1).sum(1)
        return energy + weight.square().sum(0)[columns].sum(1)
