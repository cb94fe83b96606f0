"""What every test shares: one torch thread, the skip rules of the GPU markers, tiny models, and a clean house after."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.tiny_models import TinyModels

os.environ["OMP_NUM_THREADS"] = (
    "1"  # read by torch when it is imported: the cores are for the processes under test
)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# Every process a test starts inherits this, so that a survivor can be told from a stranger's.
TEST_RUN = f"manylora-test-{os.getpid()}"
os.environ["MANYLORA_TEST_RUN"] = TEST_RUN


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what this machine has no device for, and what is slow unless `-m` names it."""
    asked_for_slow = "slow" in str(config.getoption("-m"))
    for item in items:
        if item.get_closest_marker("slow") and not asked_for_slow:
            item.add_marker(pytest.mark.skip(reason="slow: ask for it with -m slow"))
        if item.get_closest_marker("multigpu") and num_cuda_devices() < 2:
            item.add_marker(pytest.mark.skip(reason="needs two CUDA devices"))
        elif item.get_closest_marker("gpu") and num_cuda_devices() < 1:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@cache
def num_cuda_devices() -> int:
    """Only asked when a test wants one: importing torch is slow."""
    import torch

    return torch.cuda.device_count()


@pytest.fixture(scope="session", autouse=True)
def clean_house() -> Iterator[None]:
    """After the last test no process that a test started is alive."""
    yield
    survivors = processes_of_this_run()
    for pid in survivors:
        os.kill(pid, signal.SIGKILL)
    assert not survivors, f"processes of the tests are still alive: {survivors}"


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    """Checkpoints and adapters, made when first asked for."""
    from tests.tiny_models import TinyModels  # transformers and PEFT take seconds to import

    return TinyModels(tmp_path_factory.mktemp("tiny-models"))


def processes_of_this_run() -> dict[int, str]:
    """pid -> command line of every live process, but for this one, that carries this run's mark."""
    mark = f"MANYLORA_TEST_RUN={TEST_RUN}".encode()
    found: dict[int, str] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            if mark not in (entry / "environ").read_bytes().split(b"\0"):
                continue
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # gone meanwhile, or another user's
            continue
        if command:  # a zombie has none
            found[int(entry.name)] = command
    return found
