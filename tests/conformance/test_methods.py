"""What every method owes its users on every family: it loads again, repeats, streams, harms not.

The demands are those that compress.conformance makes of anybody's method.
"""

from __future__ import annotations

import pytest

from compress.conformance import check_options
from compress.methods.catalog import BUILT_IN, METHODS


def test_every_method_is_in_the_suite(methods):
    missing, gone = set(BUILT_IN) - methods, methods - set(BUILT_IN)
    assert not missing, f"give {missing} an entry in tests/conformance/conftest.py"
    assert not gone


@pytest.mark.parametrize("name", BUILT_IN)
def test_options(name):
    check_options(METHODS.get(name))


def test_saved_checkpoint_is_the_model_in_memory(method, family, trial):
    trial(method, family).saved_checkpoint_is_the_model()


def test_it_does_something(method, family, trial):
    trial(method, family).does_something()


def test_it_changes_what_it_declares(method, family, trial):
    trial(method, family).changes_what_it_declares()


def test_streamed_equals_live(method, streamed_family, trial):
    trial(method, streamed_family).streamed_equals_live()


def test_nothing_to_do_changes_nothing(method, family, trial, idle):
    trial(method, family).idles(*idle(method))


# What follows does not depend on a family's details: a few of them do.


def test_predicted_size_is_what_is_written(method, streamed_family, trial):
    trial(method, streamed_family).predicts_sizes()


def test_an_interrupted_run_ends_with_the_same_bytes(method, some_family, trial):
    """And so does any second run with the same seed: this one is two halves of one."""
    trial(method, some_family).interrupted_run_resumes()
