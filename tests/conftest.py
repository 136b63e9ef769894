"""Tiny random models of every family, a tokenizer, a text; no network, few threads.

Tests get helpers through fixtures, since a conftest cannot be imported.
"""

from __future__ import annotations

import gc
import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

os.environ["TQDM_DISABLE"] = "1"  # as the command line does, before anything imports tqdm

import pytest  # noqa: E402
import torch  # noqa: E402
from transformers import PreTrainedModel, PreTrainedTokenizerFast  # noqa: E402

from compress.conformance.models import (  # noqa: E402
    SPECIAL,
    TINY,
    auto_class,
    build,
    make_tokenizer,
    prose,
    token_ids,
)


@pytest.fixture(scope="session", autouse=True)
def _few_threads():
    # Tiny models gain nothing from threads and, on a busy machine, wait for them.
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _quick_collections() -> Iterator[None]:
    """Leave what has been imported and kept by now out of the collections that runs ask for: a
    quarter of the suite's time went there."""
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _no_waiting_for_disks():
    """Runs wait for the disk dozens of times, against power cuts, which tests do not have. Those
    that ask what is synced, and when, put a function of their own here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _descriptor: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def _no_users_cache(tmp_path_factory):
    """Keep what the user has in the toolkit's cache out of reach, also of wider fixtures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _own_cache(_no_users_cache, tmp_path_factory, monkeypatch):
    """Give each test an empty cache: what one has measured, no other one is to find there."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session", autouse=True)
def _one_clean_process():
    """Let one interpreter prove all checkpoints that need one: starting it takes seconds."""
    from compress.checkpoint.fresh import kept_process

    with kept_process():
        yield


@pytest.fixture(scope="session")
def forked_python() -> Iterator[Any]:
    """``forked_python(*arguments, cwd=, env=)``: what ``python *arguments`` does, as a completed
    process, in one that has imported torch and transformers; ``.start`` does not wait for its end.
    """
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("forked_python", Path(__file__).with_name("forked_python.py"))
    sys.modules["forked_python"] = module = module_from_spec(spec)
    spec.loader.exec_module(module)
    python = module.ForkedPython()
    yield python
    python.close()


@pytest.fixture
def memory_unmeasured(monkeypatch) -> None:
    """Leave out what evaluations do in processes that take seconds to start."""
    monkeypatch.setattr("compress.eval.cost.peak_memory", lambda *_args, **_more: None)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    """Let sockets reach this machine only."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> Any:
        if self.family in (socket.AF_INET, socket.AF_INET6):
            host = str(address[0])
            if not (host.startswith("127.") or host in ("::1", "localhost")):
                raise OSError(f"a test tried to reach {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(scope="session")
def tiny() -> Callable[..., PreTrainedModel]:
    """``tiny(model_type, seed=0, **config fields)``: a fresh model, the same one every time."""
    return build


@pytest.fixture(scope="session")
def dense_then_experts() -> Callable[[int], PreTrainedModel]:
    """``dense_then_experts(layers)``: a class of blocks of which the first is dense, whereas in the
    others router, routed and shared experts read one norm; 128 tokens."""
    from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

    def made(layers: int) -> PreTrainedModel:
        config = Glm4MoeConfig(
            vocab_size=128, hidden_size=32, intermediate_size=64, moe_intermediate_size=32,
            num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
            n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1,
            first_k_dense_replace=1, pad_token_id=0,
        )  # fmt: skip
        torch.manual_seed(0)
        model = Glm4MoeForCausalLM(config).eval()
        with torch.no_grad():  # as after training: what is not normed looks unlike what is
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    parameter.uniform_(0.2, 3.0)
                else:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        return model

    return made


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A token a byte, with a mask token."""
    return make_tokenizer()


@pytest.fixture(scope="session")
def framing_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """``framing_tokenizer("[CLS] $A [SEP]")``: the tokenizer, made to add special tokens."""
    from tokenizers import processors

    def make(template: str) -> PreTrainedTokenizerFast:
        made = make_tokenizer()
        used = [(token, SPECIAL.index(token)) for token in SPECIAL if token in template]
        made.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=template, pair=f"{template} $B", special_tokens=used
        )
        return made

    return make


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, tokenizer) -> Callable[..., Path]:
    """``checkpoint(model_type, **fields)``: a folder with a tiny model and tokenizer; read-only."""
    made: dict[str, Path] = {}

    def get(model_type: str, seed: int = 0, **fields: Any) -> Path:
        key = repr((model_type, seed, sorted(fields.items())))
        if key not in made:
            folder = tmp_path_factory.mktemp("checkpoints") / model_type
            build(model_type, seed, **fields).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            made[key] = folder
        return made[key]

    return get


@pytest.fixture
def own_checkpoint(checkpoint, tmp_path) -> Callable[..., Path]:
    """As ``checkpoint``, but a copy that the test may damage."""

    def get(model_type: str = "llama", **fields: Any) -> Path:
        folder = tmp_path / f"source-{model_type}"
        shutil.copytree(checkpoint(model_type, **fields), folder)
        return folder

    return get


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    """A file with 20 kB of words."""
    path = tmp_path_factory.mktemp("texts") / "words.txt"
    path.write_text(prose(20_000, seed=5))
    return path


@pytest.fixture
def section(text) -> dict[str, Any]:
    """An evaluation section: a few windows of ``text``."""
    return {"text": {"source": str(text)}, "max_tokens": 256, "window": 64, "memory": False}


@pytest.fixture(scope="session")
def tokens() -> torch.Tensor:
    """Token ids [8, 24], none of them special."""
    return token_ids()


@pytest.fixture(scope="session")
def sequences(tokens) -> Callable[[str], list[dict[str, torch.Tensor]]]:
    """``sequences(family)``: ``tokens`` as inputs [1, 24], those of bert with masks and labels."""
    chosen = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(1)) < 0.3
    masked = tokens.masked_fill(chosen, SPECIAL.index("[MASK]")).split(1)
    labels = tokens.masked_fill(~chosen, -100).split(1)

    def get(family: str) -> list[dict[str, torch.Tensor]]:
        if family == "bert":
            return [{"input_ids": a, "labels": b} for a, b in zip(masked, labels, strict=True)]
        return [{"input_ids": row} for row in tokens.split(1)]

    return get


@pytest.fixture
def register_observer() -> Callable[..., None]:
    """``register_observer(survey, kind, see)``: a method "observe" that changes nothing.

    It carries out the ``survey``, then shows each site's work to ``see``, statistics of that kind
    included.
    """
    from compress import register_method
    from compress.linear.statistics import NOTHING
    from compress.methods.base import VALUES, LinearMethod

    def register(
        survey: Any, kind: str = NOTHING, see: Callable[[Any], None] = lambda _work: None
    ) -> None:
        class Observe(LinearMethod):
            """Looks at a model."""

            name: ClassVar[str] = "observe"
            summary: ClassVar[str] = "look at what a model's linears read"
            source: ClassVar[str] = "this test"
            writes: ClassVar[frozenset[str]] = frozenset({VALUES})

            def statistic(self, site):
                return kind

            def predict(self, outline):
                return outline

            def solve(self, work):
                see(work)

            def passes(self):
                return survey, *super().passes()

        register_method(Observe)

    return register


@pytest.fixture(scope="session")
def helpers() -> SimpleNamespace:
    """Functions that several test files share."""

    def logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return model.eval()(input_ids=ids).logits

    def cached_logits(model: PreTrainedModel, ids: torch.Tensor, prompt: int = 10) -> torch.Tensor:
        """The same, a token at a time behind a prompt, from the cache of keys and values."""
        with torch.no_grad():
            found = [model.eval()(input_ids=ids[:, :prompt], use_cache=True)]
            for token in ids[:, prompt:].split(1, dim=1):
                cache = found[-1].past_key_values
                found.append(model(input_ids=token, past_key_values=cache, use_cache=True))
        return torch.cat([step.logits for step in found], 1)

    def difference(a: torch.Tensor, b: torch.Tensor) -> float:
        """Largest difference relative to the largest value of ``b``."""
        return float((a - b).detach().abs().max() / b.detach().abs().max())

    def recipe(source: Path, steps: Any, text: Path | None = None, **more: Any) -> dict[str, Any]:
        """A recipe as plain data, calibrated on ``text`` where there is one."""
        data: dict[str, Any] = {"name": "tiny", "model": str(source), "steps": list(steps), **more}
        if text is not None:
            data["calibration"] = {"text": {"source": str(text)}, "samples": 8, "length": 24}
        return data

    def evaluation(text: Path, **more: Any) -> dict[str, Any]:
        """An evaluation section that takes a moment: no timing, no process of its own."""
        spec = {
            "max_tokens": 256, "window": 64, "latency": False, "memory": False, "continuations": 0,
        }  # fmt: skip
        return {"text": {"source": str(text), "part": "tail:0.2"}, **spec, **more}

    def lasting(report: Any) -> dict[str, Any]:
        """A report without what is of the moment: clocks, memory, the command line."""
        data = report.model_dump(mode="json")
        for name in ("command", "started", "seconds"):
            data["run"].pop(name)
        for result in filter(None, (data["before"], data["after"])):
            result.pop("seconds")
            result["cost"].pop("memory")
        return data

    def weights(folder: Path) -> dict[str, torch.Tensor]:
        from safetensors.torch import load_file

        files = sorted(folder.glob("model*.safetensors"))
        return {name: tensor for file in files for name, tensor in load_file(file).items()}

    def contents(folder: Path) -> dict[str, bytes]:
        """Relative path -> bytes of every file below a folder."""
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        return {str(p.relative_to(folder)): p.read_bytes() for p in files}

    functions: tuple[Callable[..., Any], ...] = (
        logits,
        cached_logits,
        difference,
        recipe,
        evaluation,
        lasting,
        weights,
        contents,
    )
    return SimpleNamespace(
        families=tuple(t for t in TINY if t not in ("mamba", "albert")),
        auto=auto_class,
        **{f.__name__: f for f in functions},
    )
