from pathlib import Path

import pytest
import torch
from hypothesis import settings

import models

torch.set_num_threads(1)
settings.register_profile("patient", deadline=None)  # machines are shared
settings.load_profile("patient")


def pytest_addoption(parser):
    parser.addoption("--update-golden", action="store_true", help="rewrite the files under tests/golden")


@pytest.fixture(scope="session", params=models.MODELS)
def case(request):
    """Every tiny model, quantized to 8 bits; shared by all tests, not to be modified."""
    return models.cached(request.param)


@pytest.fixture
def golden(request):
    """Compare a text with the file of that name under tests/golden, or write it with --update-golden."""

    def compare(name, text):
        path = Path(__file__).parent / "golden" / name
        if request.config.getoption("--update-golden"):
            path.write_text(text)
        assert path.exists(), f"no {path}; run pytest --update-golden and review what it writes"
        assert text == path.read_text(), "run pytest --update-golden and review the difference"

    return compare
