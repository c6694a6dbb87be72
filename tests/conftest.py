"""What every test may use: a trained family."""

import signal
from pathlib import Path

import helpers  # noqa: F401, first, since it sets the number of threads
import pytest
from miniature import train

# a shell has its background jobs ignore Ctrl-C, and processes that are started here inherit that
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def miniature(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A family that was trained for 64 steps, saved at 0, 1, 4, 16 and 64; links, never changes."""
    family = tmp_path_factory.mktemp("trained") / "miniature"
    train(family, last_step=64)
    return family
