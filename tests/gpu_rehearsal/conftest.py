"""The fake device, compiled once."""

from pathlib import Path

import pytest

from tests.gpu_rehearsal.fake_cuda import build


@pytest.fixture(scope="session")
def library(cpp_compiler: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled device."""
    return build(tmp_path_factory.mktemp("fake_cuda"))
