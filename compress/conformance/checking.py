"""The check that a method's author calls."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from transformers.utils import logging

from compress.checkpoint.fresh import kept_process
from compress.conformance.models import TINY
from compress.conformance.tiny import TinyFamily
from compress.conformance.trial import Trial
from compress.errors import CompressError, did_you_mean
from compress.methods.base import MODULES, WIDTH, Method
from compress.methods.contract import check_class
from compress.system.threads import threads

FAMILIES = ("llama", "bert", "gpt2")


def check(
    method: type[Method],
    options: dict[str, Any] | None = None,
    families: Sequence[str] = FAMILIES,
    *,
    idle: dict[str, Any] | None = None,
    tolerance: float = 0.0,
    first: Sequence[Method] = (),
) -> None:
    """Try a method on tiny random models and raise an error for the first thing that is wrong.

    Options are documented and survive a recipe; the plan predicts what is written; a streamed run
    gives what ``compress.apply`` gives, a second run the same bytes, and so does one that was
    interrupted; the checkpoint loads through transformers' auto classes with the same logits; what
    changes is what ``writes`` declares; and with ``idle`` nothing happens. The class need not be
    registered. The CPU does it, in a few seconds a family; nothing is fetched.

    Args:
        method: the class.
        options: with which it compresses a model of three blocks, width 32, FFN 64, 4 heads,
            noticeably; by default the class's ``example``.
        families: model types of :data:`compress.conformance.models.TINY`.
        idle: options with which it has nothing to do, where it can express that.
        tolerance: largest relative difference of logits that ``idle`` may cause.
        first: steps that the model goes through before, for a method that needs something to work
            on, such as a loss to make good; not before ``idle``.

    Raises:
        CompressError: naming the method, the family and what does not hold.
        Exception: whatever the method raises, with a note of where that was.
    """
    check_options(method, options, idle)
    step = method(**(method.example if options is None else options))
    for family in families:
        if family not in TINY:
            raise CompressError(
                "families that there are tiny models of", repr(family),
                did_you_mean(family, list(TINY)),
            )  # fmt: skip
    quiet = None if idle is None else method(**idle)
    # Whatever gets classes of ours is proved in a clean interpreter: one for all, it takes seconds.
    proofs = kept_process() if method.writes & {WIDTH, MODULES} else nullcontext()
    with (
        tempfile.TemporaryDirectory(prefix="compress-conformance-") as folder,
        torch.random.fork_rng(devices=[]),
        _quiet_and_single(),
        proofs,
    ):
        for family in families:
            tiny = TinyFamily(family, Path(folder) / family)
            trial = Trial(step, tiny, Path(folder) / f"{family}-{step.name}", tuple(first))
            demands = list(trial.demands())
            if quiet is not None:
                idles = partial(trial.idles, quiet, tolerance)
                demands.append(("with nothing to do it does nothing", idles))
            for sentence, demand in demands:
                where = f"{step.name} on {family}, {sentence}"
                try:
                    demand()
                except CompressError as error:
                    raise error.within(where) from error
                except Exception as error:
                    error.add_note(f"while checking {where}")
                    raise


@contextmanager
def _quiet_and_single() -> Iterator[None]:
    """Without a progress bar for each of some dozens of tiny checkpoints, which would tell nobody
    anything, and on one thread: tiny models gain nothing from more and wait for them."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with threads(1):
            yield
    finally:
        if shown:
            logging.enable_progress_bar()


def check_options(method: type[Method], *given: dict[str, Any] | None) -> None:
    """Check what a class says of itself and of its options; no model is touched.

    Args:
        given: options to try beside the class's ``example``; None counts for nothing.

    Raises:
        CompressError: an incomplete class, an option without a description, options that are not
            valid, that change on the way through a recipe, or a misspelled one that is taken.
    """
    check_class(method)
    where = f"{method.name}, options"
    for option, field in method.model_fields.items():
        if not (field.description or "").strip():
            raise CompressError(
                f"a description of the option {option}", "none",
                f'Declare it as {option}: TYPE = Field(DEFAULT, description="...")', where=where,
            )  # fmt: skip
    for options in (*given, method.example):
        if options is None:
            continue
        try:
            made = method(**options)
        except ValidationError as error:
            raise CompressError(
                "valid options", f"{options!r}: {error.errors()[0]['msg']}", where=where
            ) from error
        again = method.model_validate(made.model_dump(mode="json"))
        if again != made:
            raise CompressError(
                "options that are the same after a recipe has been written and read",
                f"{again!r} instead of {made!r}", where=where,
            )  # fmt: skip
        try:
            method.model_validate({**options, "no_such_option": 1})
        except ValidationError:
            continue
        raise CompressError(
            "unknown options to be refused", "one called no_such_option that was taken",
            'Leave `extra="forbid"` in the class\'s model_config', where=where,
        )  # fmt: skip
