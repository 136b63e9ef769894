"""lm-eval tasks on a model in memory: causal ones by lm-eval itself, masked ones by our class."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import math
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from compress.errors import CompressError
from compress.eval.quality.local_tasks import local_tasks, resolve
from compress.eval.quality.task_names import unknown_task
from compress.eval.quality.user_tasks import UserTasks, user_tasks
from compress.models.kind import kind_of, require_causal

WHERE = "lm-eval tasks"
HUB_TIMEOUT = 5.0  # seconds; the hub's client itself would retry for half a minute
BOOTSTRAP = 1000  # draws for the standard errors that have no closed form


class Metric(BaseModel):
    """One number of a task."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    value: float
    stderr: float | None = Field(description="standard error, or None where lm-eval gives none")
    higher_is_better: bool


class TaskResult(BaseModel):
    """One lm-eval task."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    metrics: dict[str, Metric]
    samples: int = Field(description="documents scored")
    num_fewshot: int
    version: str = Field(description="lm-eval's version of the task")
    source: str = Field(
        description='"data root", "hub", or "your files" for a task of the user\'s own'
    )
    files: dict[str, str] = Field(
        description="data file below the data root, or file of the user's by its path from the "
        "folder of the task's YAML -> sha256"
    )


class TasksResult(BaseModel):
    """What :func:`run_tasks` measured, and how."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tasks: dict[str, TaskResult]
    limit: int | None = Field(description="documents per task, or None for all")
    batch_size: int
    lm_eval: str = Field(description="version of lm-eval")
    score: Literal["causal", "bound", "pll"] = Field(
        default="causal", description="what the log-likelihood of an answer is"
    )


class TaskSpec(BaseModel):
    """How a masked model scores the answers of lm-eval tasks."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    score: Literal["bound", "pll"] = Field(
        default="bound",
        description="the likelihood bound, or the pseudo-log-likelihood (each token masked alone)",
    )
    draws: int = Field(default=16, ge=1, description="masks an answer, for the bound")
    seed: int = Field(default=0, description="of the masks")


def run_tasks(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 1,
    include_path: Sequence[str] = (),
    data_root: str | Path | None = None,
    masked: TaskSpec | None = None,
    special_tokens: bool = True,
) -> TasksResult:
    """Run lm-eval tasks on a model in memory.

    Tasks of the user's own come first. With a data root, the tasks in ``eval/tasks`` read their
    data from it, with lm-eval's own prompts; every other task comes from lm-eval's index, whose
    data are on the hub.

    Args:
        model: a causal ``PreTrainedModel``, or a masked one.
        tokenizer: its tokenizer.
        tasks: names, of groups and tags too, or YAML files with tasks of the user's own.
        limit: documents per task.
        num_fewshot: examples in the prompt; None takes the task's own.
        batch_size: requests per forward.
        include_path: folders with tasks of the user's own.
        data_root: folder with one sub-folder per data set.
        masked: how a masked model scores answers.
        special_tokens: begin each prompt with what the tokenizer adds (BOS), or put a masked
            model's [CLS] and [SEP] around it.

    Raises:
        CompressError: neither a causal nor a masked model, an unknown task, one of the user's that
            lm-eval cannot load, missing data, a hub out of reach.
    """
    if kind_of(model) != "masked":
        require_causal(model, WHERE)
    if tokenizer is None:
        raise CompressError("a tokenizer", "none", "Tasks are texts; give the model's tokenizer")
    import lm_eval

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    own = user_tasks(tasks, include_path)
    training = model.training
    harness, score = _harness(model, tokenizer, batch_size, masked or TaskSpec(), special_tokens)
    with own.searched() as folders:
        specs, manager, digests = _specs(
            own.resolved(tasks), own, folders, Path(data_root) if data_root else None
        )
        try:
            # It prints of its bootstrap; standard output is for what a command was asked for.
            with contextlib.redirect_stdout(io.StringIO()), _no_more_processes():
                results = lm_eval.simple_evaluate(
                    model=harness,
                    tasks=specs,
                    num_fewshot=num_fewshot,
                    limit=limit,
                    bootstrap_iters=BOOTSTRAP,
                    log_samples=False,
                    task_manager=manager,
                )
        finally:
            model.train(training)
    return TasksResult(
        tasks={name: _task(name, results, digests, own) for name in results["results"]},
        limit=limit,
        batch_size=batch_size,
        lm_eval=version("lm_eval"),
        score=score,
    )


@contextlib.contextmanager
def _no_more_processes() -> Iterator[None]:
    """Let lm-eval draw its bootstrap here, with the same numbers.

    It would fork a pool of processes, for the one chunk that :data:`BOOTSTRAP` is, from a process
    that has threads: some of those pools never end.
    """
    name, before = "DISABLE_MULTIPROC", os.environ.get("DISABLE_MULTIPROC")
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def task_data(
    tasks: Sequence[str], data_root: str | Path | None
) -> dict[str, dict[str, str]] | None:
    """Digests of everything that the tasks read: task -> file below the data root -> sha256.

    None where a task's data come from the hub: what it holds there can change.

    Raises:
        CompressError: a data file is missing.
    """
    local = local_tasks()
    if data_root is None or any(name not in local for name in tasks):
        return None
    return {name: resolve(local[name], Path(data_root), name)[1] for name in tasks}


def _harness(
    model: nn.Module, tokenizer: Any, batch_size: int, masked: TaskSpec, special_tokens: bool
) -> Any:
    """lm-eval's model around ours, and what its log-likelihoods are."""
    if kind_of(model) == "masked":
        from compress.eval.quality.masked_lm import MaskedLM

        options = masked.model_dump()
        harness = MaskedLM(model, tokenizer, batch_size=max(batch_size, 16), **options)
        if not special_tokens:
            harness.spec = harness.spec.without_frame()
        return harness, masked.score
    from compress.eval.quality.causal_lm import CausalLM

    causal = CausalLM(
        pretrained=model, backend="causal", tokenizer=tokenizer, batch_size=batch_size,
        # None: what the tokenizer does by itself. True would force a post-processor on.
        add_bos_token=None if special_tokens else False,
    )  # fmt: skip
    return causal, "causal"


