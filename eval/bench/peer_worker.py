"""One compression by llm-compressor. Run by the interpreter of the peer's own environment.

    python peer_worker.py JOB.json

The job: ``model`` (folder), ``tokens`` (safetensors with ``calibration`` [samples, length]),
``setting``, ``out`` (folder for the checkpoint), ``times`` (JSON with the seconds of each part),
``dtype`` (that the model is loaded in).
Everything that is not stated here is the tool's default.
"""

import json
import sys
import time

_START = time.perf_counter()

import torch  # noqa: E402
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme  # noqa: E402
from datasets import Dataset  # noqa: E402
from llmcompressor import oneshot  # noqa: E402
from llmcompressor.modifiers.gptq import GPTQModifier  # noqa: E402
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

_HEAD = ["re:.*lm_head"]


def modifier(setting: str):
    """The tool's modifier for a setting: all linears of the blocks, not the output projection."""
    if setting == "sparsegpt":
        return SparseGPTModifier(
            sparsity=0.5, mask_structure="2:4", targets=["Linear"], ignore=_HEAD
        )
    if setting == "wanda":
        return WandaPruningModifier(
            sparsity=0.5, mask_structure="2:4", targets=["Linear"], ignore=_HEAD
        )
    weights = QuantizationArgs(
        num_bits=4, type="int", symmetric=True, strategy="group", group_size=64
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    return GPTQModifier(config_groups={"group_0": scheme}, ignore=_HEAD)


def main() -> None:
    with open(sys.argv[1]) as file:
        job = json.load(file)
    imported = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=getattr(torch, job["dtype"]))
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    ids = load_file(job["tokens"])["calibration"]
    data = Dataset.from_dict(
        {"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()}
    )
    loaded = time.perf_counter()
    oneshot(
        model=model,
        processor=tokenizer,
        dataset=data,
        recipe=[modifier(job["setting"])],
        num_calibration_samples=len(ids),
        max_seq_length=ids.shape[1],
        shuffle_calibration_samples=False,
    )
    solved = time.perf_counter()
    model.save_pretrained(job["out"])
    tokenizer.save_pretrained(job["out"])
    with open(job["times"], "w") as file:
        json.dump(
            {
                "import": imported - _START, "load": loaded - imported,
                "compress": solved - loaded, "save": time.perf_counter() - solved,
            },
            file,
        )  # fmt: skip


if __name__ == "__main__":
    main()
