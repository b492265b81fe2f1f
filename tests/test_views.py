"""Views of images: who gets how many, that they are parts of their image, and that a seed decides them."""

import pytest
import torch

import models
from models import parse, weights
from onnx_eptq.eptq import Learner
from onnx_eptq.plan import Rules
from onnx_eptq.views import AREA, ENOUGH, MOST, SMALLEST, channel_axis, count_views, with_views

LARGE = 2**40
W = weights(3)


@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((5, 3, 32, 40), 1),
        ((5, 32, 40, 3), 3),
        ((5, 1, 32, 32), None),
        ((5, 3, 32), None),
        ((5, 3, SMALLEST - 1, 32), None),
        ((5, 64, 8, 8), None),
    ],
)
def test_colour_images_are_told_by_their_shape(shape, axis):
    assert channel_axis(torch.rand(shape)) == axis
    assert channel_axis(torch.randint(0, 9, shape)) is None


def test_few_images_get_many_views():
    images = torch.rand(ENOUGH // 4, 3, 16, 16)
    assert count_views([images], None, LARGE) == 4
    assert count_views([images[:9]], None, LARGE) == MOST
    assert count_views([images.repeat(4, 1, 1, 1)], None, LARGE) == 1
    assert count_views([images], 3, LARGE) == 3
    assert count_views([images], 3, 2 * images.numel() * 4) == 2  # no more than fit
    assert count_views([images], 3, 0) == 1
    assert count_views([images, images], 3, LARGE) == 1
    assert count_views([torch.rand(9, 40)], 3, LARGE) == 1


@pytest.mark.parametrize("axis", [1, 3])
def test_views_are_parts_of_their_image(axis):
    """Every view of a ramp is a ramp, no steeper, over a part of it no smaller than allowed; perhaps mirrored."""
    ramp = torch.linspace(0, 1, 64).expand(6, 3, 48, 64) + torch.arange(6.0)[:, None, None, None]
    (seen,) = with_views([ramp.movedim(1, axis).contiguous()], 4, seed=2)
    seen = seen.movedim(axis, 1)
    assert seen.shape == (24, 3, 48, 64)
    assert torch.equal(seen[:6], ramp)
    mirrored = set()
    for index in range(6, 24):
        view = seen[index] - index % 6
        assert view.min() >= -1e-5
        assert view.max() <= 1 + 1e-5
        slope = view[0, 0].diff()[4:-4]
        assert slope.std() < 1e-4
        assert AREA**0.5 * 0.9 <= slope.mean().abs() * 63 <= 1.01
        mirrored.add(bool(slope.mean() < 0))
    assert mirrored == {False, True}


def test_a_seed_decides_the_views_and_the_layout_stays():
    images = torch.rand(3, 3, 20, 20).contiguous(memory_format=torch.channels_last)
    first, second, third = (with_views([images], 3, seed)[0] for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, third)
    assert first.is_contiguous(memory_format=torch.channels_last)
    assert with_views([images], 1, 0)[0] is images


def test_learning_sees_views_but_neither_judge_nor_start_does(monkeypatch):
    seen = []
    monkeypatch.setattr("onnx_eptq.eptq.compensate", lambda *arguments: seen.append(arguments[4]))
    proto = parse(
        "(float[N,3,16,16] x) => (float[N,4] y) { a = Conv (x, w) b = Relu (a) c = GlobalAveragePool (b) y = Flatten (c) }",
        w=W(4, 3, 3, 3),
    )
    found = models.quantize(proto, Rules(4, 8))
    problem = models.problem(found, "eptq", steps=2, count=64, views=3)
    learner = Learner(problem, found.student)
    assert len(learner.judge.samples[0]) == 16
    assert len(problem.samples[0]) == 3 * 48
    assert len(list(learner)) == 2
    assert len(seen) == 2
    for batches in seen:
        assert torch.equal(torch.cat([batch[0] for batch in batches]), problem.samples[0][:48])