def _specs(
    tasks: Sequence[str], own: UserTasks, folders: tuple[Path, ...], data_root: Path | None
) -> tuple[list[Any], Any, dict[str, dict[str, str]]]:
    """Return lm-eval's task specifications, a manager that knows them, and digests by task."""
    local = local_tasks() if data_root else {}
    if data_root and not data_root.is_dir():
        raise CompressError("a folder as --data-root", str(data_root), where=WHERE)
    specs: list[Any] = []
    digests: dict[str, dict[str, str]] = {}
    for name in tasks:
        if name in local and name not in own.names:
            config, files = resolve(local[name], data_root, name)
            digests[config["task"]] = files
            specs.append(config)
        else:
            specs.append(name)
    users = [name for name in specs if isinstance(name, str) and name in own.names]
    elsewhere = [name for name in specs if isinstance(name, str) and name not in own.names]
    on_hub = [name for name in users if name in own.found and own.found[name].needs_hub]
    if elsewhere or on_hub:
        _require_hub([*elsewhere, *on_hub])  # before the index, which takes ten seconds to build
    manager = _manager(bool(elsewhere), folders if own.found else ())
    known = manager.all_tasks
    for name in elsewhere:
        if name not in known:
            raise unknown_task(name, known)
    if users:
        _try_out(users, manager)
    return specs, manager, digests


def _manager(include_defaults: bool, folders: tuple[Path, ...]) -> Any:
    """An index of tasks; lm-eval's own takes ten seconds, so it is read where it is needed."""
    if not folders:
        return _known(include_defaults)
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=list(folders), include_defaults=include_defaults)


@functools.lru_cache(maxsize=2)
def _known(include_defaults: bool) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=include_defaults)


def _try_out(names: Sequence[str], manager: Any) -> None:
    """Build one request of each task of the user's: lm-eval tells what is wrong with its file.

    Raises:
        CompressError: a file, data or templates that do not work.
    """
    for name in names:
        try:
            for task in manager.load([name])["tasks"].values():
                task.build_all_requests(limit=1, rank=0, world_size=1)
        except Exception as error:  # the file may name any function, template or data set
            told = " ".join(str(error).split())[:300]
            raise CompressError(
                f"the task {name!r} to work in lm-eval", f"{type(error).__name__}: {told}",
                "Correct its YAML file (lm-eval's documentation: New Task Guide)", where=WHERE,
            ) from error  # fmt: skip


def _require_hub(tasks: Sequence[str]) -> None:
    """Fail within seconds where the data of ``tasks`` cannot be fetched."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return  # the user promises that everything is cached
    try:
        urllib.request.urlopen(constants.ENDPOINT, timeout=HUB_TIMEOUT).close()
    except urllib.error.HTTPError:
        return  # it answered
    except OSError as error:
        raise CompressError(
            f"the data of {', '.join(tasks)} from the hub",
            f"no answer from {constants.ENDPOINT} ({error})",
            "Give --data-root with a local copy (tasks with one: "
            f"{', '.join(sorted(local_tasks()))}), or set HF_HUB_OFFLINE=1 if the data are cached",
            where=WHERE,
        ) from None


def _task(
    name: str, results: dict[str, Any], digests: dict[str, dict[str, str]], own: UserTasks
) -> TaskResult:
    better = results.get("higher_is_better", {}).get(name, {})
    metrics = {}
    for key, value in results["results"][name].items():
        metric, _, filter_name = key.partition(",")
        if not filter_name or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = results["results"][name].get(f"{metric}_stderr,{filter_name}")
        if math.isnan(value):
            raise CompressError(
                f"a number for {metric}", "NaN", "The model's logits are broken", where=name
            )
        shown = metric if filter_name == "none" else f"{metric} ({filter_name})"
        metrics[shown] = Metric(
            value=min(float(value), sys.float_info.max),  # JSON has no infinity
            stderr=float(error) if isinstance(error, float) and math.isfinite(error) else None,
            higher_is_better=bool(better.get(metric, True)),
        )
    return TaskResult(
        metrics=metrics,
        samples=results.get("n-samples", {}).get(name, {}).get("effective", 0),
        num_fewshot=int(results.get("n-shot", {}).get(name, 0) or 0),
        version=str(results.get("versions", {}).get(name, "")),
        source="data root" if name in digests else "your files" if name in own.found else "hub",
        files=own.found[name].digests() if name in own.found else digests.get(name, {}),
    )
