"""A whole worker on a CUDA device gets ready: after the kernels compiled ahead there is nothing left to compile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
import torch
from triton import knobs

from manylora.kernels import compilation
from manylora.runtime.config import CacheArgs, ModelArgs, ScheduleArgs
from manylora.tp_worker.worker import Worker
from tests.tiny_models import TinyModels
from tests.tp_worker.test_worker import server_config

pytestmark = pytest.mark.gpu


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """What is compiled behind the block, with nothing on disk."""
    names: list[str] = []
    compiling_ahead, report_compilations = compilation.compiling_ahead, compilation.report_compilations

    @contextmanager
    def then_report() -> Iterator[None]:
        with compiling_ahead():
            yield
        report_compilations(names.append)

    monkeypatch.setattr(compilation, "compiling_ahead", then_report)
    monkeypatch.setattr(compilation, "report_compilations", lambda _: None)
    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", None)
    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path / "cache"))
    return names


def test_nothing_is_left_to_compile(tiny_models: TinyModels, tmp_path: Path, late: list[str]) -> None:
    model_dir = tiny_models.model("llama")
    config = msgspec.structs.replace(
        server_config(model_dir, tmp_path),
        model=ModelArgs(model_path="m", model_dir=str(model_dir), device="cuda", dtype="bfloat16"),
        cache=CacheArgs(page_size=16, host_fraction=0.001, mem_fraction_static=0.2),
        # Also graphs of more rows than our own product takes.
        schedule=ScheduleArgs(max_running_requests=130, cuda_graph_max_bs=130),
    )
    worker = Worker(config, 0, torch.device("cuda", 0))
    worker.close()
    assert not late
