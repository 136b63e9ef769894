"""What every method owes its users, as a check that a method of anybody can be given to.

    from compress.conformance import check

    check(MyMethod, {"strength": 0.5}, idle={"strength": 0.0})

Tiny random models on the CPU, no network, a few seconds a family.
"""

from __future__ import annotations

from compress.conformance.checking import check, check_options

__all__ = ["check", "check_options"]
