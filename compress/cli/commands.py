"""What the commands of the command line do beyond calling the API: gather, print."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from compress.errors import CompressError
from compress.system.intake import printable
from compress.system.tables import print_table


def evaluate_model(
    source: str,
    *,
    text: str | None,
    split: str,
    subset: str | None,
    window: int | None,
    max_tokens: int,
    documents: bool,
    special_tokens: bool,
    images: str | None,
    samples: int | None,
    tasks: tuple[str, ...],
    limit: int | None,
    against: str | None,
    out: Path | None,
    data_root: Path | None,
    cache_dir: Path | None,
    trust_remote_code: bool,
) -> Any:
    """Evaluate one model and return a report of it (written to ``out`` if given).

    Raises:
        CompressError: nothing to measure quality with, or what the parts raise.
    """
    from compress.data.codebook import load_codebook
    from compress.data.text import TextSpec
    from compress.data.tokens import token_digest
    from compress.eval import EvaluationSpec, evaluate
    from compress.eval.report import (
        DataEntry,
        Report,
        RunInfo,
        environment,
        with_findings,
        write_report,
    )
    from compress.models.sources.source import load_config, load_model, load_tokenizer, resolve
    from compress.planning.evaluation_material import (
        GeneratorMaterial,
        check_objective,
        generator_material,
    )
    from compress.planning.evaluation_text import text_material

    if out is not None and out.exists() and not out.is_dir():
        raise CompressError("a folder for the report (--out)", f"{str(out)!r}, which is none")
    found = resolve(source, cache_dir=cache_dir, trust_remote_code=trust_remote_code)
    tokenizer, reason = load_tokenizer(found.folder, trust_remote_code=trust_remote_code)
    reader = load_codebook(found.folder) if tokenizer is None else tokenizer
    text_spec = None if text is None else TextSpec(source=text, split=split, subset=subset)
    if text_spec is not None and tokenizer is None:
        raise CompressError("a tokenizer beside the weights", reason)
    spec = EvaluationSpec(
        perplexity=None if text_spec is None else text_spec.model_dump(),
        window=window, max_tokens=max_tokens, tasks=tasks, limit=limit,
        packing="documents" if documents else "stream", special_tokens=special_tokens,
        latency=against is not None,
        images=None if images is None else {"source": images},
        **({} if samples is None else {"generator": {"samples": samples}}),
    )  # fmt: skip
    config = load_config(found.folder, trust_remote_code=trust_remote_code)
    material, read, data = GeneratorMaterial(), None, ()
    generates = check_objective(config, spec, reader)
    if text_spec is not None:
        read = text_material(text_spec, spec, config, tokenizer, data_root, generates=generates)
        data = (read.entry(text),)
    if generates:
        material = generator_material(spec, config, reader, read and read.text, data_root)
    if material.images is not None:
        data += (
            DataEntry(
                role="evaluation",
                name=images,
                sha256=token_digest(material.sequences.tokens),
                tokens=material.sequences.tokens.numel(),
                detail=material.images.description,
            ),
        )
    model = load_model(found, trust_remote_code=trust_remote_code)
    baseline = None
    if against is not None:
        baseline = load_model(resolve(against, cache_dir=cache_dir))
    result = evaluate(
        model, tokenizer, spec, tokens=read and read.tokens, documents=read and read.documents,
        bytes_count=read and read.bytes, folder=found.folder,
        baseline=baseline, sequences=material.sequences, judges=material.judges,
        data_root=data_root, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    report = with_findings(
        Report(
            title=Path(source).name,
            run=RunInfo(
                model=found.origin, model_sha256=found.digest, trust_remote_code=trust_remote_code
            ),
            data=data,
            after=result,
            environment=environment(),
        )
    )
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        write_report(report, out)
    return report


def refuse_overwriting(*paths: Path) -> None:
    """Raise a CompressError where one of these files exists: it may be somebody's work."""
    for path in paths:
        if path.exists() or path.is_symlink():
            raise CompressError(
                f"{path} not to exist yet", "a file of that name",
                "Choose another place with --out, or replace it by --overwrite",
            )  # fmt: skip


def compare_runs(paths: list[Path], out: Path) -> None:
    """Print a table of several reports and write the page with the frontier plot."""
    from compress.eval.report import load_report
    from compress.eval.report.compare import compare

    reports = []
    for path in paths:
        file = path / "report.json" if path.is_dir() else path
        if not file.exists():
            raise CompressError(
                "run folders with a report.json, or such files", str(path),
                "Run `compress run` or `compress evaluate --out` first",
            )  # fmt: skip
        reports.append(load_report(file))
    comparison = compare(reports)
    print(comparison.markdown())
    print(f"page  {comparison.write(out)}")


