"""Settings and fixtures of all tests."""

import pytest
from hypothesis import settings

from tests.tiny import TinySet, make_tiny_set

# Two busy cores make any deadline a coin toss.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> TinySet:
    """A tiny indexed data set, which no test changes."""
    return make_tiny_set(tmp_path_factory.mktemp("tiny"))
