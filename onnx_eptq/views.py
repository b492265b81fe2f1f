"""More to learn from: other views of the same images. Distillation needs no labels, so any plausible image will do."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

ENOUGH = 1024  # samples; so many different ones need no further views
MOST = 4  # views per image
AREA = 0.5  # least share of the image that a view shows
SMALLEST = 16  # pixels a side; a part of a smaller image shows too little


def channel_axis(x: Tensor) -> int | None:
    """The channel axis of a batch of colour images, [N,3,H,W] or [N,H,W,3]; None for anything else."""
    if x.ndim != 4 or not x.is_floating_point():
        return None
    axis = next((axis for axis in (1, 3) if x.shape[axis] == 3), None)
    sides = [size for i, size in enumerate(x.shape) if i not in (0, axis)]
    return axis if axis is not None and min(sides) >= SMALLEST else None


def count_views(samples: Sequence[Tensor], wanted: int | None, most_bytes: int) -> int:
    """How many views of each sample are learned from, the sample itself included.

    Args:
        samples: one tensor per network input; only models with colour images as their one input get views.
        wanted: how many; None for as many as make up for few samples.
        most_bytes: what all views may take up together.
    """
    if len(samples) != 1 or channel_axis(samples[0]) is None:
        return 1
    size = samples[0].numel() * samples[0].element_size()
    needed = min(MOST, ENOUGH // len(samples[0])) if wanted is None else wanted
    return max(1, min(needed, most_bytes // max(1, size)))


def with_views(samples: Sequence[Tensor], views: int, seed: int) -> list[Tensor]:
    """The samples, followed by `views` - 1 random views of each: a part of it at full size, mirrored or not."""
    if views == 1:
        return list(samples)
    (images,) = samples
    axis = channel_axis(images)
    assert axis is not None
    first = images.movedim(axis, 1)
    generator = torch.Generator().manual_seed(seed)
    # Views are laid out in memory as the samples are: another order of axes would cost every step a copy.
    shape, layout = (views * len(first), *first.shape[1:]), _layout(first)
    out = torch.empty(shape, dtype=first.dtype, device=first.device, memory_format=layout)
    out[: len(first)] = first
    for place in range(len(first), len(out)):
        image = first[place % len(first)]
        out[place] = _view(image, torch.rand(4, generator=generator).tolist())
    return [out.movedim(1, axis)]


def _layout(x: Tensor) -> torch.memory_format:
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def _view(image: Tensor, chance: Sequence[float]) -> Tensor:
    """A part of an image [3,H,W], by four numbers of 0..1: its area, top, left, and whether it is mirrored."""
    height, width = image.shape[1:]
    side = (AREA + (1 - AREA) * chance[0]) ** 0.5
    rows, columns = round(height * side), round(width * side)
    top, left = round(chance[1] * (height - rows)), round(chance[2] * (width - columns))
    part = image[None, :, top : top + rows, left : left + columns]
    whole = functional.interpolate(part, (height, width), mode="bilinear", align_corners=False)[0]
    return whole.flip(2) if chance[3] < 0.5 else whole
