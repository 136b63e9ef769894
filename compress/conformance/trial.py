"""One step on one tiny model: what it made, and what can be demanded of that."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

import compress
from compress.conformance.changes import changed_kinds, changed_outside
from compress.conformance.interruption import Killed, killed_at
from compress.conformance.tiny import TinyFamily, contents, difference, logits, weights
from compress.errors import CompressError
from compress.linear.matrix import matrix
from compress.methods.base import VALUES, ZEROS, Method
from compress.methods.questions import changes_outer
from compress.models.anatomy import anatomy_of

_LOADED = 1e-4  # relative difference of logits: other kernels, the same function
_STREAMED = {"rtol": 1e-5, "atol": 1e-6}
_NOTICEABLE = 1e-3  # relative difference of logits that a step makes at least
_SIZE = 0.01  # relative error of predicted sizes


class Trial:
    """A step on a tiny model; results that several demands look at are made once.

    Every public method is one demand. It raises a CompressError that says what does not hold, or
    whatever the step itself raises.

    Args:
        method: the step, with options that change a tiny model noticeably.
        tiny: the family to try it on.
        folder: to write to; need not exist.
        first: steps that the model goes through before, for a method that needs something to work
            on; what is demanded is demanded of ``method``.
    """

    def __init__(
        self, method: Method, tiny: TinyFamily, folder: Path, first: tuple[Method, ...] = ()
    ) -> None:
        self.method, self.tiny, self.folder, self.first = method, tiny, folder, first

    def demands(self) -> Iterator[tuple[str, Callable[[], None]]]:
        """All demands on this step, with their names as sentences."""
        yield "it changes what the model computes", self.does_something
        yield "it changes what it declares", self.changes_what_it_declares
        yield "a saved checkpoint is the model in memory", self.saved_checkpoint_is_the_model
        yield "a streamed run gives what compress.apply gives", self.streamed_equals_live
        yield "the plan predicts what is written", self.predicts_sizes
        yield "the same seed gives the same bytes", self.same_seed_same_bytes
        yield "an interrupted run ends with the same bytes", self.interrupted_run_resumes

    @property
    def _calibrated(self) -> bool:
        # Methods that need no data must do without.
        return self.method.needs != "nothing"

    @cached_property
    def live(self) -> PreTrainedModel:
        """The model in memory after the step."""
        return self._applied((*self.first, self.method), self.tiny.model())

    @cached_property
    def entering(self) -> PreTrainedModel:
        """The model in memory that enters the step."""
        model = self.tiny.model()
        return self._applied(self.first, model) if self.first else model

    def _applied(self, steps: tuple[Method, ...], model: PreTrainedModel) -> PreTrainedModel:
        batches = self.tiny.batches if self._calibrated else None
        return compress.apply(model, list(steps), batches, compute="float32")

    @cached_property
    def saved(self) -> Path:
        """The checkpoint of :attr:`live`."""
        return compress.save(self.live, self.folder / "saved")

    @property
    def recipe(self) -> dict[str, Any]:
        return self.tiny.recipe([*self.first, self.method], self._calibrated)

    @cached_property
    def run(self) -> Path:
        """The folder of a run of the step on the saved model."""
        return compress.run(self.recipe, self.folder / "run").folder

    def does_something(self) -> None:
        after = logits(self.live)
        if not bool(torch.isfinite(after).all()):
            raise CompressError("finite logits after the step", "NaN or infinite ones")
        found = difference(after, logits(self.entering) if self.first else self.tiny.logits)
        if found <= _NOTICEABLE:
            raise CompressError(
                "logits that differ after the step",
                f"a relative difference of {found:.1e}",
                "Give options that compress a model of three blocks of width 32",
            )

    def changes_what_it_declares(self) -> None:
        """Compares what the step says it makes with what differs in the live model, and the rest
        with what was."""
        before = self.entering
        found, declared = changed_kinds(before, self.live), self.method.makes()
        if found - declared:
            raise CompressError(
                f"no change but of {_listed(declared)}, as `writes` says",
                f"changed {_listed(found)}",
                "Declare them in `writes`: the orders that a plan refuses follow from it",
            )
        # Values are not always told apart, and a step may leave them alone with some options.
        if declared - found - {VALUES}:
            raise CompressError(
                f"a change of {_listed(declared)}, as `writes` says",
                f"changed {_listed(found)}",
                "Declare what the method changes, or give options with which it does",
            )
        outside = changed_outside(before, self.live)
        if outside and not changes_outer(self.method.passes()):
            raise CompressError(
                "nothing changed outside the blocks, since no pass has an `outer`",
                _listed(outside),
            )

    def saved_checkpoint_is_the_model(self) -> None:
        found = difference(logits(self.tiny.load(self.saved)), logits(self.live))
        if not found < _LOADED:
            raise CompressError(
                "logits of the loaded checkpoint that are those of the model in memory",
                f"a relative difference of {found:.1e}",
            )

    def streamed_equals_live(self) -> None:
        live, streamed = weights(self.saved), weights(self.run / "model")
        if live.keys() != streamed.keys():
            raise CompressError(
                "the same tensors from a run as from compress.apply",
                f"{_listed(live.keys() ^ streamed.keys())} in one of them only",
            )
        for name, tensor in live.items():
            other = streamed[name]
            same = tensor.shape == other.shape and tensor.dtype == other.dtype
            if not same or not torch.allclose(tensor, other, **_STREAMED):
                raise CompressError(
                    f"the same {name} from a run as from compress.apply",
                    f"{_told(other)} and {_told(tensor)}"
                    + (f", {difference(other.float(), tensor.float()):.1e} apart" if same else ""),
                    "A method must keep no state and look at nothing but what it is given",
                )

    def predicts_sizes(self) -> None:
        """Parameters exactly, or as nearly as the method says; bytes, and nonzero weights where
        zeros are made, within 1 %."""
        expected = compress.plan(self.recipe).result
        written = weights(self.run / "model")
        parameters = compress.inspect(self.run / "model")["parameters"]
        if abs(parameters - expected.parameters) > self.method.approximate * expected.parameters:
            raise CompressError(
                f"{expected.parameters:,} parameters, as `predict` says", f"{parameters:,}"
            )
        # The shapes of packed weights, two numbers a linear, are in no plan.
        stored = sum(t.nbytes for n, t in written.items() if not n.endswith("weight_shape"))
        if abs(stored - expected.bytes) > _SIZE * expected.bytes:
            raise CompressError(f"{expected.bytes:,} bytes, as `predict` says", f"{stored:,}")
        if ZEROS not in self.method.writes:
            return
        nonzero = sum(int(tensor.count_nonzero()) for tensor in written.values())
        if abs(nonzero - expected.nonzero) > _SIZE * expected.nonzero:
            raise CompressError(
                f"{expected.nonzero:,} weights that are not zero, as `predict` says",
                f"{nonzero:,}",
            )

    def same_seed_same_bytes(self) -> None:
        again = compress.run(self.recipe, self.folder / "again").folder
        self._same_bytes(again, "a second run")

    def interrupted_run_resumes(self) -> None:
        """Dies before its third journal event, and again after the second one from there; where
        other steps come first, also amidst the events that follow on them."""
        folder = self.folder / "killed"
        deaths = [(3, False), (2, True)]
        if self.first:
            deaths += [(2, False)] * (len(_events(self.run)) // 2)
        for number, written in deaths:
            with killed_at(number, written), suppress(Killed):
                compress.run(self.recipe, folder)
        compress.run(self.recipe, folder)
        self._same_bytes(folder, "a run that was interrupted twice")
        then, now = (len(_events(path)) for path in (self.run, folder))
        if then != now:
            raise CompressError(f"{then} events in the journal of {folder}", str(now))

    def _same_bytes(self, folder: Path, what: str) -> None:
        one, other = contents(self.run / "model"), contents(folder / "model")
        differing = [n for n in sorted(one.keys() | other.keys()) if one.get(n) != other.get(n)]
        if differing:
            raise CompressError(
                f"the same bytes from {what}", f"others in {_listed(differing)}",
                "Draw everything random from the seed, and keep no state between blocks",
            )  # fmt: skip

    def idles(
        self, idle: Method, tolerance: float = 0.0, prepare: Callable[[Any], None] | None = None
    ) -> None:
        """Options with which there is nothing to do change nothing.

        Args:
            tolerance: largest relative difference of logits.
            prepare: called with the model first, to make it one on which there is nothing to do.
        """
        model = self.tiny.model()
        if prepare is not None:
            prepare(model)
        before = logits(model)
        found = difference(logits(self._applied((idle,), model)), before)
        if not found <= tolerance:
            raise CompressError(
                f"logits within {tolerance:g} of those before with {_options(idle)}",
                f"a relative difference of {found:.1e}",
            )


@torch.no_grad()
def lower_rank(model: PreTrainedModel, rank: int) -> None:
    """Give all linears in blocks a low rank, so that a factorisation loses nothing."""
    for block in anatomy_of(model).blocks:
        for name in block.linears:
            weight = matrix(model.get_submodule(f"{block.path}.{name}"))
            left, values, right = torch.linalg.svd(weight, full_matrices=False)
            weight.copy_(left[:, :rank] * values[:rank] @ right[:rank])


def _events(folder: Path) -> list[Any]:
    lines = (folder / "journal.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def _options(method: Method) -> str:
    return json.dumps(method.model_dump(mode="json", exclude_defaults=True))


def _told(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _listed(names: Any) -> str:
    names = sorted(names)
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more if names else "nothing"
