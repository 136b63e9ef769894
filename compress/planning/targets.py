"""What a step is done to, as the forecasts count it: sites, shapes, statistics of their inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress.linear.statistics import holds_gram, statistics_bytes
from compress.methods.passes import Effort, Pass, Shapes, Sites, Survey
from compress.methods.questions import sites_of
from compress.models.anatomy import OTHER, Site
from compress.models.outline import BlockOutline, LinearOutline, Outline

if TYPE_CHECKING:
    from compress.data.calibration_spec import CalibrationSpec


@dataclass(frozen=True)
class Statistics:
    """Statistics of the inputs of linears of a site.

    Attributes:
        kind: as methods name it.
        widths: of the inputs that differ: one in a site whose linears share it.
        derivable: for parts of a layer too.
    """

    kind: str
    widths: tuple[int, ...]
    derivable: bool

    @classmethod
    def of(cls, kind: str, site: Site, linears: list[LinearOutline]) -> Statistics:
        widths = tuple(x.in_features for x in linears)
        own = widths if site.kind == OTHER else (max(widths),)
        return cls(kind, own, any(x.layer for x in linears))

    @property
    def bytes(self) -> int:
        return sum(statistics_bytes(self.kind, width, self.derivable) for width in self.widths)

    @property
    def grams(self) -> tuple[int, ...]:
        """Widths of the Gram matrices."""
        return self.widths if holds_gram(self.kind, self.derivable) else ()


@dataclass(frozen=True)
class Target:
    """What is done to a site, (out, in) of the linears there, and what must be known of them."""

    action: Sites
    shapes: Shapes
    statistics: Statistics

    @property
    def effort(self) -> Effort:
        return self.action.work(self.shapes)


def targeted(passes: tuple[Pass, ...], outline: Outline) -> list[Target]:
    found = []
    for action in sites_of(passes):
        for block in outline.blocks:
            for site in block.anatomy.sites:
                linears = [block.linears[name] for name in action.targets(block.anatomy, site)]
                if linears:
                    shapes = [(x.out_features, x.in_features) for x in linears]
                    statistics = Statistics.of(action.statistic(site), site, linears)
                    found.append(Target(action, shapes, statistics))
    return found


def surveyed(survey: Survey, block: BlockOutline) -> list[Statistics]:
    """What a survey collects of a block."""
    return [
        Statistics.of(survey.statistic(site), site, [block.linears[n] for n in site.linears])
        for site in block.anatomy.sites
    ]


def matrices(block: BlockOutline) -> Shapes:
    """(out, in) of all matrices of a block, those that layers are made of among them."""
    return [shape for linear in block.linears.values() for shape in linear.roundable]


def seen(batches: int | None, calibration: CalibrationSpec) -> float:
    """The share of the calibration sequences that a pass over so many batches sees."""
    if batches is None:
        return 1.0
    return min(1.0, batches * calibration.batch / calibration.samples)
