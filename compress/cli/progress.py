"""What a long command says while it works, and what its report says of the command."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from compress.errors import CompressError

if TYPE_CHECKING:
    from compress.system.progress import Progress


def drawn_progress(quiet: bool, verbose: bool) -> Progress:
    """Bars and lines on stderr, as far as they are wanted."""
    from compress.system.progress import Progress

    if quiet and verbose:
        raise CompressError("--quiet or --verbose", "both", "Leave one out")
    return Progress(quiet, verbose=verbose)


def let_libraries_warn(verbose: bool) -> None:
    """Undo, before transformers is imported, what the command line asks of it."""
    if verbose:
        os.environ["TRANSFORMERS_VERBOSITY"] = "warning"


def command_line() -> str:
    """The command line, for reports."""
    return "compress " + " ".join(sys.argv[1:])
