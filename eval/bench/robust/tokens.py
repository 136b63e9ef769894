"""Special tokens: reported figures beside a plain computation, and what calibration with them buys.

Two small models are trained by recipes on short documents that say each word twice: a GPT-2 whose
tokenizer puts BOS in front of every text, and a BERT whose tokenizer puts [CLS] and [SEP] around
it. Both count places from where a document begins, so they lean on what stands there. The plain
computations below use transformers, torch and the tokenizer alone.
"""

from __future__ import annotations

import json
import math
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from compress.eval.bench.options import say
from compress.eval.bench.rows import Row
from compress.eval.bench.runs import run_once, write_recipe
from compress.eval.report import load_report

COMMAND = "python -m compress.eval.bench.robust --only tokens"
_SAME = 1e-4  # relative difference of figures that are equal
_LENGTH = 13  # tokens of a document of the causal model, abcdef:abcdef
_FRACTION, _SEED = 0.15, 0  # of masked tokens, as the evaluation's defaults are
_LETTERS = "abcdefghijklmnopqrstuvwxyz:"
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[BOS]")


def measure(work: Path, arguments: Namespace) -> list[Row]:
    """Rows of both models."""
    return [*_causal(work, arguments.smoke), *_masked(work, arguments.smoke)]


def _row(figure: str, value: float, bar: float | None = None) -> Row:
    return Row(
        figure=f"special tokens: {figure}", value=value, unit="", op="<=", bar=bar, peer=None,
        command=COMMAND,
    )  # fmt: skip


# The causal model.


def _causal(work: Path, smoke: bool) -> list[Row]:
    start, train, test = work / "causal-start", work / "same.jsonl", work / "same-test.jsonl"
    if not start.exists():
        _save_causal(start)
        _write_documents(train, 4000, seed=1, longer=False)
        _write_documents(test, 400, seed=2, longer=False)
    training = {"steps": 3 if smoke else 1000, "batch": 32, "learning_rate": 2e-3,
                "final_ratio": 0.1, "precision": "float32", "checkpoint_every": 200}  # fmt: skip
    base = _run(work, "causal-base", model={"train": {
        "from": str(start), "text": {"source": str(train)}, "packing": "documents",
        "length": _LENGTH + 1, "training": training,
    }}) / "base"  # fmt: skip
    found: dict[str, Any] = {}
    for name, calibrated, evaluated in (
        ("with", True, True), ("without", False, True), ("told without", False, False),
    ):  # fmt: skip
        # Documents joined by nothing, in windows of their length: the same text with and without.
        found[name] = _report(_run(
            work, f"causal-{name.replace(' ', '-')}", model=str(base),
            calibration={"text": {"source": str(train), "join": ""}, "samples": 256,
                         "length": _LENGTH + calibrated, "special_tokens": calibrated},
            steps=[{"method": "sparsegpt", "pattern": "2:4"}],
            evaluation={"text": {"source": str(test), "join": ""}, "window": _LENGTH,
                        "special_tokens": evaluated, "latency": False, "memory": False},
        ))  # fmt: skip
    dense = found["with"].before.perplexity.perplexity
    plain = _plain_perplexity(base, test)
    label = "GPT-2 trained with BOS"
    bare = found["told without"].before.perplexity.perplexity
    pruned = {name: result.after.perplexity.perplexity for name, result in found.items()}
    say(f"causal: {dense:.4f} reported, {plain:.4f} plain, {bare:.4f} without BOS; {pruned}")
    return [
        _row(f"{label}: perplexity, relative difference from a plain computation",
             abs(dense / plain - 1), _SAME),
        _row(f"{label}: perplexity", dense),
        _row(f"{label}: perplexity, without BOS / with it", bare / dense),
        _row(f"{label}, SparseGPT 2:4: perplexity, calibrated with BOS / without it",
             pruned["with"] / pruned["without"], 1.0),
    ]  # fmt: skip


def _save_causal(folder: Path) -> None:
    """A GPT-2 with random weights, and a tokenizer of letters that adds BOS."""
    torch.manual_seed(0)
    bos = _SPECIAL.index("[BOS]")
    config = GPT2Config(
        vocab_size=len(_SPECIAL) + len(_LETTERS), n_embd=64, n_layer=2, n_head=4,
        n_positions=32, bos_token_id=bos, eos_token_id=bos, initializer_range=0.1,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder)
    _tokenizer("[BOS] $A").save_pretrained(folder)


