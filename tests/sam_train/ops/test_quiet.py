"""Warnings kept back in several threads at a time."""

import warnings

import pytest

from sam_train.ops.quiet import quiet


def test_the_last_to_leave_puts_back_what_the_first_found():
    before = list(warnings.filters)
    first, second = quiet(UserWarning), quiet(module=r"PIL\b")
    first.__enter__()
    second.__enter__()
    # As two threads may: `warnings.catch_warnings` would now keep the second one's filters for good.
    first.__exit__(None, None, None)
    warnings.warn("still kept back", UserWarning, stacklevel=1)
    second.__exit__(None, None, None)

    assert list(warnings.filters) == before
    with pytest.warns(UserWarning, match="heard again"):
        warnings.warn("heard again", UserWarning, stacklevel=1)


def test_only_what_is_named_is_kept_back():
    with quiet(UserWarning), pytest.warns(DeprecationWarning, match="heard"):
        warnings.warn("heard", DeprecationWarning, stacklevel=1)


def test_an_error_within_leaves_no_filter_behind():
    before = list(warnings.filters)
    with pytest.raises(KeyError), quiet(UserWarning):
        raise KeyError
    assert list(warnings.filters) == before
