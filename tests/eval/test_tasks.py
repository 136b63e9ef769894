"""Local lm-eval tasks: lm-eval's own prompts, data from a data root, clear refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

from compress.errors import CompressError

pytest.importorskip("lm_eval")

from compress.eval.quality import tasks as tasks_module  # noqa: E402
from compress.eval.quality.local_tasks import READERS, local_tasks, resolve  # noqa: E402
from compress.eval.quality.task_names import check_task_names  # noqa: E402
from compress.eval.quality.tasks import run_tasks  # noqa: E402
from compress.eval.quality.user_tasks import read_task  # noqa: E402

DOCUMENTS = {
    "piqa/validation.jsonl": [
        {"goal": "open a jar", "sol1": "twist the lid", "sol2": "eat the lid", "label": 0},
        {"goal": "dry a cup", "sol1": "add water", "sol2": "use a towel", "label": 1},
    ],
    "winogrande/winogrande_xl.validation.jsonl": [
        {
            "sentence": "Ann thanked Eve because _ had helped.",
            "option1": "Ann",
            "option2": "Eve",
            "answer": "2",
        }
    ],
    "boolq/validation.jsonl": [
        {"passage": "Ice floats.", "question": "does ice sink", "answer": False}
    ],
    "lambada/lambada_test.jsonl": [{"text": "the cat sat on the mat"}],
}
PAGES = (
    " \n = One = \n \n First text . \n \n = = Part = = \n \n More . \n \n = Two = \n \n End . \n"
)


@pytest.fixture
def data_root(tmp_path: Path) -> Path:
    for name, documents in DOCUMENTS.items():
        path = tmp_path / name
        path.parent.mkdir()
        path.write_text("".join(json.dumps(d) + "\n" for d in documents))
    (tmp_path / "wikitext-2-raw").mkdir()
    (tmp_path / "wikitext-2-raw/wiki.test.raw").write_text(PAGES)
    return tmp_path


@pytest.fixture
def llama() -> nn.Module:
    torch.manual_seed(0)
    shape = dict(vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    return LlamaForCausalLM(LlamaConfig(**shape, intermediate_size=64, max_position_embeddings=256))


@pytest.fixture
def tokenizer():
    """One token per byte: small, and complete."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {c: i for i, c in enumerate(["<eos>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


def task(name: str, data_root: Path):
    from lm_eval.tasks import TaskManager

    config, _ = resolve(local_tasks()[name], data_root, name)
    return TaskManager(include_defaults=False).load([config])["tasks"][config["task"]]


def requests(name: str, data_root: Path) -> list[tuple]:
    found = task(name, data_root)
    found.build_all_requests(rank=0, world_size=1)
    return [request.args for request in found.instances]


def test_prompts_are_those_of_lm_eval(data_root: Path) -> None:
    assert requests("piqa", data_root)[:2] == [
        ("Question: open a jar\nAnswer:", " twist the lid"),
        ("Question: open a jar\nAnswer:", " eat the lid"),
    ]
    assert requests("boolq", data_root) == [
        ("Ice floats.\nQuestion: does ice sink?\nAnswer:", " no"),
        ("Ice floats.\nQuestion: does ice sink?\nAnswer:", " yes"),
    ]
    assert requests("winogrande", data_root) == [
        ("Ann thanked Eve because Ann", " had helped."),
        ("Ann thanked Eve because Eve", " had helped."),
    ]
    assert requests("lambada", data_root) == [("the cat sat on the", " mat")]


@pytest.mark.parametrize("name", sorted(set(local_tasks().values())), ids=lambda p: p.stem)
def test_templates_match_the_installed_lm_eval(name: Path) -> None:
    """Where the fields are those of the hub, the YAML says what lm-eval's own YAML says."""
    import lm_eval.tasks
    import yaml

    theirs = {
        "piqa": "piqa/piqa.yaml",
        "lambada_openai": "lambada/lambada_openai.yaml",
        "boolq": "super_glue/boolq/default.yaml",
    }.get(name.stem)
    ours = yaml.safe_load(name.read_text())
    assert ours["task"] == name.stem
    if theirs is None:
        return
    reference = yaml.safe_load((Path(lm_eval.tasks.__file__).parent / theirs).read_text())
    same = ["task", "output_type", "doc_to_text", "metadata"]
    for key in same + (["doc_to_choice"] if "doc_to_choice" in reference else []):
        assert ours[key] == reference[key], key
    assert [m["metric"] for m in ours["metric_list"]] == [
        m["metric"] for m in reference["metric_list"]
    ]


