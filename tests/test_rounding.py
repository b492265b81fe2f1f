"""Learned quantizers: where they start, what they end at, and their gradients against finite differences in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck

from onnx_eptq import grid as grids
from onnx_eptq.grid import Grid, QParams, along
from onnx_eptq.mirror import BiasQuantizer, Quantizer
from onnx_eptq.plan import QuantPoint
from onnx_eptq.rounding import ROUNDINGS, ActivationQuantizer, LearnedBias, annealed_beta, cosine

BITS = [2, 3, 4, 8]


def weight_quantizer(bits=3, axis=0, reach=1.0, shape=(4, 5, 3), seed=0):
    """A calibrated quantizer and its weight; below a `reach` of 1 the largest weights lie outside the grid."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    grid = Grid(bits, True, axis)
    rows = weight.flatten() if axis is None else weight.movedim(axis, 0).flatten(1)
    scale = rows.abs().amax(-1) / grid.qmax * reach
    quantizer = Quantizer(QuantPoint("w", grid, "weight"), QParams(scale, torch.zeros_like(scale, dtype=torch.int32)))
    return quantizer, weight


def learned(name, **options):
    quantizer, weight = weight_quantizer(**options)
    return ROUNDINGS[name](quantizer, weight), quantizer, weight


@pytest.mark.parametrize("axis", [0, 1, None])
@pytest.mark.parametrize("bits", BITS)
def test_soft_weights_start_at_the_float_weights(bits, axis):
    soft, quantizer, weight = learned("soft", bits=bits, axis=axis, reach=0.7)
    scale = along(quantizer.scale, axis, weight.ndim)
    steps = weight.double() / scale.double()
    inside = (steps >= quantizer.point.grid.qmin) & (steps <= quantizer.point.grid.qmax)
    assert 0 < inside.sum() < inside.numel()
    error = ((soft(weight) - weight) / scale).abs()
    assert float(error[inside].detach().max()) < 1e-5
    rest = steps - steps.floor()
    safe = inside & (steps.floor() < quantizer.point.grid.qmax)
    torch.testing.assert_close(soft.soft()[safe].double(), rest[safe], atol=1e-5, rtol=0)


@pytest.mark.parametrize("axis", [0, 1, None])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", ROUNDINGS)
def test_every_rounding_starts_at_plain_rounding(name, bits, axis):
    weight, quantizer, latent = learned(name, bits=bits, axis=axis, reach=0.7)
    expected = grids.snap(latent, quantizer.qparams, quantizer.point.grid)
    assert torch.equal(weight.hard(), expected)
    weight.hardened = True
    torch.testing.assert_close(weight(latent), quantizer(latent), rtol=0, atol=0)


