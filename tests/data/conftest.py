"""One prepared copy of the digits for all tests of the input pipeline."""

import pytest

from genjax_lab.data import prepare


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tensorflow_datasets")
    prepare("digits", directory)
    return directory
