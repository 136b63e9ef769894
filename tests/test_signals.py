"""A signal that asks the command line to end is heard wherever it arrives."""

from __future__ import annotations

import signal
import sys
import time
import weakref

import pytest

from compress.system.signals import Stopped, stoppable


class Ends:
    """Is told of a signal while Python drops what is raised: as it is thrown away."""

    def __del__(self):
        signal.raise_signal(signal.SIGTERM)


def in_a_finaliser():
    Ends()


def in_a_callback():
    thing = type("Thing", (), {})()
    kept = weakref.ref(thing, lambda _: signal.raise_signal(signal.SIGTERM))
    del thing
    return kept


def in_a_library():
    try:
        signal.raise_signal(signal.SIGTERM)
    except BaseException as error:
        raise ImportError("of a module in C, half of which was run") from error


def in_the_open():
    signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("arrive", [in_a_finaliser, in_a_callback, in_a_library, in_the_open])
def test_a_signal_is_heard_wherever_it_arrives(arrive):
    before = signal.getsignal(signal.SIGTERM), sys.unraisablehook
    with pytest.raises(Stopped) as stopped, stoppable():
        arrive()
        time.sleep(10)  # ends with the exception
        pytest.fail("nobody heard the signal")
    assert stopped.value.status == 143
    assert (signal.getsignal(signal.SIGTERM), sys.unraisablehook) == before


def test_what_else_is_dropped_is_told_as_before(monkeypatch):
    told = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: told.append(unraisable.exc_type))

    class Breaks:
        def __del__(self):
            raise ZeroDivisionError

    with stoppable():
        Breaks()
    assert told == [ZeroDivisionError]
