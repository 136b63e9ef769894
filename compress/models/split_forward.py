"""One forward in two halves: the trunk once, then the head on as few positions as fit in cache.

Logits of a whole window are the largest tensor of an evaluation (1,024 x 49,152 float32 = 192 MB).
glibc maps blocks above 32 MB afresh for every allocation, and faulting their pages in costs as much
as the matrix product that fills them, so a chunked head halves the time and bounds the memory.

What happens after the head (soft caps, logit scales, biases, a transform before the decoder) is
the family's own code: it runs unchanged, because the model's own ``forward`` is called, with the
trunk's ``forward`` replaced on the instance by one that returns the cached hidden states.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import CompressError

CHUNK_BYTES = 30 * 2**20  # below glibc's largest threshold (32 MiB) for recycling a block


class SplitForward:
    """Context manager that runs a language model's trunk and head separately.

    The user's model is left as it was on exit, also after an error: the ``forward`` set on the
    instance is removed (or the previous one, of accelerate's hooks say, put back) and the training
    mode restored. Only one may be open for a model at a time.

    Args:
        model: a ``PreTrainedModel`` with a head whose arithmetic is position-wise.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._saved: list[tuple[nn.Module, Any]] = []
        self._trunk: nn.Module | None = None
        self._output: Any = None
        self._chunk: Tensor | None = None
        parameters = inspect.signature(type(model).forward).parameters
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        # Without this the trunk would keep keys and values that nobody reads.
        self._extra = {"use_cache": False} if "use_cache" in parameters else {}
        self._return_dict = (
            {"return_dict": True} if "return_dict" in parameters or takes_any else {}
        )

    def __enter__(self) -> SplitForward:
        self._training = self.model.training
        self.model.eval()
        for trunk in _trunks(self.model):
            self._saved.append((trunk, trunk.__dict__.get("forward")))
            trunk.forward = self._stand_in(trunk, trunk.forward)
        return self

    def __exit__(self, *exception: object) -> None:
        for trunk, forward in self._saved:
            if forward is None:
                trunk.__dict__.pop("forward", None)
            else:
                trunk.forward = forward
        self._saved.clear()
        self._output = self._chunk = None
        self.model.train(self._training)

    def _stand_in(self, trunk: nn.Module, original: Any) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            # The first one entered is the trunk of this model; those inside it run as they are.
            if self._trunk is None:
                self._trunk = trunk
            if self._trunk is not trunk:
                return original(*args, **kwargs)
            if self._chunk is not None:
                return _with_hidden(self._output, self._chunk)
            self._output = original(*args, **kwargs)
            # One position is enough to bring the model's own forward to its end.
            return _with_hidden(self._output, _hidden(self._output)[:1, :1])

        return forward

    def hidden(self, **inputs: Tensor) -> Tensor:
        """Run the trunk on a batch; return the hidden states [batch, positions, width].

        Raises:
            CompressError: the model never called its trunk, so it cannot be split.
        """
        self._chunk, self._output = None, None
        self._inputs = inputs
        self._call()
        if self._output is None:
            raise CompressError(
                "a model whose forward calls its base model",
                type(self.model).__name__,
                "Evaluate it through lm-eval tasks instead",
            )
        return _hidden(self._output)

    def logits(self, hidden: Tensor) -> Tensor:
        """Run the head on hidden [positions, width]; return logits [positions, vocabulary]."""
        self._chunk = hidden.unsqueeze(0)
        return self._call()[0]

    def _call(self) -> Tensor:
        output = self.model(**self._inputs, **self._extra, **self._return_dict)
        return output.logits if hasattr(output, "logits") else output[0]

    def nll(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Return the negative log-likelihood in nats of each target, float32 [positions].

        Args:
            hidden: [positions, width].
            targets: token ids [positions].

        Raises:
            CompressError: the logits hold NaN or infinity.
        """
        return torch.cat([nll for nll, _, _ in self._chunks(hidden, targets)])

    def nll_and_hits(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return :meth:`nll`, and whether each target is the likeliest token, [positions] both."""
        nll, hits = [], []
        for loss, logits, target in self._chunks(hidden, targets):
            nll.append(loss)
            hits.append(logits.argmax(-1) == target)
        return torch.cat(nll), torch.cat(hits)

    def _chunks(self, hidden: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield nll, logits and targets of as many positions at a time as CHUNK_BYTES allow."""
        rows = 16
        start = 0
        while start < len(hidden):
            logits = self.logits(hidden[start : start + rows]).float()
            target = targets[start : start + rows]
            nll = nn.functional.cross_entropy(logits, target, reduction="none")
            if not torch.isfinite(nll).all():
                raise CompressError(
                    "finite logits",
                    "NaN or infinity",
                    "The model is broken: check its weights for NaN and its dtype for overflow",
                    where=f"head of {type(self.model).__name__}",
                )
            yield nll, logits, target
            start += len(target)
            # The width of the logits is known after the first small chunk only (padded heads).
            rows = max(1, CHUNK_BYTES // (4 * logits.shape[-1]))


def _trunks(model: nn.Module) -> list[nn.Module]:
    """Modules that may be the one a head calls: the base model, or its decoder (OPT)."""
    base = model.base_model
    found = [] if base is model else [base]
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    # Only a decoder inside the base model: ModernBERT calls its output projection "decoder".
    if found and any(decoder is module for module in base.modules()) and decoder is not base:
        found.append(decoder)
    if not found:
        raise CompressError(
            "a model with a head on a base model",
            f"{type(model).__name__}, which has no head",
            "Load it with AutoModelForCausalLM or AutoModelForMaskedLM",
        )
    return found


def _hidden(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    return output[0]


def _with_hidden(output: Any, hidden: Tensor) -> Any:
    """Return a copy of the trunk's output with other hidden states."""
    if isinstance(output, Tensor):
        return hidden
    if isinstance(output, tuple):
        return (hidden, *output[1:])
    fields = dict(output.items())
    fields[next(iter(fields))] = hidden
    return type(output)(**fields)
