"""An exported model that runs in onnxruntime."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.modeling_outputs import CausalLMOutputWithPast, MaskedLMOutput

from compress.errors import CompressError
from compress.models.loading import load_config
from compress.runtimes.module import RuntimeModel, check_no_padding
from compress.runtimes.onnx.description import OnnxDescription, read_description
from compress.runtimes.onnx.sampling import Sampling
from compress.runtimes.onnx.session import Cache, open_session


def load_onnx(folder: Path, threads: int | None = None) -> OnnxModel:
    """The model in a folder that was exported.

    Args:
        threads: that a product may use; by default as many as torch has.

    Raises:
        CompressError: see :func:`read_description` and :func:`open_session`.
    """
    description = read_description(folder)
    cls = OnnxForCausalLM if description.kind == "causal" else OnnxForMaskedLM
    return cls(folder, description, threads)


def open_onnx(folder: Path, *_: Any, **__: Any) -> OnnxModel:
    """The same; an export knows its checkpoint's config and has room for any number of tokens."""
    return load_onnx(folder)


class OnnxModel(RuntimeModel):
    """A graph in onnxruntime behind the face of a transformers model."""

    def __init__(
        self, folder: Path, description: OnnxDescription, threads: int | None = None
    ) -> None:
        super().__init__(load_config(folder), description.vocabulary)
        self.folder, self.description = folder, description
        self.session = open_session(folder, threads)

    @property
    def bytes(self) -> int:
        """Of the graph and its weights on disk."""
        return sum(size for size, _ in self.description.files.values())

    @property
    def execution(self) -> str:
        import onnxruntime

        threads = self.session.get_session_options().intra_op_num_threads
        return f"onnxruntime {onnxruntime.__version__} on the CPU, {threads} threads"

    def _check_length(self, tokens: int) -> None:
        if tokens > self.description.positions:
            raise CompressError(
                f"at most {self.description.positions} tokens, the model's positions", str(tokens),
                "Give a shorter text",
            )  # fmt: skip