def put_mask(
    masks: Path,
    model: str,
    out: Path,
    any_base: bool,
    cache_dir: Path | None,
    trust_remote_code: bool,
) -> None:
    """Write base weights with a mask applied and say what was masked."""
    from compress.checkpoint.apply_mask import apply_mask

    made = apply_mask(
        masks, model, out,
        any_base=any_base, cache_dir=cache_dir, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    counts = ", ".join(f"{count} linears to {pattern}" for pattern, count in made.patterns.items())
    print(f"model   {out}")
    print(f"masked  {counts}; {made.dense} linears inside blocks have no mask")
    if made.base == "unknown":
        print("note: the mask file does not say which weights it was chosen for")
    elif made.base == "other":
        print("note: the masks were chosen for other weights: evaluate the result")


def print_anatomy(
    source: str, cache_dir: Path | None, trust_remote_code: bool, as_json: bool
) -> None:
    """Print what `compress inspect` found."""
    from compress.api import inspect

    found = inspect(source, cache_dir=cache_dir, trust_remote_code=trust_remote_code)
    if as_json:
        print(json.dumps(found))
        return
    print(
        f"{printable(found['origin'])}: {found['class']} ({found['model_type']}, {found['family']})"
    )
    print(
        f"{found['parameters']:,} parameters, {found['outer_parameters']:,} outside blocks; "
        f"{found['bytes'] / 1e6:,.1f} MB; {found['macs_per_token'] / 1e6:,.1f} M MACs a token"
    )
    rows = []
    for group in _alike(found["blocks"]):
        first = group[0]
        place = first["path"] if len(group) == 1 else f"{first['path']} … ({len(group)} alike)"
        shapes = ", ".join(
            f"{name.rpartition('.')[2]} {shape[0]}x{shape[1]}"
            for site in first["sites"].values()
            for name, shape in site.items()
        )
        heads = f"{first['heads']}/{first['kv_heads']} x {first['head_dim']}"
        rows.append([place, heads, str(first["ffn"]), shapes])
    print_table("blocks", ["path", "heads/kv x dim", "ffn", "linears (out x in)"], rows)
    print_table("methods", ["method", "with default options"],
                [[n, v] for n, v in found["methods"].items()])  # fmt: skip


def _alike(blocks: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Group consecutive blocks of one build."""
    groups: list[list[dict[str, Any]]] = []
    for block in blocks:
        shape = {k: v for k, v in block.items() if k != "path"}
        if groups and {k: v for k, v in groups[-1][-1].items() if k != "path"} == shape:
            groups[-1].append(block)
        else:
            groups.append([block])
    return groups


def print_methods() -> None:
    """Print the names of all methods, those of installed packages too; imports none of them."""
    from compress.methods.catalog import METHODS

    rows = [[name, METHODS.origin(name), METHODS.summary(name)] for name in METHODS]
    print_table("methods (options: compress methods NAME)", ["name", "from", "what it does"], rows)


def print_method(name: str) -> None:
    """Print one method's options from its schema."""
    from compress.methods.catalog import METHODS

    cls = METHODS.get(name)
    print(f"{cls.name}: {cls.summary}")
    print(f"from     {METHODS.origin(name)}")
    print(f"source   {cls.source}")
    print(f"works on {cls.works_on}; needs {cls.needs}")
    print(f"reads    {', '.join(sorted(cls.reads))}; writes {', '.join(sorted(cls.writes))}")
    rows = []
    for option, field in cls.model_fields.items():
        kind = getattr(field.annotation, "__name__", None) or str(field.annotation)
        if field.is_required():
            default = "required"
        elif field.default_factory is not None:
            default = "depends"  # on other options; the meaning says how
        else:
            default = json.dumps(field.default)
        rows.append([option, kind.replace("typing.", ""), default, field.description or ""])
    print_table("options", ["option", "type", "default", "meaning"], rows)


def print_families() -> None:
    """Print the model families that have an entry; others are inferred."""
    from compress.models.families import FAMILIES

    print(", ".join(sorted(FAMILIES)))
    print("Other types work where their blocks can be inferred: try `compress inspect MODEL`.")


def print_recipes() -> None:
    """Print the shipped recipes."""
    import yaml

    from compress.planning.recipe import shipped_recipes

    rows = []
    for name, path in shipped_recipes().items():
        data = yaml.safe_load(path.read_text())
        steps = ", ".join(s["method"] for s in data.get("steps", []))
        model = data["model"]
        if isinstance(model, dict):
            model = model.get("source", "trained by the recipe")
        rows.append([name, model, steps])
    print_table("recipes (compress run NAME)", ["name", "model", "steps"], rows)
