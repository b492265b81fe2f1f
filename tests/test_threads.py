"""Threads: what a container allows, what a model makes use of, and that nothing stays changed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import onnx_eptq
from models import parse
from onnx_eptq import pipeline, threads

DIGITS, CALIB = (Path(__file__).parents[1] / "models" / name for name in ("digits.onnx", "digits_calib"))


@pytest.fixture(autouse=True)
def _four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 4),
        ({"cpu.max": "max 100000\n"}, 4),
        ({"cpu.max": "200000 100000\n"}, 2),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "250000 100000\n"}, 3),
        ({"cpu.max": "6400000 100000\n"}, 4),
        ({"cpu.max": "nonsense"}, 4),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4),
        ({"cpu/cpu.cfs_quota_us": "200000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2),
    ],
)
def test_a_container_is_not_asked_for_more_than_it_is_allowed(
    tmp_path: Path, files: dict[str, str], expected: int
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert threads.cores(tmp_path) == expected


def test_threads_grow_with_the_work_up_to_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "cores", lambda: 4)
    found = [threads.worthwhile(work) for work in (0.0, 1e6, threads.WORK, 2 * threads.WORK, 1e12)]
    assert found == [1, 1, 1, 2, 4]


def conv(size: int) -> onnx.ModelProto:
    """One convolution of 3 to 16 channels over images of this size."""
    text = f"(float[N,3,{size},{size}] x) => (float[N,16,{size},{size}] y) {{ y = Conv <pads = [1, 1, 1, 1]> (x, w) }}"
    return parse(text, w=np.random.default_rng(1).standard_normal((16, 3, 3, 3), dtype=np.float32))


def test_small_models_run_on_one_thread_and_larger_ones_on_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "cores", lambda: 4)
    rng = np.random.default_rng(0)
    seen = {}
    for size in (8, 64):
        samples = rng.standard_normal((32, 3, size, size), dtype=np.float32)
        job = pipeline.begin(conv(size), {"x": samples}, method="rtn")
        seen[size] = job.report.threads
        assert torch.get_num_threads() == job.report.threads
    assert seen[8] == 1
    assert seen[64] > 1


@pytest.mark.parametrize("asked", [0, 2])
def test_a_run_says_its_threads_and_leaves_torch_as_it_was(asked: int) -> None:
    report = onnx_eptq.quantize(DIGITS, CALIB, method="rtn", num_samples=32, threads=asked).report
    assert report.threads == (asked or 1)  # the demo is small
    assert f"({report.threads} thread" in str(report)
    assert torch.get_num_threads() == 4