@pytest.mark.parametrize("name", ROUNDINGS)
@given(bits=st.sampled_from(BITS), seed=st.integers(0, 99), size=st.sampled_from([0.1, 1.0, 50.0]))
def test_codes_stay_integers_of_the_grid_wherever_learning_goes(name, bits, seed, size):
    weight, quantizer, latent = learned(name, bits=bits, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for name_, parameter in weight.named_parameters():
        reach = min(size, 5) if name_ == "log_factor" else size
        parameter.data += reach * torch.randn(parameter.shape, generator=generator)
    weight.project()
    codes = weight.hard()
    assert torch.equal(codes, codes.round())
    assert codes.min() >= quantizer.point.grid.qmin
    assert codes.max() <= quantizer.point.grid.qmax
    assert bool((weight.scale > 0).all())
    weight.hardened = True
    assert torch.equal(weight(latent).detach(), (codes * along(weight.scale, 0, 3)).detach())


@pytest.mark.parametrize("name", ROUNDINGS)
def test_codes_do_not_depend_on_the_learned_scale(name):
    weight, _, _ = learned(name)
    before = weight.hard().clone()
    weight.log_factor.data += 0.3
    assert torch.equal(weight.hard(), before)
    torch.testing.assert_close(weight.scale, weight.base * 1.3498588)


def test_soft_rounding_is_decided_by_the_sign_of_alpha():
    soft, _, _ = learned("soft")
    soft.alpha.data = torch.linspace(-9, 9, soft.alpha.numel()).reshape(soft.alpha.shape)
    soft.alpha.data[0, 0, 0] = 0
    assert torch.equal(soft.hard() - soft.floor, (soft.alpha >= 0).float())
    assert torch.equal((soft.hard() - soft.floor).bool(), soft.soft() >= 0.5)


@pytest.mark.parametrize("beta", [2.0, 7.5, 20.0])
def test_the_regulariser_counts_the_undecided(beta):
    soft, _, _ = learned("soft")
    count = soft.alpha.numel()
    for alpha, expected in ((40.0, 0), (-40.0, 0), (0.0, count)):
        soft.alpha.data.fill_(alpha)
        assert float(soft.regularizer(beta).detach()) == pytest.approx(expected, abs=1e-5)
        assert soft.undecided() == (expected, count)
    soft.alpha.data = torch.linspace(-2, 2, count).reshape(soft.alpha.shape)
    h = 1.2 / (1 + torch.exp(-soft.alpha.data.double())) - 0.1
    expected = (1 - (2 * h.clamp(0, 1) - 1).abs() ** beta).sum()
    assert float(soft.regularizer(beta).detach()) == pytest.approx(float(expected), rel=1e-4)


def test_only_soft_rounding_is_ever_undecided():
    for name in set(ROUNDINGS) - {"soft"}:
        weight, _, _ = learned(name)
        assert weight.regularizer(2.0) is None
        assert weight.undecided() == (0, 60)


@pytest.mark.parametrize(("step", "beta"), [(0, 20), (100, 20), (200, 20), (400, 15.5), (600, 11), (1000, 2)])
def test_the_exponent_anneals(step, beta):
    assert annealed_beta(step, 1000) == pytest.approx(beta)


def test_the_rate_rises_and_falls():
    assert [cosine(step, 100, 4) for step in range(4)] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert [cosine(step, 100) for step in (0, 50, 100)] == pytest.approx([1, 0.5, 0])
    assert [cosine(step, 100, 20) for step in (20, 60, 100)] == pytest.approx([1, 0.5, 0])


def functional(module, name):
    """The module's output as a function of one of its parameters."""

    def run(value, *arguments):
        return torch.func.functional_call(module, {name: value}, arguments)

    return run


def start(module, name):
    return getattr(module, name).detach().clone().requires_grad_(True)


@pytest.mark.parametrize("axis", [0, 1, None])
@pytest.mark.parametrize("name", ROUNDINGS)
def test_the_scale_gradient_is_that_of_codes_times_scale(name, axis):
    weight, _, latent = learned(name, axis=axis)
    weight.double()
    run = functional(weight, "log_factor")
    assert gradcheck(lambda factor: run(factor, latent.double()), start(weight, "log_factor"))


@pytest.mark.parametrize("axis", [0, 1, None])
def test_the_gradient_of_alpha_and_its_regulariser(axis):
    soft, _, latent = learned("soft", axis=axis)
    soft.double()
    soft.alpha.data.clamp_(-2.2, 2.2)  # h leaves (0, 1) at 2.398
    run = functional(soft, "alpha")
    assert gradcheck(lambda alpha: run(alpha, latent.double()), start(soft, "alpha"))
    soft.alpha.data[soft.alpha.abs() < 0.1] = 0.2  # |2 h - 1| has a kink at 0
    soft.forward = lambda beta: soft.regularizer(beta)
    assert gradcheck(lambda alpha: functional(soft, "alpha")(alpha, 3.0), start(soft, "alpha"))


def gradient(run, parameter, direction):
    (found,) = torch.autograd.grad((run(parameter) * direction).sum(), parameter)
    return found


def numeric(run, at, direction, step=1e-6):
    """Central differences of (run(at) * direction).sum() by each element of `at`."""
    slopes = torch.zeros_like(at).flatten()
    for i in range(at.numel()):
        shift = torch.zeros_like(at).flatten()
        shift[i] = step
        up, down = (run(at + sign * shift.reshape(at.shape)) for sign in (1, -1))
        slopes[i] = ((up - down) * direction).sum() / (2 * step)
    return slopes.reshape(at.shape)


@pytest.mark.parametrize("name", ["latent", "flex"])
def test_rounding_is_straight_through(name):
    """The gradient is that of the function without its rounding: steps (latent), clipped quotients (flex)."""
    weight, quantizer, latent = learned(name, bits=3, reach=0.7)
    weight.double()
    grid, scale = quantizer.point.grid, along(quantizer.scale, 0, 3).double()
    parameter = "steps" if name == "latent" else "log_divisor"
    smooth = {
        "latent": lambda steps: steps * scale,
        "flex": lambda log: torch.clamp(weight.start * torch.exp(-log), grid.qmin - 0.5, grid.qmax + 0.5) * scale,
    }[name]
    direction = torch.randn(latent.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    at = start(weight, parameter)
    found = gradient(lambda value: functional(weight, parameter)(value, latent.double()), at, direction)
    expected = numeric(smooth, at.detach(), direction)
    if name == "flex":  # between the last code and the rim half a step behind it, either slope would do
        steps = weight.start
        decided = (steps > grid.qmin) & (steps < grid.qmax) | (steps < grid.qmin - 0.5) | (steps > grid.qmax + 0.5)
        assert 0 < (found == 0).sum() < found.numel()
        found, expected = found[decided], expected[decided]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def activation(bits=4, low=-1.0, high=2.0):
    grid = Grid(bits, False)
    qparams = QParams(
        torch.tensor((high - low) / grid.qmax), torch.tensor(round(-low / (high - low) * grid.qmax)).int()
    )
    return ActivationQuantizer(Quantizer(QuantPoint("x", grid, "activation"), qparams))


def values(count=400, dtype=torch.float32):
    return torch.linspace(-2.013, 3.017, count, dtype=dtype)


def test_share_of_the_activation_quantization():
    quantizer, x = activation(), values()
    full = grids.fake_quantize(x, quantizer.qparams, quantizer.point.grid).detach()
    assert len(full.unique()) == 16
    torch.testing.assert_close(quantizer(x).detach(), full, rtol=0, atol=0)
    quantizer.share = 0.0
    assert torch.equal(quantizer(x), x)
    quantizer.share = 0.25
    torch.testing.assert_close(quantizer(x).detach(), 0.25 * full + 0.75 * x)


def test_drop_mixes_only_the_two():
    torch.manual_seed(0)
    quantizer, x = activation(), values(2000)
    full = quantizer(x).detach()
    quantizer.share, quantizer.drop = 0.3, True
    mixed = quantizer(x).detach()
    assert bool(((mixed == full) | (mixed == x)).all())
    assert 0.25 < float((mixed == full).float().mean()) < 0.35
    assert not torch.equal(quantizer(x).detach(), mixed)
    for share, expected in ((0.0, x), (1.0, full)):
        quantizer.share = share
        assert torch.equal(quantizer(x).detach(), expected)


@pytest.mark.parametrize("share", [1.0, 0.4])
def test_the_step_gradient_is_that_of_rounding_with_a_fixed_remainder(share):
    """LSQ: with r = round(x/s) - x/s held, the slope of clamp(x/s + r) * s by s; by x that of the clamp."""
    quantizer, x = activation().double(), values(101, torch.float64)
    quantizer.share = share
    grid, s, z = quantizer.point.grid, quantizer.scale.detach(), quantizer.zero_point
    remainder = torch.round(x / s) - x / s
    assert float((remainder.abs() - 0.5).abs().min()) > 1e-3  # away from ties

    def smooth(log, x=x):
        scale = s * torch.exp(log)
        codes = torch.clamp(x / scale + remainder, float(grid.qmin - z), float(grid.qmax - z))
        return share * codes * scale + (1 - share) * x

    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(x.shape, dtype=torch.float64, generator=generator)
    at = start(quantizer, "log_factor")
    found = gradient(lambda log: functional(quantizer, "log_factor")(log, x), at, direction)
    inner = (x / s + remainder > grid.qmin - z) & (x / s + remainder < grid.qmax - z)
    outer = (x / s + remainder < grid.qmin - z) | (x / s + remainder > grid.qmax - z)
    edge = ~inner & ~outer  # rounded onto the last code: inside for the quantizer, at the clamp's kink for `smooth`
    assert min(inner.sum(), outer.sum(), edge.sum()) > 3
    expected = numeric(smooth, at.detach(), direction * ~edge) + share * (direction * remainder * edge).sum() * s
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    leaf = x.clone().requires_grad_(True)
    slope = gradient(quantizer, leaf, torch.ones_like(x))
    torch.testing.assert_close(slope, share * (~outer).double() + (1 - share))


def test_a_learned_bias_moves_in_units_of_its_output():
    point = QuantPoint("b", Grid(32, True), "bias", scale_from=("x", "w"))
    bias = torch.tensor([0.5, -1.0, 2.0])
    learned_bias = LearnedBias(BiasQuantizer(point), bias, unit=torch.tensor(4.0))
    scales = torch.tensor(0.01), torch.tensor([0.02, 0.05, 0.03])
    assert torch.equal(learned_bias(bias, *scales).detach(), BiasQuantizer(point)(bias, *scales))
    learned_bias.shift.data = torch.tensor([0.1, -0.2, 0.0])
    expected = torch.tensor([0.9, -1.8, 2.0])
    torch.testing.assert_close(learned_bias.shifted(bias).detach(), expected)
    found = learned_bias(bias, *scales)
    assert float((found - expected).abs().max().detach()) <= 0.01 * 0.05 / 2 + 1e-7
    codes = found.detach() / (scales[0] * scales[1])
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-2)
    found.sum().backward()
    torch.testing.assert_close(learned_bias.shift.grad, torch.full((3,), 4.0))
