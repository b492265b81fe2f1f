"""Which inputs and outputs hold columns (features, channels) or samples that one grid cannot serve, as scales differ too much."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

MOST = 512  # columns; a longer axis holds positions or classes, which are of one kind
LEVELS = 255  # steps of an 8-bit grid
NOISE = 1e-6  # of a column's magnitude: what moves less is constant
INPUT_STEPS = 16  # that a column of an input covers, at least, where one grid serves all of them;
OWN_STEPS = 128  # where the model itself brings them to one scale, which says that the small ones count as much,
GAIN = 2.0  # and where this leaves the smallest so many times the steps;
OUTPUT_STEPS = 4  # and of an output, behind which nothing can add to the loss,
ROW_STEPS = 16  # but of one that holds a row of numbers per sample: in maps and sequences the rare classes are small;
ROW_SPREAD = 64  # of which the widest covers so many: all that varies may lie far from zero
UNLIKE = (
    16.0  # times as far as half of the samples the farthest reaches: so many times fewer steps are left for that half
)

Array = np.ndarray


class Columns:
    """Ranges of the columns of one value, and sizes of its samples, taken while batches go by.

    Columns lie along axis 1 or the last one, whichever is shorter; the first axis counts samples.
    """

    def __init__(self) -> None:
        self.low, self.high = np.zeros(0), np.zeros(0)
        self.reach: list[float] = []  # how far each sample goes from 0, if it goes anywhere

    def add(self, x: Array) -> None:
        """Take in one batch."""
        if not x.size or not np.isfinite(x).all():
            return
        reach = np.abs(x.reshape(len(x), -1)).max(1) if x.ndim else np.abs(x).reshape(1)
        self.reach += reach[reach > 0].astype(np.float64).tolist()
        rows = as_rows(x).astype(np.float64)
        low, high = rows.min(0), rows.max(0)
        if len(self.low) not in (0, len(low)):  # their number is open: there are no columns, then
            low, high = low.min(keepdims=True), high.max(keepdims=True)
            self.low, self.high = self.low.min(keepdims=True), self.high.max(keepdims=True)
        self.low = np.minimum(self.low, low) if len(self.low) else low
        self.high = np.maximum(self.high, high) if len(self.high) else high

    @property
    def are_unlike(self) -> bool:
        """Whether most samples would be lost on a grid that serves all of them."""
        return bool(self.reach) and UNLIKE * float(np.median(self.reach)) < max(self.reach)

    def are_served(self, steps: float, widest: float = 0.0) -> bool:
        """Whether one grid serves all that was seen, as the function `are_served` says."""
        return not len(self.low) or are_served(self.low, self.high, steps, widest)


def shares(low: Array, high: Array) -> Array:
    """Which part of the range from the lowest to the highest value, and zero, every column covers that varies."""
    own = high - low
    varies = own > NOISE * np.maximum(np.abs(low), np.abs(high))
    found: Array = own[varies] / (max(high.max(initial=0.0), 0.0) - min(low.min(initial=0.0), 0.0))
    return found


def share(low: Array, high: Array) -> float:
    """The least of `shares`; 1 where nothing varies."""
    return float(shares(low, high).min(initial=1.0))


def are_served(low: Array, high: Array, steps: float, widest: float = 0.0) -> bool:
    """Whether every column that varies covers `steps` of the grid of all, and one of them `widest`."""
    covered = LEVELS * shares(low, high)
    return not covered.size or bool(covered.min() >= steps and covered.max() >= widest)


def column_axis(shape: Sequence[int]) -> int | None:
    """Where the columns of a batch lie; None where it has none."""
    if len(shape) < 2:
        return None
    axis = 1 if shape[1] <= shape[-1] else len(shape) - 1
    return axis if shape[axis] <= MOST else None


def as_rows(x: Array) -> Array:
    """A batch as [rows, columns]; with one column where it has none."""
    axis = column_axis(x.shape)
    return x.reshape(-1, 1) if axis is None else np.moveaxis(x, axis, -1).reshape(-1, x.shape[axis])
