"""Fixtures that several test folders share."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of recorded traces beside the project; tests that need it are skipped where it is absent."""
    folder = Path(__file__).parents[1] / ".." / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the recorded traces (../shared/data) are not beside the project")
    return folder
