"""Which samples are learned from, and which are held out to judge by."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

SHARE, MOST, LEAST = 8, 128, 8  # one sample in eight is held out, within these bounds
SHARE_OF_FEW, ENOUGH = 4, 64  # but one in four up to so many: fewer cannot tell candidates apart
# And of so few that LEAST were more than half of them one in three, or at least two: at 2 bits learning needs all it can get.
SHARE_OF_HARDLY_ANY, LEAST_OF_HARDLY_ANY = 3, 2
# Part of the usual squared distance of two samples up to which one is a copy of the other, or the next frame of one scene.
# Different pictures, clips and digits were never nearer than 0.007.
NEAR = 0.005
# Elements held out in all where samples are small, such as rows of a table: one of them says little, and costs little.
NUMBERS, MOST_ROWS = 65536, 1024
LEAST_ELEMENTS = 64  # of a sample, from which on it can be near another by no chance
LEAST_SPREAD = 1e-6  # of its size, below which an input does not vary
PROJECTED = 128  # numbers that stand for a sample in comparisons
COMPARED = 512  # samples at a time


def most(elements: int) -> int:
    """How many samples may be held out that have so many elements each."""
    return min(max(MOST, NUMBERS // elements), MOST_ROWS)


def split(of: Sequence[int], seed: int, multiple: int = 1, upto: int = MOST) -> tuple[Tensor, Tensor]:
    """Indices of the samples to learn from and of about `upto` to judge by, multiples of `multiple`.

    `of` tells the scene of each sample, as `scenes` finds it: what is alike comes to one side, as who learned from a sample is
    no judge of its copy. Where there is but one, or no more than the model takes together, both are all of them.
    """
    of = list(of) if len(set(of)) > 1 else list(range(len(of)))
    sizes = Counter(of)
    count = len(sizes)
    enough = ENOUGH * upto // MOST
    wanted = max(count // SHARE, min(count // SHARE_OF_FEW, enough), LEAST)
    wanted = -(-min(wanted, upto) // multiple) * multiple
    if wanted * 2 > count:
        units = count // multiple
        wanted = max(units // SHARE_OF_HARDLY_ANY, min(LEAST_OF_HARDLY_ANY, units // 2), 1) * multiple
    order = torch.randperm(len(of), generator=torch.Generator().manual_seed(seed))[: len(of) // multiple * multiple]
    chosen: set[int] = set()
    held_out = 0
    for place in order.tolist():
        scene = of[place]
        if len(chosen) < wanted and scene not in chosen and 2 * (held_out + sizes[scene]) <= len(of):
            chosen.add(scene)  # at least half of the samples are left to learn from
            held_out += sizes[scene]
    out = torch.tensor([of[place] in chosen for place in order.tolist()], dtype=torch.bool)
    learned, held = order[~out], order[out][: max(upto, wanted)]
    learned, held = (side[: len(side) // multiple * multiple] for side in (learned, held))
    return (learned, held) if len(learned) and len(held) else (order, order)


def scenes(samples: Sequence[Tensor]) -> list[int]:
    """Per sample the first one that it is a copy of, or nearly: repeated data, the frames of one scene.

    Where everything would be one scene, only copies count.
    """
    of = _near(samples) if all(x.is_floating_point() for x in samples) else _copies(samples)
    return of if len(set(of)) > 1 else _copies(samples)


def _copies(samples: Sequence[Tensor]) -> list[int]:
    seen: dict[bytes, int] = {}
    found = []
    for index in range(len(samples[0])):
        digest = hashlib.blake2b(digest_size=16)
        for x in samples:
            digest.update(x[index].contiguous().cpu().numpy().tobytes())
        found.append(seen.setdefault(digest.digest(), index))
    return found


def _near(samples: Sequence[Tensor]) -> list[int]:
    """As `scenes`: whoever is near to one of a scene belongs to it."""
    if sum(x[0].numel() for x in samples) < LEAST_ELEMENTS:
        return _copies(samples)
    points = torch.cat([_sketch(x) for x in samples], 1)
    usual = 2 * float(points.var(0).sum()) if len(points) > 1 else 0.0
    powers = points.square().sum(1)
    of = torch.arange(len(points))
    for start in range(0, len(points), COMPARED):
        rows, upto = slice(start, start + COMPARED), start + COMPARED
        apart = torch.cdist(points[rows], points[:upto]).square()
        # Quiet clips are near to each other beside loud ones: they are measured by their own size.
        near = apart <= NEAR * (powers[rows, None] + powers[None, :upto]).clamp(max=usual)
        near |= torch.eye(len(near), near.shape[1], dtype=torch.bool).roll(start, 1)
        while True:  # until no row is near to one of another scene
            first = torch.where(near, of[:upto], len(of)).amin(1)
            below = torch.where(near, first[:, None], len(of)).amin(0)
            pairs = torch.stack([torch.cat([of[rows], of[:upto]]), torch.cat([first, below])], 1)
            pairs = pairs[(pairs[:, 1] < len(of)) & (pairs[:, 0] != pairs[:, 1])]
            if not len(pairs):
                break
            of = _united(of, torch.unique(pairs, dim=0).tolist())
    return of.tolist()


def _united(of: Tensor, pairs: Sequence[Sequence[int]]) -> Tensor:
    """The scenes, of which each pair is one."""
    parents = list(range(len(of)))

    def root(scene: int) -> int:
        while parents[scene] != scene:
            scene = parents[scene]
        return scene

    for pair in pairs:
        low, high = sorted(map(root, pair))
        parents[high] = low
    return torch.tensor([root(scene) for scene in parents])[of]


def _sketch(x: Tensor) -> Tensor:
    """Numbers whose squared distances are, about, those of the samples in units of their spread; [samples, at most PROJECTED].

    Sums of elements with random signs (Charikar, Chen and Farach-Colton 2002), so that images are not copied.
    """
    size = x[0].numel()
    signs = torch.randint(0, 2, (size,), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    rows = []
    for sample in x:
        signed = sample.reshape(-1).float().cpu() * signs
        rows.append(F.pad(signed, (0, -size % PROJECTED)).reshape(-1, PROJECTED).sum(0).double())
    points = torch.stack(rows)
    spread = (points - points[0]).var(0).sum().sqrt() if len(rows) > 1 else torch.zeros(())
    if spread <= LEAST_SPREAD * points.abs().max():  # a mask or a size that is always the same
        return torch.zeros_like(points)
    return points / spread
