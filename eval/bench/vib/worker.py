"""One BERT-like classifier narrowed by Torch-Pruning. Run by the interpreter of its environment.

    python worker.py JOB.json

The job: ``model`` (folder of the fine-tuned classifier), ``rows`` (safetensors with ``train.*`` and
``test.*``: input ids end to end, ``lengths`` and ``labels``), ``padding`` (token id), ``share`` of
the parameters to remove, ``scored`` (examples for the importance), ``steps``, ``warmup``,
``batch``, ``learning_rate``, ``precision`` of the fine-tuning, ``seed``, ``threads`` and ``out``
(JSON: parameters before and after, seconds of processor time for importance with pruning and for
fine-tuning, and predictions of the test rows).

Taylor importance as the tool computes it from gradients of the task's loss, heads and channels by
one ratio in every layer (its default, local pruning), the residual stream with the embeddings
included. The fine-tuning is that of the other methods: AdamW, linear warm-up and decay, gradients
clipped to 1, cross entropy plus divergence from the uncompressed model, examples of like length in
a batch.
"""

import copy
import json
import sys
import time

import torch
import torch_pruning
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoModelForSequenceClassification
from transformers.models.bert.modeling_bert import BertSelfAttention

_STRETCH = 50  # batches that are sorted by length together
_TRIALS = 9  # of the ratio that meets the size


class Rows:
    """Examples of unequal length.

    Args:
        tensors: ``ids`` int [tokens], ``lengths`` and ``labels`` int [rows].
    """

    def __init__(self, tensors: dict[str, torch.Tensor], padding: int) -> None:
        self.rows = tensors["ids"].long().split(tensors["lengths"].tolist())
        self.lengths, self.labels = tensors["lengths"], tensors["labels"].long()
        self.padding = padding

    def get(self, indices: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Model inputs [n, longest] and labels [n]."""
        chosen = [self.rows[i] for i in indices.tolist()]
        ids = torch.nn.utils.rnn.pad_sequence(chosen, True, self.padding)
        seen = torch.arange(ids.shape[1]) < self.lengths[indices][:, None]
        return {"input_ids": ids, "attention_mask": seen.long()}, self.labels[indices]

    def batches(self, size: int, seed: int):
        """Batches without end, those of an epoch in a new order each time."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(self.rows), generator=generator)
            order = order[: len(order) // size * size]
            parts = [p[self.lengths[p].argsort()] for p in order.split(_STRETCH * size)]
            found = torch.cat(parts).view(-1, size)
            yield from found[torch.randperm(len(found), generator=generator)]


def narrowed(model, rows: Rows, ratio: float):
    """A copy with the ratio of channels, neurons and heads gone that matters least.

    Args:
        model: with gradients of the task's loss in its parameters.
    """
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model = copy.deepcopy(model)
    for name, parameter in model.named_parameters():
        parameter.grad = gradients[name].clone()
    attentions = [m for m in model.modules() if isinstance(m, BertSelfAttention)]
    heads = {
        linear: attention.num_attention_heads
        for attention in attentions
        for linear in (attention.query, attention.key, attention.value)
    }
    inputs, _ = rows.get(torch.arange(2))
    pruner = torch_pruning.pruner.BasePruner(
        model, inputs, importance=torch_pruning.importance.GroupTaylorImportance(),
        pruning_ratio=ratio, num_heads=heads, prune_num_heads=True, prune_head_dims=False,
        head_pruning_ratio=ratio, ignored_layers=[model.classifier],
        output_transform=lambda out: out.logits.sum(),
    )  # fmt: skip
    pruner.step()
    for attention in attentions:
        attention.num_attention_heads = pruner.num_heads[attention.query]
        attention.all_head_size = attention.query.out_features
        attention.attention_head_size = attention.all_head_size // attention.num_attention_heads
    model.zero_grad()
    return model


def size(model) -> int:
    return sum(p.numel() for p in model.parameters())


def to_size(model, rows: Rows, share: float):
    """The narrowed model within the size, by bisection of the ratio."""
    target, low, high, best = (1 - share) * size(model), 0.0, 1.0, None
    for _ in range(_TRIALS):
        ratio = (low + high) / 2
        made = narrowed(model, rows, ratio)
        if size(made) > target:
            low = ratio
        else:
            high = ratio
            best = made if best is None or size(made) > size(best) else best
    return best


def score(model, rows: Rows, examples: int, batch: int, seed: int) -> None:
    """Leave the gradients of the mean loss of some examples in a model."""
    model.zero_grad()
    steps = max(1, examples // batch)
    for _, indices in zip(range(steps), rows.batches(batch, seed), strict=False):
        inputs, labels = rows.get(indices)
        (functional.cross_entropy(model(**inputs).logits, labels) / steps).backward()


def fine_tune(model, teacher, rows: Rows, job: dict) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=job["learning_rate"], weight_decay=0.0)

    def rate(step: int) -> float:
        if step < job["warmup"]:
            return (step + 1) / (job["warmup"] + 1)
        return 1 - (step - job["warmup"]) / max(1, job["steps"] - job["warmup"])

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    low = job["precision"] != "float32"
    batches = rows.batches(job["batch"], job["seed"])
    for _, indices in zip(range(job["steps"]), batches, strict=False):
        inputs, labels = rows.get(indices)
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            with torch.no_grad():
                wanted = teacher(**inputs).logits.float().log_softmax(-1)
            logits = model(**inputs).logits.float()
        loss = functional.cross_entropy(logits, labels) + functional.kl_div(
            logits.log_softmax(-1), wanted, reduction="batchmean", log_target=True
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


@torch.no_grad()
def predictions(model, rows: Rows, batch: int) -> list[int]:
    found = torch.zeros(len(rows.rows), dtype=torch.long)
    for indices in rows.lengths.argsort().split(batch):
        found[indices] = model(**rows.get(indices)[0]).logits.argmax(-1)
    return found.tolist()


def main() -> None:
    with open(sys.argv[1]) as file:
        job = json.load(file)
    torch.set_num_threads(job["threads"])
    torch.manual_seed(job["seed"])
    tensors = load_file(job["rows"])
    train, test = (
        Rows(
            {n: tensors[f"{part}.{n}"] for n in ("ids", "lengths", "labels")}, job["padding"]
        )
        for part in ("train", "test")
    )  # fmt: skip
    # The tool traces plain matrix products.
    model = AutoModelForSequenceClassification.from_pretrained(
        job["model"], attn_implementation="eager", dtype=torch.float32
    ).eval()
    teacher = copy.deepcopy(model).requires_grad_(False)
    started = time.process_time()
    score(model, train, job["scored"], job["batch"], job["seed"])
    small = to_size(model, train, job["share"])
    pruned = time.process_time()
    fine_tune(small, teacher, train, job)
    done = time.process_time()
    found = {
        "before": size(model), "after": size(small), "prune": pruned - started,
        "fine_tune": done - pruned, "predictions": predictions(small, test, job["batch"]),
    }  # fmt: skip
    with open(job["out"], "w") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main()