def _plain_perplexity(folder: Path, test: Path) -> float:
    """BOS, a document, the next letters: by the model's own forward."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    total, count = 0.0, 0
    for line in test.read_text("utf-8").splitlines():
        ids = tokenizer(json.loads(line)["text"])["input_ids"]
        with torch.no_grad():
            logs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        # What BOS says of the first letter does not count.
        total -= sum(float(logs[i, ids[i + 1]]) for i in range(1, len(ids) - 1))
        count += len(ids) - 2
    return math.exp(total / count)


# The masked model.


def _masked(work: Path, smoke: bool) -> list[Row]:
    start, train, test = work / "masked-start", work / "train.jsonl", work / "test.jsonl"
    if not start.exists():
        _save_bert(start)
        _write_documents(train, 4000, seed=1)
        _write_documents(test, 400, seed=2)
    training = {"steps": 3 if smoke else 800, "batch": 32, "learning_rate": 2e-3,
                "final_ratio": 0.1, "precision": "float32", "checkpoint_every": 200}  # fmt: skip
    run = _run(work, "masked-base", model={"train": {
        "from": str(start), "objective": "masked", "packing": "documents",
        "text": {"source": str(train)}, "length": 24, "training": training,
    }})  # fmt: skip
    base = _plain_bert(run / "base", work / f"{run.name}-plain")
    documents = {"packing": "documents"}
    stream = {"packing": "stream", "special_tokens": False}
    samples = {"documents": 1024, "stream": 660}  # of as many tokens
    found: dict[str, Any] = {}
    for name, calibrated, evaluated in (
        ("with", documents, documents), ("without", stream, documents), ("stream", stream, stream),
    ):  # fmt: skip
        found[name] = _report(_run(
            work, f"masked-{name}", model=str(base),
            calibration={"text": {"source": str(train)}, "length": 24, "batch": 8,
                         "samples": samples[calibrated["packing"]], **calibrated},
            steps=[{"method": "head_width", "share": 0.75}],
            evaluation={"text": {"source": str(test)}, "window": 22, "latency": False,
                        "memory": False, **evaluated},
        ))  # fmt: skip
    reported = found["with"].before.masked
    accuracy, entropy = _plain_masked(base, test)
    streamed = found["stream"].before.masked.accuracy
    pruned = {name: result.after.masked for name, result in found.items()}
    say(f"masked: {reported.accuracy:.4f} reported, {accuracy:.4f} plain, {streamed:.4f} streamed; "
        f"{ {name: (m.accuracy, m.cross_entropy) for name, m in pruned.items()} }")  # fmt: skip
    label = "BERT trained with [CLS] and [SEP]"
    return [
        _row(f"{label}: masked accuracy, relative difference from a plain computation",
             abs(reported.accuracy / accuracy - 1), _SAME),
        _row(f"{label}: masked cross entropy, relative difference from a plain computation",
             abs(reported.cross_entropy / entropy - 1), _SAME),
        _row(f"{label}: masked accuracy", reported.accuracy),
        _row(f"{label}: masked accuracy in windows of a stream, without them", streamed),
        _row(f"{label}, head width -75 %: cross entropy, calibrated with them / without",
             pruned["with"].cross_entropy / pruned["without"].cross_entropy, 1.0),
    ]  # fmt: skip


def _save_bert(folder: Path) -> None:
    """A BERT with random weights, and a tokenizer of letters that adds [CLS] and [SEP]."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(_SPECIAL) + len(_LETTERS), hidden_size=64, intermediate_size=128,
        num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=32, pad_token_id=0,
        initializer_range=0.1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    BertForMaskedLM(config).save_pretrained(folder)
    _tokenizer("[CLS] $A [SEP]").save_pretrained(folder)


# Both.


def _tokenizer(template: str) -> PreTrainedTokenizerFast:
    """A token a letter, and what the template puts around a text."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors

    ids = {token: i for i, token in enumerate((*_SPECIAL, *_LETTERS))}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[a-z:]"), "removed", invert=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, pair=f"{template} $B",
        special_tokens=[(token, ids[token]) for token in _SPECIAL if token in template],
    )  # fmt: skip
    pad, unknown, cls, sep, mask, bos = _SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, unk_token=unknown, cls_token=cls, sep_token=sep,
        mask_token=mask, bos_token=bos,
    )  # fmt: skip


def _write_documents(path: Path, count: int, seed: int, longer: bool = True) -> None:
    """``abcdef:abcdef`` and the like, with ``longer`` every other one with a letter more: what is
    hidden stands elsewhere in the document, at a place that only its beginning tells."""
    generator = torch.Generator().manual_seed(seed)
    lines = []
    for number in range(count):
        picks = torch.randint(26, (7,), generator=generator).tolist()
        *word, more = (_LETTERS[i] for i in picks)
        word = "".join(word)
        lines.append(json.dumps({"text": f"{word}:{word}{more if longer and number % 2 else ''}"}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _plain_bert(trained: Path, folder: Path) -> Path:
    """The trained model as an ordinary masked language model, not as a generator."""
    if not folder.exists():
        shutil.copytree(trained, folder)
        config = json.loads((folder / "config.json").read_text("utf-8"))
        del config["masked_generation"]
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def _plain_masked(folder: Path, test: Path) -> tuple[float, float]:
    """Accuracy and nats of masked letters, a document at a time, without padding.

    The masks are the evaluation's: of each document a fixed share, those with the lowest of seeded
    uniform numbers drawn for a matrix [documents, longest].
    """
    model = AutoModelForMaskedLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [json.loads(line)["text"] for line in test.read_text("utf-8").splitlines()]
    rows = [tokenizer(text)["input_ids"] for text in texts]
    longest = max(map(len, rows)) - 2
    draws = torch.rand(len(rows), longest, generator=torch.Generator().manual_seed(_SEED))
    hits, nats, count = 0, 0.0, 0
    for row, draw in zip(rows, draws, strict=True):
        size = len(row) - 2  # [CLS] and [SEP] are never masked
        hidden = draw[:size].argsort()[: max(1, round(_FRACTION * size))] + 1
        ids = torch.tensor([row])
        target = ids[0, hidden]
        ids[0, hidden] = tokenizer.mask_token_id
        with torch.no_grad():
            logs = model(ids).logits[0, hidden].double().log_softmax(-1)
        hits += int((logs.argmax(-1) == target).sum())
        nats -= float(logs.gather(1, target[:, None]).sum())
        count += len(hidden)
    return hits / count, nats / count


# Runs.


def _run(work: Path, name: str, **recipe: Any) -> Path:
    path = write_recipe(work, name, **recipe)
    return run_once(work, name, path.read_text("utf-8"))


def _report(folder: Path) -> Any:
    return load_report(folder / "report.json")
