"""Masked models in lm-eval: answers are scored by the likelihood bound or the pseudo-likelihood.

lm-eval (0.4) would run a masked model as if it were causal. The class below is registered with it
as ``compress_masked``. lm-eval's own command loads no foreign modules, so that it is started as

    python -m compress.eval.quality.masked_lm run --model compress_masked \\
        --model_args pretrained=FOLDER,score=bound,draws=32 --tasks piqa
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from torch import LongTensor, nn

from compress.errors import CompressError
from compress.eval.quality.denoising import Sequences, hidden_nll, sequences
from compress.eval.quality.likelihood import likelihood_bound
from compress.eval.quality.ordered import position_scores
from compress.generators import Denoiser, MaskedGeneration, SamplerOptions, sample

WHERE = "compress_masked"
SCORES = ("bound", "pll")
_LONGEST = 1024  # tokens, where the model says nothing


@register_model("compress_masked")
class MaskedLM(TemplateLM):
    """A masked language model, or masked generator, as an lm-eval model.

    Args:
        pretrained: a model in memory, or what AutoModelForMaskedLM (or, for causal classes with
            ``is_causal: false``, AutoModelForCausalLM) loads.
        tokenizer: its tokenizer; that of ``pretrained`` if None.
        score: "bound" (Monte Carlo, ``draws`` masks; Nie et al. 2025, LLaDA, algorithm 3) or "pll"
            (each token masked alone; Salazar et al. 2020, https://arxiv.org/abs/1910.14659).
        draws: masks an answer; an answer of one token needs one and gets one.
        steps: sampler steps of generation tasks; None for one a token.
        batch_size: rows a forward.

    Raises:
        CompressError: a model that is no masked one, or an unknown score.
    """

    def __init__(
        self,
        pretrained: str | nn.Module,
        tokenizer: Any = None,
        *,
        score: str = "bound",
        draws: int = 16,
        seed: int = 0,
        steps: int | None = None,
        batch_size: int | str = 16,
        max_length: int | None = None,
        device: str | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        if score not in SCORES:
            raise CompressError(" or ".join(SCORES), repr(score), where=f"{WHERE}, score")
        if int(draws) < 1:
            raise CompressError("at least one draw", str(draws), where=f"{WHERE}, draws")
        if isinstance(pretrained, str):
            pretrained, tokenizer = _load(pretrained, tokenizer, device)
        if tokenizer is None:
            raise CompressError(
                "a tokenizer", "none", "Tasks are texts; give the model's tokenizer"
            )
        self.tokenizer = tokenizer
        self.spec = MaskedGeneration.of(pretrained, tokenizer)
        self.denoiser = Denoiser(pretrained, self.spec)
        self.score, self.draws, self.seed, self.steps = score, int(draws), int(seed), steps
        self.batch_size = 16 if batch_size == "auto" else int(batch_size)
        around = len(self.spec.prefix) + len(self.spec.suffix)
        self.longest = (max_length or self.denoiser.positions or _LONGEST) - around

    @property
    def eot_token_id(self) -> int | None:
        """What lm-eval puts in front of an answer without a context: nothing is needed here."""
        return self.tokenizer.eos_token_id

    @property
    def tokenizer_name(self) -> str:
        return str(getattr(self.tokenizer, "name_or_path", "")).replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Ids without special tokens: what stands around a text is the description's matter."""
        return self.tokenizer(string, add_special_tokens=False, verbose=False)["input_ids"]

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Score continuations given their contexts; a context may be empty."""
        pairs = []
        for context, continuation in (request.args for request in requests):
            pairs.append(self._encode_pair(context, continuation) if context else
                         ([], self.tok_encode(continuation)))  # fmt: skip
        return self._score_pairs(pairs)

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        return self._score_pairs([(context, answer) for _, context, answer in requests])

    def _score_pairs(
        self, pairs: Sequence[tuple[list[int], list[int]]]
    ) -> list[tuple[float, bool]]:
        found = []
        for number, (context, answer) in enumerate(pairs):
            row = self._row(context, answer)
            if row is None:
                # Given tokens cost nothing, and an answer of none but such would beat all others:
                # it is worth a guess among all tokens, and no decoding gives it.
                guess = -len(answer[: self.longest]) * math.log(len(self.tokenizer))
                found.append((guess, False))
            else:
                nats = self._nats(row, seed=self.seed + number)
                found.append((-nats, self._greedy(row)))
        return found

    def _row(self, context: list[int], answer: list[int]) -> Sequences | None:
        """One sequence: the context, cut on the left, is visible; the answer is not.

        Returns:
            None where the model may produce no token of the answer.

        Raises:
            CompressError: an empty answer.
        """
        answer = answer[: self.longest]
        if not answer:
            raise CompressError("an answer of at least one token", "an empty one", where=WHERE)
        context = context[max(0, len(context) - (self.longest - len(answer))) :]
        ids = [*self.spec.prefix, *context, *answer, *self.spec.suffix]
        start = len(self.spec.prefix) + len(context)
        fixed = torch.ones(len(ids), dtype=torch.bool)
        fixed[start : start + len(answer)] = False
        row = torch.tensor([ids])
        # Tokens that are never produced ([UNK]) have no probability; they count as given.
        fixed = fixed | self.spec.fixed(row)
        return None if fixed.all() else sequences(row, fixed=fixed)

    def _nats(self, row: Sequences, seed: int) -> float:
        """Negative log-likelihood of the answer, in nats."""
        length = int(row.lengths[0])
        if self.score == "pll":
            return self._pseudo_nats(row)
        draws = 1 if length == 1 else self.draws
        found = likelihood_bound(
            self.denoiser.logits, row, self.spec.mask_id, draws=draws, seed=seed,
            batch_size=self.batch_size,
        )  # fmt: skip
        return found.nats * length

    def _pseudo_nats(self, row: Sequences) -> float:
        """One row a free token, which alone is masked."""
        places = row.free[0].nonzero()[:, 0]
        hidden = nn.functional.one_hot(places, row.tokens.shape[1]).bool()
        total = 0.0
        for part in hidden.split(self.batch_size):
            tokens = row.tokens.expand(len(part), -1)
            total += (
                hidden_nll(self.denoiser.logits, tokens, part, self.spec.mask_id)[0].sum().item()
            )
        return total

    def _greedy(self, row: Sequences) -> bool:
        """Whether greedy decoding by confidence (LLaDA's order) gives exactly the answer."""
        tokens, unknown = row.tokens, row.free.clone()
        while unknown.any():
            logs = self.denoiser.logits(tokens.masked_fill(unknown, self.spec.mask_id)).cpu()
            logs = logs.double().log_softmax(-1)
            score = position_scores(logs, "confidence").masked_fill(~unknown, -torch.inf)
            place = int(score.argmax())
            if int(logs[0, place].argmax()) != int(tokens[0, place]):
                return False
            unknown[0, place] = False
        return True

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Score whole texts, cut into windows that fit the model and do not see each other.

        Tokens that are never produced ([UNK]) count as given, also where a window has no others.
        """
        found = []
        for number, (text,) in enumerate(request.args for request in requests):
            ids = self.tok_encode(text)
            pieces = [ids[i : i + self.longest] for i in range(0, len(ids), self.longest)]
            rows = [self._row([], piece) for piece in pieces]
            seed = self.seed + number
            found.append(-math.fsum(self._nats(row, seed) for row in rows if row is not None))
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Fill masks behind the prompt, greedily in the order of confidence, and cut at a stop."""
        return [self._generate(*request.args) for request in requests]

    def _generate(self, context: str, options: dict[str, Any]) -> str:
        length = min(int(options.get("max_gen_toks", 128)), self.longest - 1)
        prompt = self.tok_encode(context)[-(self.longest - length) :]
        steps = min(self.steps or length, length)
        settings = SamplerOptions(steps=steps, order="low_confidence", temperature=0.0)
        row = [*self.spec.prefix, *prompt, *[self.spec.mask_id] * length, *self.spec.suffix]
        made = sample(self.denoiser, settings, rows=torch.tensor([row]), seeds=self.seed)
        return _until(self.tokenizer.decode(_answer(made, self.tokenizer)), options.get("until"))


def _answer(made: Any, tokenizer: Any) -> LongTensor:
    """What was generated, up to the end-of-text token."""
    ids = made.tokens[0][made.filled[0]]
    ends = (ids == tokenizer.eos_token_id).nonzero() if tokenizer.eos_token_id is not None else []
    return ids[: int(ends[0])] if len(ends) else ids


def _until(text: str, stops: str | list[str] | None) -> str:
    for stop in [stops] if isinstance(stops, str) else stops or []:
        text = text.split(stop)[0] if stop else text
    return text


def _load(source: str, tokenizer: Any, device: str | None) -> tuple[nn.Module, Any]:
    from compress.models.sources.source import load_model, load_tokenizer, resolve

    found = resolve(source)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model = load_model(found, device=where)
    if tokenizer is None:
        tokenizer, reason = load_tokenizer(found.folder)
        if tokenizer is None:
            raise CompressError("a tokenizer beside the weights", reason, where=WHERE)
    return model, tokenizer


def main() -> None:
    """lm-eval's command line, which knows ``compress_masked``."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
