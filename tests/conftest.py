"""What every test may use: a trained family."""

import signal
from pathlib import Path

import pytest
from miniature import train

# a shell has its background jobs ignore Ctrl-C, which the processes that are started here would inherit
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def miniature(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A family that was trained for 32 steps; tests copy it before they change it."""
    family = tmp_path_factory.mktemp("trained") / "miniature"
    train(family, last_step=32)
    return family
