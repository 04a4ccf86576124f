import os
from pathlib import Path

import pytest

pytest_plugins = ["tests.clock"]

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two workers share two cores; on tiny tensors threads only wait
os.environ.setdefault("HF_ROBUSTQ_FUSED", "0")  # compiling a kernel takes seconds: test_fused.py switches it on


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