def test_wikitext_is_cut_into_articles(data_root: Path) -> None:
    pages = READERS["wikitext_pages"](data_root / "wikitext-2-raw/wiki.test.raw")
    assert [page["page"].split("\n")[0] for page in pages] == [" = One = ", " = Two = "]
    assert " = = Part = = " in pages[0]["page"]
    assert [text.split("\n")[0].strip() for (text,) in requests("wikitext", data_root)] == [
        "= One =",
        "= Two =",
    ]


@pytest.fixture
def own_tasks(tmp_path: Path) -> Path:
    """A folder with a task of two documents, whose prompt a function makes, and a group of it."""
    folder = tmp_path / "mine"
    (folder / "data").mkdir(parents=True)
    rows = [{"q": "one and one", "a": "two"}, {"q": "two and two", "a": "four"}]
    (folder / "data" / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "prompts.py").write_text("def prompt(doc):\n    return 'Q: ' + doc['q']\n")
    (folder / "base.yaml").write_text(
        "dataset_path: json\ndataset_kwargs: {data_files: {test: data/sums.jsonl}}\n"
        "test_split: test\noutput_type: loglikelihood\ndoc_to_target: ' {{a}}'\n"
        "metric_list: [{metric: acc}, {metric: perplexity}]\n"
    )
    (folder / "sums.yaml").write_text(
        "include: base.yaml\ntask: own_sums\ntag: own_tag\ndoc_to_text: !function prompts.prompt\n"
    )
    (folder / "group.yaml").write_text("group: own_group\ntask: [own_sums]\n")
    return folder


def test_tasks_of_ones_own(llama, tokenizer, own_tasks: Path, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)  # paths of data start at the YAML file, not here
    # Forked from a process that has threads, a pool may never end.
    monkeypatch.setattr("multiprocessing.Pool", lambda *_: pytest.fail("a pool of processes"))
    named = [run_tasks(llama, tokenizer, [task], include_path=[str(own_tasks)])
             for task in ("own_sums", "own_tag", "own_group")]  # fmt: skip
    path = str(own_tasks / "sums.yaml")
    (alone,) = run_tasks(llama, tokenizer, [path]).tasks.items()
    assert alone[0] == "own_sums" and alone[1].samples == 2 and alone[1].source == "your files"
    assert set(alone[1].files) == {"sums.yaml", "base.yaml", "data/sums.jsonl"}
    assert all(metric.stderr is not None for metric in alone[1].metrics.values())
    for result in named:
        assert result.tasks["own_sums"].metrics == alone[1].metrics
    (own_tasks / "sums.yaml").write_text("task: own_sums\ndataset_path: json\ntest_split: none\n")
    with pytest.raises(CompressError, match="'own_sums' to work in lm-eval"):
        run_tasks(llama, tokenizer, [path])


def test_each_file_of_ones_own_tasks_has_its_digest(own_tasks: Path) -> None:
    (own_tasks / "more").mkdir()
    for name in ("sums.jsonl", "part-1.jsonl", "part-2.jsonl"):  # sums.jsonl is in data/ too
        (own_tasks / "more" / name).write_text(json.dumps({"q": name, "a": "x"}))
    (own_tasks / "both.yaml").write_text(
        "include: base.yaml\ntask: own_both\ndataset_kwargs:\n  data_files:\n"
        "    test: [data/sums.jsonl, more/sums.jsonl]\n    train: more/part-*.jsonl\n"
    )
    task = read_task(own_tasks / "both.yaml")
    parts = ["more/part-1.jsonl", "more/part-2.jsonl"]
    data = {"data/sums.jsonl", "more/sums.jsonl", *parts}
    found = task.digests()
    assert set(found) == {"both.yaml", "base.yaml", *data}
    assert found["data/sums.jsonl"] != found["more/sums.jsonl"]
    assert task.data_files()["train"] == [str(own_tasks / part) for part in parts]
    for part in parts:
        (own_tasks / part).unlink()
    with pytest.raises(CompressError, match=r"part-\*\.jsonl"):
        check_task_names([str(own_tasks / "both.yaml")])


