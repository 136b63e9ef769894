"""Arguments and options that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from compress.cli.completion import recipe_names

RecipeArgument = Annotated[
    str,
    typer.Argument(
        help="Recipe file, or the name of a shipped recipe.", autocompletion=recipe_names
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override a field: --set steps.0.sparsity=0.6 (repeatable)."),
]
DataRootOption = Annotated[
    Path | None,
    typer.Option("--data-root", help="Folder with local copies of data sets (docs/data.md)."),
]
CacheOption = Annotated[
    Path | None,
    typer.Option("--cache-dir", help="Folder for fetched models and measured figures."),
]
MemoryOption = Annotated[
    str | None,
    typer.Option("--max-memory", help="Resident memory that may be used: 2GB, 512MB ..."),
]
OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", help="Replace what an earlier call wrote there.")
]
DeviceOption = Annotated[
    str | None,
    typer.Option("--device", help="In the place of the recipe's: auto, cpu, cuda, cuda:0 ..."),
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
VerboseOption = Annotated[
    bool,
    typer.Option(
        "--verbose", "-v", help="A line for every unit of work, and warnings of the libraries."
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
TrustOption = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that comes with the checkpoint.")
]
