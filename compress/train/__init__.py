"""Training: one loop for everything that learns by gradients."""

from compress.train.loop import LossFunction, TrainingResult, fit
from compress.train.moment import Moment
from compress.train.options import TrainingOptions, learning_rate
from compress.train.source import BatchSource, TokenSource

__all__ = [
    "BatchSource",
    "LossFunction",
    "Moment",
    "TokenSource",
    "TrainingOptions",
    "TrainingResult",
    "fit",
    "learning_rate",
]
