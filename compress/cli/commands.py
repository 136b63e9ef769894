"""What the commands of the command line do beyond calling the API: gather, print."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from compress.cli.output import telling
from compress.system.intake import printable
from compress.system.tables import print_table


def export_model(model: str, to: str, out: Path, **options: Any) -> None:
    """Write a model for another runtime and say what became of its numbers."""
    from compress.engine.exporting import export

    made = export(model, to, out, **options)  # pyrefly: ignore
    with telling(f"the model in {out} is complete"):
        print(f"model   {out}")
        for line in made.told():
            print(line)


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
    with telling(f"the model in {out} is complete"):
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
    from compress.cli.width_bars import uneven, width_bars

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
    if found["active_parameters"] < found["parameters"]:
        print(f"{found['active_parameters']:,} parameters are active: experts that a token passes")
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
    if uneven(found["blocks"]):
        print(width_bars(found["blocks"]))
    print_table("methods", ["method", "with default options"],
                [[n, v] for n, v in found["methods"].items()])  # fmt: skip


def print_similarity(
    source: str,
    text: str,
    samples: int,
    length: int,
    data_root: Path | None,
    cache_dir: Path | None,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Print how alike the hidden states in front of the blocks are, as a heat map."""
    from compress.cli.heat_map import heat_map
    from compress.data.calibration_spec import CalibrationSpec
    from compress.data.text import TextSpec
    from compress.engine.survey import survey_checkpoint
    from compress.methods.depth.similarity import similarity_survey

    spec = CalibrationSpec(text=TextSpec(source=text), samples=samples, length=length)
    rows = survey_checkpoint(
        similarity_survey(lambda matrix, _anatomy: matrix), source, spec,
        data_root=data_root, cache_dir=cache_dir, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    if as_json:
        print(json.dumps({"similarity": rows}))
        return
    print("mean cosine of what enters each block and what enters those before it;")
    print("on the right: the block before it")
    print(heat_map(rows))


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
