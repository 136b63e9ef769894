"""Model families, inside and outside the table: every kind of step, saved, loaded elsewhere, equal.

A tiny model with random weights of each family goes through a run of one method of every kind. What
a run wrote is opened in an interpreter that has only imported the package, and its logits are
compared with those of the same steps on the live model. A step that a plan refuses counts as
refused, not as failed; anything that fails later counts as failed.
"""

from __future__ import annotations

import inspect
import json
import os
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

import compress
from compress.checkpoint.fresh import kept_process, prove_fresh
from compress.errors import CompressError
from compress.eval.bench.options import say
from compress.eval.bench.provenance import DEFAULT, NO_TRAINING
from compress.eval.bench.rows import Row
from compress.models.families import FAMILIES

COMMAND = "python -m compress.eval.bench.robust --only families"
CODE = (*DEFAULT, *NO_TRAINING)
VOCABULARY = 264

KINDS: dict[str, dict[str, Any]] = {
    "zeros": {"method": "wanda", "pattern": "2:4"},
    "neurons": {"method": "ffn_width", "share": 0.25},
    "heads": {"method": "head_width", "share": 0.5},
    "depth": {"method": "shortgpt", "remove": 1},
    "low rank": {"method": "svd", "ratio": 0.6},
    "precision": {"method": "rtn", "bits": 4, "group_size": 16},
}

# Those of the table first.
CAUSAL = (
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "smollm3", "olmo",
    "olmo2", "granite", "cohere", "cohere2", "starcoder2", "stablelm", "helium", "glm", "glm4",
    "phi3", "gpt2", "gpt_neox", "opt",
    "olmo3", "nemotron", "arcee", "exaone4", "apertus", "ernie4_5", "seed_oss", "lfm2", "falcon",
    "phi", "bloom", "ministral", "hunyuan_v1_dense", "jais2", "cwm", "vaultgemma", "nanochat",
    "gptj", "codegen", "mpt", "persimmon", "xglm", "biogpt", "gpt_bigcode", "diffllama", "mixtral",
    "mamba",
)  # fmt: skip
MASKED = (
    "bert", "roberta", "electra", "esm", "distilbert", "modernbert",
    "eurobert", "roformer", "megatron-bert", "nomic_bert", "data2vec-text", "ernie",
)  # fmt: skip
SMOKE = ("llama", "arcee", "bert")

# Every size under each name that a config class may have for it.
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "sep_token_id": 2, "cls_token_id": 1, "max_position_embeddings": 128, "n_positions": 128,
    "max_seq_len": 128, "hidden_size": 32, "n_embd": 32, "d_model": 32, "dim": 32,
    "embedding_size": 32, "word_embed_proj_dim": 32, "intermediate_size": 64, "n_inner": 64,
    "ffn_dim": 64, "hidden_dim": 64, "num_hidden_layers": 4, "n_layer": 4, "n_layers": 4,
    "num_layers": 4, "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "rotary_dim": 4, "num_local_experts": 2,
    "state_size": 4,
}  # fmt: skip


def sized_config(kind: str) -> Any:
    """A config of a type whose models are small."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    cls = CONFIG_MAPPING[kind]
    known = set(inspect.signature(cls.__init__).parameters)
    for base in cls.__mro__:
        known |= set(getattr(base, "__annotations__", {}))
    return cls(**{field: value for field, value in _SIZES.items() if field in known})


def tiny_model(kind: str) -> torch.nn.Module:
    """A model of a type with random weights; its logits tell weights apart."""
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    config = sized_config(kind)
    auto = AutoModelForMaskedLM if kind in MASKED else AutoModelForCausalLM
    torch.manual_seed(0)
    model = auto.from_config(config).eval()
    with torch.no_grad():
        # Random initialisation leaves biases at zero and norms at one: mix-ups would not show.
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.config.architectures = [type(model).__name__]
    return model


def byte_tokenizer() -> Any:
    """A token a byte."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ("[PAD]", "[BOS]", "[EOS]", "[UNK]", "[MASK]")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({t: i for i, t in enumerate((*special, *alphabet))}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", bos_token="[BOS]", eos_token="[EOS]",
        unk_token="[UNK]", mask_token="[MASK]",
    )  # fmt: skip


