"""Special tokens: reported figures beside a plain computation, and what calibration with them buys.

Two small models are trained by recipes: a GPT-2 whose tokenizer puts BOS in front of every text, on
windows of prose, and a BERT whose tokenizer puts [CLS] and [SEP] around it, on short documents that
say each word twice. The plain computations below use transformers, torch and the tokenizer alone.
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

from compress.data.text import TextSpec, load_text
from compress.eval.bench.options import say
from compress.eval.bench.rows import Row
from compress.eval.bench.runs import run_once, write_recipe
from compress.eval.report import load_report

COMMAND = "python -m compress.eval.bench.robust --only tokens"
_SAME = 1e-4  # relative difference of figures that are equal
_TOPICS = {"source": "python:pydoc_data.topics"}
_WINDOW, _TOKENS = 32, 8192
_FRACTION, _SEED = 0.15, 0  # of masked tokens, as the evaluation's defaults are
_LETTERS = "abcdefghijklmnopqrstuvwxyz:"
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


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
    start = work / "causal-start"
    if not start.exists():
        _save_causal(start)
    training = {"steps": 3 if smoke else 400, "batch": 16, "learning_rate": 3e-3,
                "final_ratio": 0.1, "precision": "float32", "checkpoint_every": 200}  # fmt: skip
    base = _run(work, "causal-base", model={"train": {
        "from": str(start), "text": {**_TOPICS, "part": "head:0.8"}, "length": _WINDOW,
        "training": training,
    }}) / "base"  # fmt: skip
    found: dict[str, Any] = {}
    for name, calibrated, evaluated in (
        ("with", True, True), ("without", False, True), ("told without", False, False),
    ):  # fmt: skip
        found[name] = _report(_run(
            work, f"causal-{name.replace(' ', '-')}", model=str(base),
            calibration={"text": {**_TOPICS, "part": "head:0.8"}, "samples": 256,
                         "length": _WINDOW, "special_tokens": calibrated},
            steps=[{"method": "gptq", "bits": 2, "group_size": 32}],
            evaluation={"text": {**_TOPICS, "part": "tail:0.2"}, "window": _WINDOW,
                        "max_tokens": _TOKENS, "special_tokens": evaluated, "latency": False,
                        "memory": False},
        ))  # fmt: skip
    dense = found["with"].before.perplexity.perplexity
    plain = _plain_perplexity(base)
    label = "GPT-2 trained with BOS"
    bare = found["told without"].before.perplexity.perplexity
    pruned = {name: result.after.perplexity.perplexity for name, result in found.items()}
    say(f"causal: {dense:.4f} reported, {plain:.4f} plain, {bare:.4f} without BOS; {pruned}")
    return [
        _row(f"{label}: perplexity, relative difference from a plain computation",
             abs(dense / plain - 1), _SAME),
        _row(f"{label}: perplexity", dense),
        _row(f"{label}: perplexity, without BOS / with it", bare / dense),
        _row(f"{label}, GPTQ 2 bit: perplexity, calibrated with BOS / without it",
             pruned["with"] / pruned["without"], 1.0),
    ]  # fmt: skip


def _save_causal(folder: Path) -> None:
    """A GPT-2 with random weights, and a byte tokenizer that adds BOS."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {token: i for i, token in enumerate(("<s>", "</s>", *alphabet))}
    tokenizer = Tokenizer(models.BPE(ids, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 0)]
    )
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(ids), n_embd=64, n_layer=3, n_head=4, n_positions=_WINDOW,
        bos_token_id=0, eos_token_id=1, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>",
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)  # fmt: skip


def _plain_perplexity(folder: Path) -> float:
    """BOS, a window of text, the next tokens: by the model's own forward."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = load_text(TextSpec(**_TOPICS, part="tail:0.2")).text
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][:_TOKENS]
    total, count = 0.0, 0
    for first in range(0, len(ids) - _WINDOW + 1, _WINDOW):
        window = ids[first : first + _WINDOW]
        with torch.no_grad():
            logits = model(torch.tensor([[tokenizer.bos_token_id, *window[:-1]]])).logits[0]
        logs = logits.double().log_softmax(-1)
        # Position 0 is BOS, and what it says of the first token does not count.
        total -= sum(float(logs[i, window[i]]) for i in range(1, _WINDOW))
        count += _WINDOW - 1
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
    found: dict[str, Any] = {}
    for name, calibrated, evaluated in (
        ("with", documents, documents), ("without", stream, documents), ("stream", stream, stream),
    ):  # fmt: skip
        found[name] = _report(_run(
            work, f"masked-{name}", model=str(base),
            calibration={"text": {"source": str(train)}, "samples": 256, "length": 24,
                         "batch": 8, **calibrated},
            steps=[{"method": "sparsegpt", "pattern": "2:4"}],
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
        _row(f"{label}, SparseGPT 2:4: cross entropy, calibrated with them / without",
             pruned["with"].cross_entropy / pruned["without"].cross_entropy, 1.0),
    ]  # fmt: skip


def _save_bert(folder: Path) -> None:
    """A BERT with random weights, and a tokenizer of letters that adds [CLS] and [SEP]."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors

    ids = {token: i for i, token in enumerate((*_SPECIAL, *_LETTERS))}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[a-z:]"), "removed", invert=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )  # fmt: skip
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(ids), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=32, pad_token_id=0,
        initializer_range=0.1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    BertForMaskedLM(config).save_pretrained(folder)
    pad, unknown, cls, sep, mask = _SPECIAL
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, unk_token=unknown, cls_token=cls, sep_token=sep,
        mask_token=mask, model_max_length=32,
    ).save_pretrained(folder)  # fmt: skip


def _write_documents(path: Path, count: int, seed: int) -> None:
    """``abcdef:abcdef`` and the like, every other one with a letter more: what is masked stands
    elsewhere in the document, at a place that only its beginning tells."""
    generator = torch.Generator().manual_seed(seed)
    lines = []
    for number in range(count):
        picks = torch.randint(26, (7,), generator=generator).tolist()
        *word, more = (_LETTERS[i] for i in picks)
        word = "".join(word)
        lines.append(json.dumps({"text": f"{word}:{word}{more if number % 2 else ''}"}))
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
