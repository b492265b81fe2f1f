"""Which samples are held out: different ones than are learned from, if there are such, and as many as tell candidates apart."""

import numpy as np
import pytest
import torch

import models
import onnx_eptq
from models import cached, parse, weights
from onnx_eptq.eptq import SCARCE, Learner
from onnx_eptq.heldout import most, scenes, split
from onnx_eptq.plan import Rules

DRAW, W = np.random.default_rng(70), weights(70)


def images(count: int, size: int = 8) -> torch.Tensor:
    """Smooth ones, which are more alike than noise."""
    coarse = torch.from_numpy(DRAW.standard_normal((count, 3, 2, 2)).astype(np.float32))
    return torch.nn.functional.interpolate(coarse, (size, size), mode="bilinear")


def test_samples_are_split_by_seed():
    of = list(range(160))
    learned, held = split(of, 0)
    assert sorted(torch.cat([learned, held]).tolist()) == of
    assert len(held) == 40
    assert torch.equal(split(of, 0)[0], learned)
    assert not torch.equal(split(of, 1)[0], learned)
    counts = {2: 1, 3: 1, 4: 2, 10: 3, 15: 5, 16: 8, 40: 10, 200: 50, 256: 64, 400: 64, 640: 80, 1024: 128, 9000: 128}
    assert {n: len(split(list(range(n)), 0)[1]) for n in counts} == counts


def test_of_small_samples_more_may_be_held_out():
    """128 rows of a table hardly tell candidates apart; 128 images, of which every pixel is one, do."""
    assert [most(size) for size in (1, 10, 64, 200, 512, 3072, 150528)] == [1024, 1024, 1024, 327, 128, 128, 128]
    counts = {300: 75, 1024: 256, 4000: 512, 20000: 1024}
    assert {n: len(split(list(range(n)), 0, upto=most(10))[1]) for n in counts} == counts
    proto = parse(
        "(float[N,10] x) => (float[N,2] y) { h = MatMul(x, w) r = Relu(h) y = MatMul(r, v) }", w=W(10, 8), v=W(8, 2)
    )
    x = DRAW.standard_normal((1200, 10)).astype(np.float32)
    report = onnx_eptq.quantize(proto, x, effort="fast", steps=4, threads=1).report
    assert report.learning.held_out == 300


@pytest.mark.parametrize(
    ("count", "multiple", "learned", "held"), [(256, 8, 192, 64), (100, 8, 64, 32), (64, 32, 32, 32), (96, 32, 64, 32)]
)
def test_a_model_that_takes_several_together_gets_as_many(count, multiple, learned, held):
    sides = split(list(range(count)), 3, multiple)
    assert [len(side) for side in sides] == [learned, held]
    assert not set(sides[0].tolist()) & set(sides[1].tolist())


@pytest.mark.parametrize(("count", "multiple"), [(1, 1), (63, 32), (127, 64)])
def test_what_cannot_be_parted_is_learned_from_and_judged_by(count, multiple):
    learned, held = split(list(range(count)), 0, multiple)
    assert torch.equal(learned, held)
    assert len(held) == count // multiple * multiple


@pytest.mark.parametrize("noise", [0.0, 0.03])
def test_copies_and_frames_of_one_scene_come_to_one_side(noise):
    x = images(12).repeat_interleave(8, 0)[torch.randperm(96, generator=torch.Generator().manual_seed(1))]
    x = x + noise * x.std() * torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    of = scenes([x])
    assert len(set(of)) == 12
    learned, held = split(of, 0)
    assert len(learned) + len(held) == 96
    assert len(held) == 4 * 8  # of 12 scenes
    assert not {of[i] for i in learned} & {of[i] for i in held}


def test_a_slow_film_is_one_scene_of_which_only_copies_count():
    first, last = images(2)
    film = torch.stack([first + (last - first) * i / 200 for i in range(200)])
    assert scenes([film]) == list(range(200))
    assert len(set(scenes([torch.cat([film, film + 10 * images(1)])]))) == 2
    still = scenes([film[:1].expand(20, 3, 8, 8)])
    assert still == [0] * 20
    assert [len(side) for side in split(still, 0)] == [12, 8]  # nothing but copies: nothing to go by


