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
