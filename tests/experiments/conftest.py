"""What the tests of whole programs share."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """Where classifiers for evaluation are kept, for all workers together."""
    base = tmp_path_factory.getbasetemp()
    folder = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = Path(folder) / "classifiers"
    folder.mkdir(exist_ok=True)
    return folder
