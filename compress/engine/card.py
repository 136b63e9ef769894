"""The model card (README.md) of a result: what was done, what it cost, how to load it.

It says what stays true wherever the model goes: what a clock or this machine's memory has measured
is in the run's report. So the same run writes the same card, whenever and wherever it is resumed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from compress.checkpoint.stock import PREFIX
from compress.eval.cost.size import human_bytes
from compress.eval.report.figures import figure_of
from compress.eval.report.schema import Report
from compress.methods.base import Method
from compress.models.sources.source import Source

NAME = "README.md"
_FORMATS = {
    "perplexity": ("perplexity", "{:.4g}"),
    "bits_per_byte": ("bits per byte", "{:.4f}"),
    "masked_accuracy": ("accuracy at masked tokens", "{:.2%}"),
    "pseudo_perplexity": ("pseudo-perplexity", "{:.4g}"),
    "perplexity_bound": ("bound on perplexity", "{:.4g}"),
    "accuracy": ("accuracy", "{:.2%}"),
    "f1": ("F1", "{:.4f}"),
    "matthews": ("Matthews correlation", "{:.4f}"),
    "spearman": ("Spearman correlation", "{:.4f}"),
    "parameters": ("parameters", "{:,.0f}"),
    "nonzero_parameters": ("parameters that are not zero", "{:,.0f}"),
    "macs_per_token": ("multiply-accumulates a token", "{:,.0f}"),
    "bits_per_weight": ("bits a weight of the blocks", "{:.3g}"),
    "checkpoint_bytes": ("weights on disk", "bytes"),
}
_LOADING_ONNX = """```python
import compress  # pip install onnxruntime

model, tokenizer = compress.load("this folder", runtime="onnx")
ids = tokenizer("Once", return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(ids, max_new_tokens=40)[0]))
```

`model.onnx` and `model.onnx.data` are a graph of onnxruntime's own operators, which any program
that links it can run."""


def model_card(
    name: str,
    source: Source,
    steps: tuple[Method, ...],
    config: Any,
    report: Report | None,
    runtime: str = "torch",
) -> str:
    """A card in the form that hubs read.

    Args:
        name: the recipe's.
        source: the model that the recipe began with.
        config: of the result.
        report: of the run; None where nothing was evaluated.
        runtime: what the folder is for: torch or onnx.
    """
    parts = [
        _front(source, steps, runtime),
        f"# {name}",
        f"Made from {_code(_origin(source))} by compress.",
        "## What was done",
        "\n".join(_step(number, method) for number, method in enumerate(steps, 1)),
    ]
    if report is not None:
        parts += _figures(report)
    loading = _loading(config) if runtime == "torch" else _LOADING_ONNX
    parts += ["## How to load it", loading, "## Licence", _licence(source)]
    return "\n\n".join(parts) + "\n"


def _front(source: Source, steps: tuple[Method, ...], runtime: str) -> str:
    """The YAML that a hub indexes."""
    written = sorted({part for method in steps for part in method.writes})
    library = "transformers" if runtime == "torch" else "onnxruntime"
    fields: dict[str, Any] = {"library_name": library, "tags": ["compress", *written]}
    if source.license:
        fields["license"] = source.license.lower()
    if source.kind == "hub":
        fields["base_model"] = source.origin.partition("@")[0]
    return f"---\n{yaml.safe_dump(fields, sort_keys=True, allow_unicode=True)}---"


def _origin(source: Source) -> str:
    """Where the original came from; of a folder or file its name, not where it lay."""
    return Path(source.origin).name if source.kind in ("folder", "gguf") else source.origin


def _public(name: str) -> str:
    """The name of a data set; of a file not where it lay."""
    return Path(name).name if Path(name).is_absolute() else name


def _step(number: int, method: Method) -> str:
    options = method.model_dump(mode="json", exclude_defaults=True, exclude={"method"})
    told = ", ".join(f"{_code(key)}: {_code(_public(str(v)))}" for key, v in options.items())
    return f"{number}. **{method.name}**: {method.summary}" + (f" ({told})" if told else "")


def _code(value: Any) -> str:
    return "`" + str(value).replace("`", "'").replace("\n", " ") + "`"


def _figures(report: Report) -> list[str]:
    rows = []
    for key, (label, form) in _FORMATS.items():
        after, before = figure_of(report, key), figure_of(report, f"original.{key}")
        if after is not None:
            rows.append(f"| {label} | {_shown(before, form)} | {_shown(after, form)} |")
    for task in sorted(report.after.tasks.tasks if report.after.tasks else ()):
        for metric in sorted(report.after.tasks.tasks[task].metrics):
            key = f"tasks.{task}.{metric}"
            after, before = figure_of(report, key), figure_of(report, f"original.{key}")
            rows.append(f"| {task}, {metric} | {_shown(before, '{:.4f}')} "
                        f"| {_shown(after, '{:.4f}')} |")  # fmt: skip
    read = [f"{d.role}: {_code(_public(d.name))}" for d in report.data]
    parts = [
        "## Figures",
        "\n".join(["| | original | this model |", "| --- | ---: | ---: |", *rows]),
    ]
    if read:
        parts.append("Data: " + "; ".join(read) + ".")
    notes = [note.rstrip(".") + "." for note in report.run.source_notes]
    if notes:
        parts.append("Of the original: " + " ".join(notes))
    return parts


def _shown(value: float | None, form: str) -> str:
    if value is None:
        return ""
    return human_bytes(value) if form == "bytes" else form.format(value)


def _loading(config: Any) -> str:
    fields = config.to_dict()
    own = fields.get("model_type", "").startswith(PREFIX) or fields.get("per_layer_config")
    lines = [
        "```python",
        "import compress" + ("" if own else "  # not needed by plain from_pretrained"),
        "",
        'model, tokenizer = compress.load("this folder or repository")',
        "```",
    ]
    if own:
        told = (
            "Its layers are of the package compress: after `import compress`, plain "
            "`AutoModelFor….from_pretrained` loads it, without it transformers refuses."
        )
    else:
        told = "Plain `AutoModelFor….from_pretrained` of transformers loads it too."
    if fields.get("quantization_config"):
        told += " The weights are stored in the format of compressed-tensors, which vLLM reads."
    return "\n".join([*lines, "", told])


def _licence(source: Source) -> str:
    if source.license:
        return f"The original's: {source.license}."
    return "The original names none here; whoever passes this model on has to know it."
