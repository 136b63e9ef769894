"""The command line. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compress.cli import errors, results, shows
from compress.cli.arguments import (
    CacheOption,
    DataRootOption,
    DeviceOption,
    JsonOption,
    MemoryOption,
    QuietOption,
    RecipeArgument,
    SetOption,
    VerboseOption,
)
from compress.cli.evaluation import evaluate
from compress.cli.output import OutputLost, guarded_stdout, size, telling
from compress.cli.progress import command_line, drawn_progress, let_libraries_warn
from compress.errors import CompressError
from compress.system.intake import printable, user_path
from compress.system.signals import Stopped, stoppable
from compress.system.version import DISTRIBUTION, VERSION

if TYPE_CHECKING:
    from compress.engine.runner import RunResult

app = typer.Typer(
    name="compress",
    help="Make a trained transformer smaller and tell what that cost.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"{DISTRIBUTION} {VERSION}")
        raise typer.Exit()


@app.callback()
def options(
    _version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Show the version and leave."
        ),
    ] = False,
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Show where in the code an error came from.")
    ] = False,
) -> None:
    """Make a trained transformer smaller and tell what that cost."""
    global _show_traceback
    _show_traceback = traceback


_show_traceback = False


@app.command()
def run(
    recipe: RecipeArgument,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The run's folder (default runs/NAME).")
    ] = None,
    overrides: SetOption = None,
    data_root: DataRootOption = None,
    max_memory: MemoryOption = None,
    cache_dir: CacheOption = None,
    device: DeviceOption = None,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
    as_json: JsonOption = False,
) -> None:
    """Compress, verify, evaluate, report. The same command again resumes an interrupted run."""
    from compress.planning.recipe_files import read_data

    data, path = read_data(recipe, overrides)  # what follows takes seconds to import
    if device is not None:
        data["device"] = device
    let_libraries_warn(verbose)

    from compress.engine.runner import run as carry_out
    from compress.planning.recipe import parse_recipe, parse_size
    from compress.system import processes

    follows = processes.launched().rank > 0
    parsed = parse_recipe(data, str(path), folder=path.parent)
    folder = _default_folder(parsed.name) if out is None else user_path(out, "a folder as --out")
    with _telling_what_is_kept(folder), drawn_progress(quiet or follows, verbose) as progress:
        result = carry_out(
            parsed,
            folder,
            data_root=data_root,
            max_memory=parse_size(max_memory) if max_memory is not None else None,
            cache_dir=cache_dir,
            progress=progress,
            command=command_line(),
        )
    if follows:
        return
    with telling(f"the run in {result.folder} is complete"):
        if as_json:
            print(json.dumps(_run_data(result)))
            return
        if result.report is not None:
            from compress.eval.report import print_report

            print_report(result.report)
            print(f"report  {result.folder / 'report.html'}")
        if parsed.steps:
            print(f"model   {result.model}")
        for runtime, place in result.exports.items():
            print(f"{runtime:<7} {place}")


@app.command()
def plan(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    data_root: DataRootOption = None,
    max_memory: MemoryOption = None,
    cache_dir: CacheOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check a recipe and predict size, memory and time. Reads no weights."""
    from compress.planning.recipe_files import read_data

    data, path = read_data(recipe, overrides)  # what follows takes seconds to import
    if device is not None:
        data["device"] = device

    from compress.planning.planner import describe
    from compress.planning.planner import plan as make_plan
    from compress.planning.recipe import parse_recipe, parse_size

    made = make_plan(
        parse_recipe(data, str(path), folder=path.parent),
        max_memory=parse_size(max_memory) if max_memory is not None else None,
        cache_dir=cache_dir,
        data_root=data_root,
    )
    rows = describe(made)
    if as_json:
        print(json.dumps({"steps": rows, "warnings": list(made.warnings),
                          "evaluation_bytes": made.evaluation_bytes}))  # fmt: skip
        return
    from compress.system.tables import print_table

    print_table(
        f"{made.recipe.name}: {made.source.origin}",
        ["step", "parameters", "non-zero", "size", "bits/weight", "MACs/token", "peak RAM", "time"],
        [
            [
                r["step"],
                f"{r['parameters']:,}",
                f"{r['nonzero']:,}",
                size(r["bytes"]),
                f"{r['effective_bits']:.2f}",
                f"{r['macs_per_token'] / 1e6:,.1f} M",
                size(r["peak_bytes"]) if r["peak_bytes"] else "",
                f"{r['seconds']:.0f} s" if r["seconds"] is not None else "",
            ]
            for r in rows
        ],
        right=range(1, 8),
    )
    if made.evaluation_bytes:
        print(f"evaluation: about {size(made.evaluation_bytes)} of memory")
    if made.steps:
        print(f"disk: {size(made.disk_bytes)}")
    for warning in made.warnings:
        print(f"note: {warning}")


app.command()(evaluate)
app.command()(results.compare)
app.command("apply-mask")(results.apply_mask)
for command in (
    results.materialize, results.export, results.push, shows.inspect, shows.methods, shows.recipes,
):  # fmt: skip
    app.command()(command)


def _run_data(result: RunResult) -> dict[str, Any]:
    """What a run left, as JSON."""
    report = result.report and result.report.model_dump(mode="json")
    return {
        "folder": str(result.folder), "model": str(result.model), "seconds": result.seconds,
        "peak_bytes": result.peak_bytes, "report": report,
        "exports": {runtime: str(place) for runtime, place in result.exports.items()},
    }  # fmt: skip


@contextmanager
def _telling_what_is_kept(folder: Path) -> Iterator[None]:
    """Let a signal that ends a run say what is kept of it."""
    try:
        yield
    except Stopped as stop:
        from compress.engine.runner import kept

        stop.kept = kept(folder)
        raise


def _default_folder(name: str) -> Path:
    """The folder below runs/ that a recipe's name stands for."""
    parts = Path(name).parts
    if Path(name).is_absolute() or ".." in parts or not parts or printable(name) != name:
        raise CompressError(
            "a name in the recipe that a folder below runs/ can have", repr(name),
            "Change the name, or say where with --out",
        )  # fmt: skip
    return user_path(Path("runs") / name, "a recipe's name that can be a folder's")


def main(arguments: list[str] | None = None) -> Any:
    """Entry point: errors of the user are one paragraph on stderr and exit status 2.

    Output that is lost on its way ends with 1 and a line about what is done, or as a closed pipe
    ends a command: without a word.
    """
    # Libraries underneath draw bars of their own; ours tell what matters.
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # names in letters that the terminal does not have
            stream.reconfigure(errors="backslashreplace")
    try:
        with stoppable(), guarded_stdout():
            return app(args=arguments, prog_name="compress")
    except OutputLost as lost:
        if not lost.silent:
            errors.tell(f"error: {printable(str(lost))}.")
        sys.exit(lost.status)
    except Exception as error:
        if _show_traceback:
            raise
        sys.exit(errors.report(error))
    except Stopped as stop:
        errors.tell(str(stop))
        sys.exit(stop.status)


if __name__ == "__main__":
    main()
