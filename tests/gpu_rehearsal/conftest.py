"""The fake device, compiled once."""

import os
import shutil
from pathlib import Path

import pytest

from tests.gpu_rehearsal.fake_cuda import build


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled device; without g++ its tests are skipped, and fail in CI, where nothing may be left out."""
    if shutil.which("g++") is None:
        missing = "The fake device needs g++, which is not installed."
        pytest.fail(missing) if "CI" in os.environ else pytest.skip(missing)
    return build(tmp_path_factory.mktemp("fake_cuda"))