def measure(work: Path, arguments: Namespace) -> list[Row]:
    """Try every kind on every family; a family that is done is not done again."""
    done = {}
    with kept_process():
        for kind in SMOKE if arguments.smoke else (*CAUSAL, *MASKED):
            record = work / f"{kind}.json"
            if not record.exists():
                found = try_family(kind, work / kind)
                say(f"{kind}: " + ", ".join(f"{k} {v.split(':')[0]}" for k, v in found.items()))
                shutil.rmtree(work / kind, ignore_errors=True)
                partial = record.with_suffix(".partial")
                partial.write_text(json.dumps(found, indent=1), encoding="utf-8")
                os.replace(partial, record)
            done[kind] = json.loads(record.read_text(encoding="utf-8"))
    return rows_of(done)


def rows_of(done: dict[str, dict[str, str]]) -> list[Row]:
    """The figures: families by what became of the kinds of steps."""
    every = [kind for kind, found in done.items() if set(found.values()) == {"equal"}]
    failed = [
        f"{kind} {step}"
        for kind, found in done.items()
        for step, result in found.items()
        if result.startswith("failed")
    ]
    for name in failed:
        say(f"failed: {name}: {done[name.partition(' ')[0]][name.partition(' ')[2]]}")
    sound = [kind for kind, found in done.items() if not any("failed" in v for v in found.values())]
    outside = [kind for kind in every if kind not in FAMILIES]

    def row(figure: str, value: int, op: str, bar: int | None) -> Row:
        return Row(
            figure=f"robust: {figure}", value=value, unit="", op=op, bar=bar, peer=None,
            command=COMMAND,
        )  # fmt: skip

    return [
        row("families that run, save and load every kind of step with equal logits",
            len(every), ">=", 24),
        row("of these, families outside the table", len(outside), ">=", 10),
        row("families of which every kind of step is equal or refused by the plan",
            len(sound), ">=", None),
        row("kinds of steps of families that failed after the plan", len(failed), "<=", 0),
    ]  # fmt: skip


def try_family(kind: str, work: Path) -> dict[str, str]:
    """Kind of step -> "equal", "refused: why" or "failed: why"."""
    shutil.rmtree(work, ignore_errors=True)
    source = work / "source"
    try:
        model = tiny_model(kind)
        model.save_pretrained(source)
    except Exception as error:  # a class that no small model can be made of
        return {"model": f"failed: {type(error).__name__}: {error}"}
    byte_tokenizer().save_pretrained(source)
    text = work / "text.txt"
    text.write_text("a quick brown fox jumps over the lazy dog and is gone. " * 300)
    return {
        name: _try_step({"name": "tiny", "model": str(source), "steps": [step], "device": "cpu",
                         "calibration": {"text": {"source": str(text)}, "samples": 8, "length": 24}
                         }, work / "run")
        for name, step in KINDS.items()
    }  # fmt: skip


def _try_step(recipe: dict[str, Any], out: Path) -> str:
    shutil.rmtree(out, ignore_errors=True)
    try:
        result = compress.run(recipe, out)
        ids = torch.arange(7, 39).remainder(VOCABULARY)[None]
        source = Path(recipe["model"])
        expected = live_logits(source, recipe["steps"], recipe["calibration"], ids)
        prove_fresh(result.model, expected, {"input_ids": ids})
    except Exception as error:  # a traceback is a failure too
        # A run has a journal from when its plan was accepted.
        refused = isinstance(error, CompressError) and not (out / "journal.jsonl").exists()
        return f"{'refused' if refused else 'failed'}: {type(error).__name__}: {error}"
    return "equal"


def live_logits(
    folder: Path, steps: list[Any], calibration: dict[str, Any], ids: torch.Tensor
) -> torch.Tensor:
    """Logits of the same steps on a live model, calibrated on the same tokens."""
    from compress.data.calibration import calibration_batches
    from compress.data.calibration_spec import CalibrationSpec

    model, tokenizer = compress.load(folder)
    made = calibration_batches(CalibrationSpec(**calibration), tokenizer, model.config)
    batches = made.batches
    if made.labels is not None:
        batches = [{**b, "labels": y} for b, y in zip(made.batches, made.labels, strict=True)]
    model = compress.apply(model, steps, batches)
    with torch.no_grad():
        return model(input_ids=ids).logits
