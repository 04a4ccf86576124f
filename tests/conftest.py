import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """Real data: CIFAR-10, trained weights. Tests that need it skip where it is absent."""
    folder = os.environ.get("HF_ROBUSTQ_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("HF_ROBUSTQ_DATA does not name a folder of real data")
    return Path(folder)


@pytest.fixture(autouse=True)
def seeded() -> None:
    import torch

    torch.manual_seed(0)
