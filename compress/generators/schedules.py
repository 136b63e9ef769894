"""Schedules: how much is still masked when a share ``r`` of the steps is done.

Chang et al. 2022, MaskGIT (https://arxiv.org/abs/2202.04200), section 3.3 and table 3.
"""

from __future__ import annotations

import math
from functools import lru_cache

from compress.errors import CompressError, did_you_mean

NAMES = ("cosine", "linear", "log", "exp")
EVEN = "even"  # the same number of tokens at every step (LLaDA); no function of r
_GUARD = 1e-9  # before rounding down, so that 10 * (1 - 0.3) gives 7


def check_schedule(name: str, *, even: bool = False) -> str:
    """Return ``name`` if there is such a schedule.

    Args:
        name: cosine, linear, log, exp, or pow:P with a positive P.
        even: accept "even" too.

    Raises:
        CompressError: no such schedule, or a power that is no positive number.
    """
    known = (*NAMES, *((EVEN,) if even else ()), "pow:2.5")
    if name in known or (name.startswith("pow:") and _power(name) is not None):
        return name
    raise CompressError(
        f"a schedule: {', '.join(known[:-1])} or pow:P with P above 0", repr(name),
        did_you_mean(name, known),
    )  # fmt: skip


def schedule_value(name: str, progress: float, length: int = 256) -> float:
    """The share of tokens masked at ``progress``.

    cosine cos(pi r / 2); linear 1 - r; pow:P 1 - r^P; log -log2(r) / log2(N); exp 1 - 2^-((1 - r)
    log2 N). All are 1 at 0 and 0 at 1 and fall in between.

    Args:
        progress: r, in [0, 1].
        length: N, the number of tokens, for log and exp.

    Raises:
        CompressError: no such schedule.
    """
    check_schedule(name)
    if progress <= 0:
        return 1.0
    if progress >= 1:
        return 0.0
    bits = math.log2(max(length, 2))
    if name == "cosine":
        value = math.cos(math.pi / 2 * progress)
    elif name == "linear":
        value = 1 - progress
    elif name == "log":
        value = -math.log2(progress) / bits
    elif name == "exp":
        # Divided by its value at 0, which is 1 - 1/N, so that nothing is revealed before the start.
        value = (1 - 2 ** (-(1 - progress) * bits)) / (1 - 2**-bits)
    else:
        value = 1 - progress ** _power(name)
    return min(max(value, 0.0), 1.0)


@lru_cache(maxsize=4096)
def reveal_plan(unknown: int, steps: int, schedule: str, block: int | None = None) -> tuple:
    """How many tokens stay masked after each step.

    Within a block of U tokens and T steps, after step s (from 0) floor(U gamma((s + 1) / T)) stay
    masked, but at least one token is revealed at every step and all at the last (MaskGIT). "even"
    reveals U // T, and one more at each of the first U mod T steps (Nie et al. 2025, LLaDA,
    https://arxiv.org/abs/2502.09992, appendix A.4).

    Args:
        unknown: masked tokens at the start.
        steps: of the whole sampling.
        schedule: a schedule, or "even".
        block: tokens a block; blocks are filled one after the other, with equally many steps.

    Returns:
        A pair (number of the block, masked tokens left in it) a step.

    Raises:
        CompressError: more steps than tokens, a block that does not divide the tokens, or blocks
            that do not divide the steps.
    """
    check_schedule(schedule, even=True)
    if steps < 1:
        raise CompressError("at least one step", str(steps), where="sampler")
    if steps > unknown:
        raise CompressError(
            f"at most as many steps as tokens to generate ({unknown})", f"{steps} steps",
            "Lower steps", where="sampler",
        )  # fmt: skip
    size = unknown if block is None else block
    if size < 1 or unknown % size:
        raise CompressError(
            f"a block that divides the {unknown} tokens to generate", str(block),
            "Choose another block", where="sampler",
        )  # fmt: skip
    blocks = unknown // size
    if steps % blocks:
        raise CompressError(
            f"steps that divide evenly among {blocks} blocks", str(steps),
            f"Choose a multiple of {blocks}", where="sampler",
        )  # fmt: skip
    left = _left(size, steps // blocks, schedule)
    return tuple((number, count) for number in range(blocks) for count in left)


def _left(unknown: int, steps: int, schedule: str) -> list[int]:
    found, now = [], unknown
    for step in range(steps):
        after = steps - 1 - step  # steps that still need a token each
        if schedule == EVEN:
            wanted = now - unknown // steps - (step < unknown % steps)
        else:
            share = schedule_value(schedule, (step + 1) / steps, unknown)
            wanted = math.floor(unknown * share + _GUARD)
        now = max(after, min(now - 1, wanted))
        found.append(now)
    return found


def _power(name: str) -> float | None:
    try:
        power = float(name.removeprefix("pow:"))
    except ValueError:
        return None
    return power if 0 < power < math.inf else None