class OnnxForMaskedLM(OnnxModel):
    """A masked language model in onnxruntime."""

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **_: Any
    ) -> MaskedLMOutput:
        """Logits of token ids [batch, tokens]; the mask is 1 where there is text."""
        return MaskedLMOutput(logits=self.base_model(input_ids, attention_mask)[0])

    def logits(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        self._check_length(ids.shape[1])
        mask = torch.ones_like(ids) if mask is None else mask
        inputs = {"input_ids": ids.numpy(), "attention_mask": mask.to(torch.int64).numpy()}
        return torch.from_numpy(self.session.run(["logits"], inputs)[0])


class OnnxForCausalLM(OnnxModel):
    """A causal language model in onnxruntime."""

    def forward(
        self,
        input_ids: torch.Tensor,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
        logits_to_keep: int = 0,
        attention_mask: torch.Tensor | None = None,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of token ids [batch, tokens], none of them padding where there is a cache.

        Args:
            attention_mask: [batch, tokens], 1 where there is text.
            past_key_values: what an earlier call returned; the tokens come behind its own.
            use_cache: return the cache, to go on with.
            logits_to_keep: of the last so many positions only; 0 for all.
        """
        if not use_cache and past_key_values is None and not logits_to_keep:
            logits = self.base_model(input_ids, attention_mask)[0]
            return CausalLMOutputWithPast(logits=logits)
        check_no_padding(attention_mask)
        tokens = input_ids.shape[1]
        cache = past_key_values or Cache(self.description, len(input_ids), 0)
        if (total := cache.length + tokens) > cache.places:
            self._check_length(total)
            cache.grow(min(self.description.positions, total + max(256, total // 2)))
        start = max(0, tokens - logits_to_keep) if logits_to_keep else 0
        logits = torch.from_numpy(self.step(input_ids.numpy(), cache, start))
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache if use_cache else None)

    def logits(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        self._check_length(ids.shape[1])
        if mask is not None:  # what is behind a row's text has no influence on it
            check_no_padding(mask.long().cummin(1).values == mask)
        cache = Cache(self.description, len(ids), ids.shape[1])
        return torch.from_numpy(self.step(ids.numpy(), cache, start=0))

    def step(self, ids: np.ndarray, cache: Cache, start: int) -> np.ndarray:
        """Run tokens [batch, tokens] behind those in the cache, which they join.

        Args:
            start: first of the tokens whose logits are wanted.

        Returns:
            Logits [batch, tokens - start, vocabulary], float32.
        """
        if cache.length and min(ids.shape) > 1:  # the operator takes several of one row alone
            each = [self.step(ids[:, i : i + 1], cache, 0) for i in range(ids.shape[1])]
            return np.concatenate(each[start:], axis=1)
        total = cache.length + ids.shape[1]
        if cache.binding is None:
            cache.binding = self._bound(cache)
        binding = cache.binding
        inputs = {
            "input_ids": np.ascontiguousarray(ids, np.int64), "start": np.array([start]),
            "lengths": np.full(len(ids), total - 1, np.int32), "total": np.array(total, np.int32),
        }  # fmt: skip
        for name, value in inputs.items():
            binding.bind_cpu_input(name, value)
        binding.bind_output("logits")
        self.session.run_with_iobinding(binding)
        cache.length = total
        return binding.get_outputs()[0].numpy()

    def _bound(self, cache: Cache) -> Any:
        """The buffers of a cache as inputs and outputs, behind the logits."""
        from onnxruntime import OrtValue

        binding = self.session.io_binding()
        binding.bind_output("logits")
        for (kind, index), buffer in cache.buffers.items():
            shared = OrtValue.ortvalue_from_numpy(buffer)
            binding.bind_ortvalue_input(f"past_{kind}.{index}", shared)
            binding.bind_ortvalue_output(f"present_{kind}.{index}", shared)
        return binding

    def generate(
        self,
        input_ids: torch.Tensor,
        *,
        max_new_tokens: int = 64,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        seed: int | None = None,
        attention_mask: torch.Tensor | None = None,
        use_cache: bool = True,
        **others: Any,
    ) -> torch.Tensor:
        """Continue prompts of one length.

        Args:
            input_ids: [batch, tokens].
            max_new_tokens: at most; a row ends earlier behind an end token.
            do_sample: draw from the distribution instead of taking the likeliest token.
            temperature, top_k, top_p: how, see :class:`Sampling`; without it they say nothing.
            eos_token_id: tokens that end a row; by default the config's.
            pad_token_id: what fills a row behind its end; by default its last token.
            seed: of the draws; None draws with torch's global generator.
            attention_mask: of ones.
            use_cache: of no influence: there always is one.

        Returns:
            [batch, tokens + new].

        Raises:
            CompressError: padding; an option that is not above; prompt and new tokens are more
                than the model has positions for; a temperature, top_k or top_p that no token can
                be drawn with.
        """
        if others:
            raise CompressError(
                "options that an exported model's generate has", ", ".join(sorted(others)),
                "Leave them out, or generate with the checkpoint that was exported",
            )  # fmt: skip
        check_no_padding(attention_mask)
        ids = torch.as_tensor(input_ids)
        places, limit = ids.shape[1] + max_new_tokens, self.description.positions
        if ids.dim() != 2 or not ids.shape[1] or max_new_tokens < 1:
            raise CompressError(
                "prompts [batch, tokens] of at least one token and one new token at least",
                f"shape {tuple(ids.shape)}, {max_new_tokens} new tokens",
            )
        if places > limit:
            raise CompressError(
                f"at most {limit} tokens, the model's positions", f"{places} with the new ones",
                f"Ask for {max(0, limit - ids.shape[1])} new tokens or less",
            )  # fmt: skip
        sampling = Sampling(temperature, top_k, top_p) if do_sample else None
        ends = self._ends(eos_token_id)
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        done = torch.zeros(len(ids), dtype=torch.bool)
        for logits in self._walk(ids, places):
            new = sampling.draw(logits[0], generator) if sampling else logits[0].argmax(-1)
            fill = ids[:, -1] if pad_token_id is None else torch.full_like(new, pad_token_id)
            new = torch.where(done, fill, new)
            ids = torch.cat([ids, new[:, None]], dim=1)
            done |= torch.isin(new, ends)
            if bool(done.all()) or ids.shape[1] == places:
                break
            logits[1] = new
        return ids

    def _walk(self, ids: torch.Tensor, places: int) -> Iterator[list[torch.Tensor]]:
        """Yield [logits of the next token, None]; the second is to be set to the token chosen."""
        cache = Cache(self.description, len(ids), places)
        tokens = ids.numpy()
        while True:
            out = self.step(tokens, cache, start=tokens.shape[1] - 1)
            turn: list[Any] = [torch.from_numpy(out[:, 0]), None]
            yield turn
            tokens = turn[1][:, None].numpy()

    def _ends(self, given: int | Sequence[int] | None) -> torch.Tensor:
        ends = self.config.eos_token_id if given is None else given
        return torch.tensor([ends] if isinstance(ends, int) else list(ends or []))
