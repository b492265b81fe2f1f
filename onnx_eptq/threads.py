"""How many CPU threads a run makes use of: small networks are no faster on many, and far slower where cores are shared."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch

# Multiplications of a node on one batch that are worth a thread of their own. Threads wait for one another at the end of every
# node; below this that took as long as they saved (small CNNs on two cores), and many times as long beside another process.
WORK = 5e6


def cores(control_group: Path = Path("/sys/fs/cgroup")) -> int:
    """Threads that torch would use, but no more than the CPU time allowed to a container (control groups, both versions)."""
    quota = math.inf
    with suppress(OSError, ValueError, ZeroDivisionError):  # no control group, or no limit: "max" or -1
        allowed, period = (control_group / "cpu.max").read_text().split()
        quota = float(allowed) / float(period)
    with suppress(OSError, ValueError, ZeroDivisionError):
        allowed, period = ((control_group / "cpu" / f"cpu.cfs_{part}_us").read_text() for part in ("quota", "period"))
        quota = float(allowed) / float(period) if float(allowed) > 0 else quota
    return max(1, math.ceil(min(torch.get_num_threads(), quota)))


def worthwhile(work: float) -> int:
    """Threads that pay off, of the cores there are, where a node does so many multiplications on average."""
    return max(1, min(cores(), round(work / WORK)))


@contextmanager
def restored() -> Iterator[None]:
    """Make new tensors on the CPU, in the precision they have, and leave torch's settings as they were found."""
    before, device = torch.get_num_threads(), torch.get_default_device()
    if device.type != "cpu":
        torch.set_default_device("cpu")
    try:
        with ExitStack() as stack:
            for kind in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
                stack.enter_context(torch.autocast(kind, enabled=False))
            yield
    finally:
        torch.set_num_threads(before)
        if device.type != "cpu":
            torch.set_default_device(device)