def test_what_is_wrong_with_ones_own_tasks_is_told_before_any_work(own_tasks: Path) -> None:
    check_task_names([str(own_tasks / "group.yaml"), "own_tag"], [str(own_tasks)])
    with pytest.raises(CompressError, match="'own_sums'"):
        check_task_names(["own_sum"], [str(own_tasks)])
    with pytest.raises(CompressError, match=r"nearest of \d+,\d+: '[^']+', '[^']+', '[^']+'\.$"):
        check_task_names(["qqqqqzzzzz"])
    with pytest.raises(CompressError, match="without"):
        check_task_names([str(own_tasks / "base.yaml")])
    with pytest.raises(CompressError, match="an existing folder with lm-eval tasks"):
        check_task_names(["own_sums"], ["nowhere"])
    (own_tasks / "data" / "sums.jsonl").unlink()
    with pytest.raises(CompressError, match="data_files"):
        check_task_names([str(own_tasks / "sums.yaml")])


def test_runs_in_memory_and_says_what_it_ran(llama, tokenizer, data_root: Path) -> None:
    llama.train()
    found = run_tasks(
        llama, tokenizer, ["piqa", "lambada", "wikitext"], batch_size=2, data_root=data_root
    )
    assert llama.training
    assert set(found.tasks) == {"piqa", "lambada_openai", "wikitext"}
    piqa = found.tasks["piqa"]
    assert piqa.metrics["acc"].value in (0.0, 0.5, 1.0) and piqa.metrics["acc"].higher_is_better
    assert piqa.metrics["acc"].stderr is not None
    assert (piqa.samples, piqa.num_fewshot, piqa.source) == (2, 0, "data root")
    assert len(piqa.files["piqa/validation.jsonl"]) == 64
    assert found.tasks["wikitext"].metrics["bits_per_byte"].value > 1
    assert not found.tasks["wikitext"].metrics["word_perplexity"].higher_is_better
    assert type(found).model_validate_json(found.model_dump_json()) == found


def test_limit(llama, tokenizer, data_root: Path) -> None:
    found = run_tasks(llama, tokenizer, ["piqa"], limit=1, data_root=data_root)
    assert found.tasks["piqa"].samples == 1 and found.limit == 1


def test_missing_data_names_the_option(llama, tokenizer, data_root: Path) -> None:
    with pytest.raises(CompressError, match=r"hellaswag/.*jsonl.*--data-root"):
        run_tasks(llama, tokenizer, ["hellaswag"], data_root=data_root)
    with pytest.raises(CompressError, match="--data-root"):
        run_tasks(llama, tokenizer, ["piqa"], data_root=data_root / "nowhere")


def test_a_hub_out_of_reach_fails_fast_and_names_the_option(
    llama, tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(tasks_module, "_manager", lambda *_: pytest.fail("built the index"))
    with pytest.raises(CompressError, match=r"127\.0\.0\.1:9.*--data-root"):
        run_tasks(llama, tokenizer, ["piqa"])


def test_unknown_task(llama, tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks_module, "_require_hub", lambda *_: None)
    small = type("Index", (), {"all_tasks": ["piqa", "mmlu"]})()
    monkeypatch.setattr(tasks_module, "_manager", lambda *_: small)
    with pytest.raises(CompressError, match="Did you mean 'piqa'"):
        run_tasks(llama, tokenizer, ["pica"])


def test_a_masked_model_needs_a_mask_token(tokenizer, data_root: Path) -> None:
    config = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(CompressError, match="a mask token"):
        run_tasks(BertForMaskedLM(config), tokenizer, ["piqa"], data_root=data_root)