def test_most_of_what_is_shown_is_learned_from():
    """One scene of 300 frames, and 100 samples of their own: whichever come first."""
    of = [0] * 300 + list(range(300, 400))
    for seed in range(5):
        learned, held = split(of, seed)
        assert not (held < 300).any()
        assert len(learned) + len(held) == 400
        assert len(held) == 25


def test_at_least_half_is_learned_from():
    of = [0] * 16 + [16] * 16 + [32] * 16 + list(range(48, 64))
    for seed in range(8):
        learned, held = split(of, seed)
        assert len(learned) >= 32
        assert len(held) >= 8
        assert not {of[i] for i in learned} & {of[i] for i in held}


def test_an_input_that_never_varies_tells_nothing():
    x = images(40)
    for constant in (0.0, 0.1, 1.0, 255.0):
        fixed = torch.full((40, 77), constant)
        assert scenes([x, fixed]) == scenes([fixed, x]) == list(range(40))
        assert scenes([torch.cat([x, x]), torch.full((80, 77), constant)]) == [*range(40), *range(40)]


def test_different_samples_are_no_scene():
    assert scenes([images(300)]) == list(range(300))
    noise = torch.from_numpy(DRAW.standard_normal((40, 3, 8, 8)).astype(np.float32))
    quiet = torch.cat([0.01 * noise[:20], 5 * noise[20:]])  # near to each other beside loud ones, and yet different
    assert scenes([quiet]) == list(range(40))
    assert scenes([7 + noise]) == list(range(40))


def test_rows_of_tables_and_integers_are_the_same_or_not():
    x = torch.from_numpy(DRAW.standard_normal((20, 4)).astype(np.float32))
    assert scenes([torch.cat([x, x + 1e-4])]) == list(range(40))
    assert scenes([torch.cat([x, x])]) == [*range(20), *range(20)]
    ids = torch.from_numpy(DRAW.integers(0, 9, (20, 100)))
    assert scenes([torch.cat([ids, ids])]) == [*range(20), *range(20)]
    assert scenes([torch.cat([ids, ids]), torch.arange(40.0)[:, None]]) == list(range(40))


@pytest.mark.parametrize(("count", "cautious"), [(SCARCE // 2, True), (2 * SCARCE, False)])
def test_few_samples_are_solved_with_caution_too(count, cautious):
    found = models.quantize(models.residual(), Rules(3, 8))
    learner = Learner(models.problem(found, "eptq", steps=1, count=count), found.student)
    learner._start()
    assert ("cautious" in learner.learning.distances) is cautious
    assert 0 < learner.learning.held_out < count
    assert learner.learning.different == count


def test_hardly_any_judges_must_be_well_convinced():
    found = models.quantize(models.residual(), Rules(3, 8))
    for count, distance, kept in ((8, 0.6, "rtn"), (8, 0.4, "weighted"), (40, 0.9, "weighted")):
        learner = Learner(models.problem(found, "eptq", steps=1, count=count), found.student)
        learner._keep("rtn")
        start = learner.losses
        learner.judge.losses = lambda _student, start=start, distance=distance: distance * start
        learner._keep("weighted")
        assert learner.learning.kept == kept


@pytest.mark.parametrize("x", [images(1).expand(40, 3, 8, 8), images(1)], ids=["copies", "one"])
def test_who_learned_from_a_sample_is_no_sure_judge(x):
    found = models.quantize(models.residual(), Rules(3, 8))
    problem = models.problem(found, "eptq", steps=1, count=len(x))
    problem.samples = [x.contiguous()]
    learner = Learner(problem, found.student)
    assert not learner.sure
    assert learner.learning.different == 1


def test_the_report_says_when_nothing_is_held_out_and_when_samples_are_copies():
    proto = cached("residual").proto
    x = DRAW.standard_normal((4, 3, 8, 8)).astype(np.float32)
    alone = onnx_eptq.quantize(proto, x[:1], steps=2, threads=1).report
    assert alone.learning.held_out == 0
    assert "on the samples learned from, as none could be held out: rtn" in str(alone)
    assert any(warning.startswith("1 samples are too few to hold some out") for warning in alone.warnings)
    copies = onnx_eptq.quantize(proto, np.repeat(x, 16, 0), steps=2, threads=1).report
    assert (copies.learning.different, copies.learning.held_out) == (4, 32)
    assert any(warning.startswith("of 64 samples only 4 are different") for warning in copies.warnings)
    assert "on held-out samples: rtn" in str(copies)
