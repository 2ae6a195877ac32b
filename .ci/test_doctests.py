"""The examples in the docstrings of helpers.py."""
import doctest

import helpers


def test_doctests():
    result = doctest.testmod(helpers)
    assert result.attempted > 0 and result.failed == 0, result
