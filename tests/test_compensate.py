"""The closed-form start: its algebra against ONNX Runtime, brute force and autograd; its layers against plain rounding."""

import copy
import itertools

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import models
from models import MODELS, parse, run_ort, weights
from onnx_eptq import compensate as comp
from onnx_eptq import pipeline
from onnx_eptq.compensate import (
    Lockstep,
    Moments,
    as_rows,
    best_scale,
    can_solve,
    columns,
    compensate,
    descend,
    from_rows,
    gather,
    held_bytes,
    round_columns,
    solve,
    thinned,
)
from onnx_eptq.grid import Grid
from onnx_eptq.mirror import Probe
from onnx_eptq.pieces import function, placeholders, raw_nodes
from onnx_eptq.plan import Rules

W = weights(6)
B = W(6, fan=20)
KINDS = {
    "conv": parse(
        "(float[N,4,7,6] x) => (float[N,6,H,V] y) { y = Conv <strides=[2,1], pads=[1,0,2,1]> (x, w, b) }",
        w=W(6, 4, 3, 2),
        b=B,
    ),
    "dilated": parse(
        "(float[N,4,7,7] x) => (float[N,6,H,V] y) { y = Conv <dilations=[2,2]> (x, w, b) }", w=W(6, 4, 3, 3), b=B
    ),
    "grouped": parse(
        "(float[N,4,6,6] x) => (float[N,6,6,6] y) { y = Conv <group=2, pads=[1,1,1,1]> (x, w, b) }",
        w=W(6, 2, 3, 3),
        b=B,
    ),
    "depthwise": parse(
        "(float[N,6,6,6] x) => (float[N,6,6,6] y) { y = Conv <group=6, pads=[1,1,1,1]> (x, w, b) }",
        w=W(6, 1, 3, 3),
        b=B,
    ),
    "conv 1-D": parse("(float[N,4,9] x) => (float[N,6,H] y) { y = Conv (x, w, b) }", w=W(6, 4, 3), b=B),
    "conv 3-D": parse("(float[N,2,4,4,4] x) => (float[N,6,H,V,D] y) { y = Conv (x, w, b) }", w=W(6, 2, 2, 2, 2), b=B),
    "transposed": parse(
        "(float[N,4,5,5] x) => (float[N,6,H,V] y) { y = ConvTranspose <strides=[2,2], pads=[1,1,0,0]> (x, w, b) }",
        w=W(4, 6, 3, 3, fan=16),
        b=B,
    ),
    "gemm": parse("(float[N,4] x) => (float[N,6] y) { y = Gemm (x, w, b) }", w=W(4, 6), b=B),
    "gemm transB": parse("(float[N,4] x) => (float[N,6] y) { y = Gemm <transB=1> (x, w, b) }", w=W(6, 4), b=B),
    "tokens": parse("(float[N,5,4] x) => (float[N,5,6] y) { a = MatMul (x, w) y = Add (a, b) }", w=W(4, 6), b=B),
    "no bias": parse("(float[N,4,6,6] x) => (float[N,6,H,V] y) { y = Conv (x, w) }", w=W(6, 4, 3, 3)),
}
NO_MATRIX = {
    "grouped transposed": parse(
        "(float[N,4,5,5] x) => (float[N,6,H,V] y) { y = ConvTranspose <group=2> (x, w) }", w=W(4, 3, 3, 3)
    ),
    "weight on the left": parse("(float[N,4,3] x) => (float[N,6,3] y) { y = MatMul (w, x) }", w=W(6, 4)),
}


def quantized(proto, weight_bits=3, act_bits=8):
    """A case, its samples by batches of 16, as they fit the network's inputs."""
    found = models.quantize(proto, Rules(weight_bits, act_bits))
    samples = models.samples_of(found, 96)
    return found, [[x[i : i + 16] for x in samples] for i in range(0, 96, 16)]


@pytest.mark.parametrize("kind", KINDS)
def test_columns_times_rows_is_the_layer(kind):
    found = models.quantize(KINDS[kind])
    (layer,) = found.layers
    assert can_solve(layer)
    weight = found.teacher.constant(layer.weight.name)
    feed = models.feeds(found.proto, batch=3, count=1)[0]
    expected = torch.from_numpy(run_ort(found.proto, feed)["y"])
    if layer.bias is not None:
        bias = found.teacher.constant(layer.bias.name).flatten()
        expected = (expected.movedim(layer.output_axis, -1) - bias).movedim(-1, layer.output_axis)
    rows = as_rows(layer, weight)
    product = rows @ columns(layer, torch.from_numpy(feed["x"]), weight)
    torch.testing.assert_close(
        product.flatten(0, 1), expected.movedim(layer.output_axis, 0).flatten(1), rtol=0, atol=1e-5
    )
    assert torch.equal(from_rows(layer, rows, weight), weight)


@pytest.mark.parametrize("kind", NO_MATRIX)
def test_layers_that_are_no_matrix_are_left_alone(kind):
    found, batches = quantized(NO_MATRIX[kind])
    assert not can_solve(found.layers[0])
    before = {key: value.clone() for key, value in found.student.state_dict().items()}
    assert compensate(found.student, found.teacher, found.plan, found.layers, batches) == []
    assert all(torch.equal(value, before[key]) for key, value in found.student.state_dict().items())


def random_moments(seed=0, groups=2, rows=3, unknowns=4, count=300):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(groups, unknowns, unknowns, generator=generator, dtype=torch.float64)
    x = mix @ torch.randn(groups, unknowns, count, generator=generator, dtype=torch.float64) + 1
    w = torch.randn(groups, rows, unknowns, generator=generator, dtype=torch.float64)
    y = w @ x + 0.3 * torch.randn(groups, rows, count, generator=generator, dtype=torch.float64) - 2
    return w, x, y, Moments(x @ x.mT, y @ x.mT, x.sum(2), y.sum(2), count)


def test_solved_weights_have_no_slope():
    """They minimise the mean squared error with a free bias, plus the damping's distance from the float weights."""
    w, x, y, moments = random_moments()
    rows = w + 0.5
    found, damped = solve(rows, moments)
    centred = x - x.mean(2, keepdim=True)
    covariance = centred @ centred.mT / moments.count
    ridge = (damped - covariance).diagonal(dim1=1, dim2=2)
    assert float(ridge.min()) > 0
    at, bias = found.clone().requires_grad_(True), (y - found @ x).mean(2, keepdim=True).requires_grad_(True)
    loss = (at @ x + bias - y).square().mean(2).sum() + ((at - rows).square() * ridge[:, None, :]).sum()
    for slope in torch.autograd.grad(loss, [at, bias]):
        assert float(slope.abs().max()) < 1e-9
    moments.count *= 1000  # the same data a thousand times: the ridge falls to its floor
    for tensor in (moments.xx, moments.yx, moments.x, moments.y):
        tensor *= 1000
    assert float((solve(rows, moments)[1] - covariance).diagonal(dim1=1, dim2=2).max()) < float(ridge.max())


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize(
    ("every", "needed"), [(1, {"LEAST_ROWS": 1}), (2, {"LEAST_ROWS": 4}), (2, {"ROWS": 10**9, "MOST_ROWS": 4})], ids=str
)
def test_moments_are_sums_over_positions(monkeypatch, every, needed, counted):
    """Where there are more positions than needed, every second one of both axes is read, others in each batch."""
    found = models.quantize(KINDS["grouped"])
    (layer,) = found.layers
    weight, generator = found.teacher.constant(layer.weight.name), torch.Generator().manual_seed(0)
    monkeypatch.setattr(comp, "ROWS", 0)
    for limit, part in needed.items():
        monkeypatch.setattr(comp, limit, part if part == 10**9 else 4 * 30 * 36 // part)
    pairs = [[torch.randn(30, n, 6, 6, generator=generator) for n in (4, 6)] for _ in range(4)]
    importance = [torch.rand(30, 6, 6, generator=generator) if counted else torch.ones(30, 6, 6) for _ in pairs]
    moments = gather(layer, iter(pairs), weight, 120, importance if counted else None)
    read = [
        counts[:, i % every :: every, i % every :: every].reshape(-1).double() for i, counts in enumerate(importance)
    ]
    each = torch.cat(read)
    assert len(each) == 4 * 30 * 36 // every**2
    assert moments.count == pytest.approx(float(each.sum()))
    xs, ys = [], []
    for index, (x, y) in enumerate(pairs):
        first = index % every
        unfolded = torch.nn.functional.unfold(x, 3, padding=1).reshape(30, 36, 6, 6)
        xs.append(unfolded[:, :, first::every, first::every].movedim(1, 0).flatten(1).double())
        ys.append(y[:, :, first::every, first::every].movedim(1, 0).flatten(1).double())
    x, y = torch.cat(xs, 1), torch.cat(ys, 1)
    for group in range(2):
        part, target = x[group * 18 : group * 18 + 18], y[group * 3 : group * 3 + 3]
        torch.testing.assert_close(moments.xx[group], part * each @ part.T, rtol=1e-4, atol=1e-2)
        torch.testing.assert_close(moments.yx[group], target * each @ part.T, rtol=1e-4, atol=1e-2)
        torch.testing.assert_close(moments.x[group], part @ each, rtol=1e-4, atol=1e-2)
        torch.testing.assert_close(moments.y[group], target @ each, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_work_grows_with_the_cube_of_what_a_row_reads(kind):
    """Of G groups of R rows that read K inputs each: two factors, and every share and sweep on all rows."""
    (layer,) = models.quantize(KINDS[kind]).layers
    groups, rows, unknowns = as_rows(layer, torch.from_numpy(np.array(layer.weight.values))).shape
    passes = len(comp.SHARES) + 2 * comp.SWEEPS + 1
    assert comp.solving_cost(layer) == groups * (unknowns**3 + passes * unknowns**2 * rows)
    assert comp.solving_bytes(layer) == 8 * groups * (6 * unknowns**2 + 3 * len(comp.SHARES) * unknowns * rows)


@pytest.mark.parametrize("kind", NO_MATRIX)
def test_layers_that_are_not_solved_take_no_work(kind):
    assert all(
        comp.solving_cost(layer) == comp.solving_bytes(layer) == 0 for layer in models.quantize(NO_MATRIX[kind]).layers
    )


@pytest.mark.parametrize("parts", [8, 27])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_convolutions_of_any_dimensions_are_thinned(monkeypatch, dims, parts):
    """As far as the positions suffice: every second along three axes leaves an eighth, along one a half."""
    sides = "".join(f",{9}" for _ in range(dims))
    proto = models.parse(
        f"(float[N,2{sides}] x) => (float[N,3{sides}] y) {{ y = Conv <pads=[{','.join(['1'] * 2 * dims)}]> (x, w) }}",
        w=np.random.default_rng(0).standard_normal((3, 2, *[3] * dims)).astype(np.float32),
    )
    found = models.quantize(proto)
    (layer,) = found.layers
    weight = found.teacher.constant(layer.weight.name)
    monkeypatch.setattr(comp, "ROWS", 0)
    monkeypatch.setattr(comp, "LEAST_ROWS", 4 * 9**dims // parts)
    x, y = (torch.randn(4, n, *[9] * dims, generator=torch.Generator().manual_seed(n)) for n in (2, 3))
    moments = gather(layer, [(x, y)], weight, 4)
    as_many = 4 * 9**dims // comp.LEAST_ROWS  # times as many as are needed
    every = max(step for step in range(1, as_many + 1) if step**dims <= as_many)
    assert every > 1
    places = (slice(None), slice(None), slice(None), *[slice(None, None, every)] * dims)
    cols = columns(layer, x, weight).reshape(1, -1, 4, *[9] * dims)[places].flatten(2).double()
    assert moments.count == cols.shape[2]
    torch.testing.assert_close(moments.xx, cols @ cols.mT, rtol=1e-4, atol=1e-3)


def test_channels_that_hardly_vary_are_summed_about_their_means():
    """Their variance is a millionth of their square, and float32 sums of squares keep six digits."""
    found = models.quantize(KINDS["gemm"])
    (layer,) = found.layers
    weight, generator = found.teacher.constant(layer.weight.name), torch.Generator().manual_seed(0)
    mix = torch.randn(4, 4, generator=generator)
    pairs = [(30 + 0.01 * torch.randn(500, 4, generator=generator) @ mix,) for _ in range(4)]
    pairs = [(x, x @ weight.reshape(6, 4).T) for (x,) in pairs]
    plain = gather(layer, iter(pairs), weight, 2000)
    assert plain.is_cancelling
    about = gather(layer, iter(pairs), weight, 2000, origin=plain.means)
    x, y = (torch.cat(parts).double() for parts in zip(*pairs, strict=True))
    torch.testing.assert_close(about.means[0][0], x.mean(0), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(about.means[1][0], y.mean(0), rtol=1e-9, atol=1e-9)
    rows = as_rows(layer, weight).double() + 0.1
    covariance = solve(rows, about)[1][0]
    exact = x.T.cov(correction=0)
    share = float((covariance - exact).diagonal().mean() / exact.diagonal().mean())
    assert share == pytest.approx(comp.DAMPING * (1 + comp.FEW * 4 / 2000), rel=1e-4)
    error = (covariance - exact - torch.diag((covariance - exact).diagonal())).abs().max()
    assert float(error) < 1e-4 * float(exact.diagonal().mean())


def test_layers_behind_nearly_constant_channels_are_solved(monkeypatch):
    found, batches = quantized(KINDS["gemm"])
    batches = [[100 + 0.5 * x for x in batch] for batch in batches]
    source = found.student.quantizer("x")
    source.scale.fill_(104 / 255)
    source.zero_point.fill_(0)
    origins = []
    monkeypatch.setattr(
        comp, "gather", lambda *args, **more: origins.append(more.get("origin")) or gather(*args, **more)
    )
    solved = compensate(found.student, found.teacher, found.plan, found.layers, batches)
    assert solved == [found.layers[0].weight.name]
    assert [origin is None for origin in origins] == [True, False]
    assert all(value.isfinite().all() for value in found.student.state_dict().values())
    (layer,) = found.layers
    mean = torch.cat([source(batch[0]) for batch in batches]).mean(0)
    exact = torch.cat([batch[0] for batch in batches]).mean(0)
    weight = found.student.quantizer(layer.weight.name)(found.student.constant(layer.weight.name))
    ours = torch.nn.functional.linear(mean, weight, found.student.constant(layer.bias.name))
    theirs = torch.nn.functional.linear(
        exact, found.teacher.constant(layer.weight.name), found.teacher.constant(layer.bias.name)
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.01)


def test_rounding_goes_on_where_the_covariance_is_not_positive():
    rows, scale = torch.randn(1, 3, 4, dtype=torch.float64), torch.full((1, 3), 0.3, dtype=torch.float64)
    vectors = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    covariance = (vectors * torch.tensor([1.0, 0.5, 0.1, -1e-3], dtype=torch.float64)) @ vectors.T
    latent, error = round_columns(rows, covariance[None], scale, Grid(4, True))
    assert latent.isfinite().all()
    assert error.isfinite().all()
    sound = torch.eye(4, dtype=torch.float64)
    factors = comp._factor(torch.stack([covariance, sound]))
    assert torch.equal(factors[1], sound)
    assert factors[0].isfinite().all()


@pytest.mark.parametrize(("every", "first"), [(1, 0), (2, 0), (2, 1), (3, 2)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_thinned_layer_is_a_part_of_its_output(kind, every, first):
    found = models.quantize(KINDS[kind])
    (layer,) = found.layers
    apply = thinned(layer, every, first)
    assert (apply is not None) == (layer.node.op == "Conv")
    if apply is None:
        return
    weight = found.teacher.constant(layer.weight.name)
    feed = models.feeds(found.proto, batch=3, count=1)[0]
    x = torch.from_numpy(feed["x"])
    bias = found.teacher.constant(layer.bias.name).flatten() if layer.bias is not None else torch.zeros(6)
    expected = torch.from_numpy(run_ort(found.proto, feed)["y"]).movedim(1, -1) - bias
    places = (slice(None), *[slice(first, None, every)] * (x.ndim - 2))
    found = apply(x, weight, group=layer.node.attrs.get("group", 1))
    torch.testing.assert_close(found.movedim(1, -1), expected[places], rtol=0, atol=1e-5)
    whole = columns(layer, x, weight).reshape(-1, 3, *expected.shape[1:-1])
    part = columns(layer, x, weight, apply).reshape(-1, 3, *expected[places].shape[1:-1])
    torch.testing.assert_close(part, whole[(slice(None), *places)], rtol=0, atol=1e-5)


def quadratic(rows, codes, scale, covariance):
    gap = rows - codes * scale[..., None]
    return (gap @ covariance * gap).sum(2)


def codes_of(latent, scale, grid):
    return (latent / scale[..., None]).round().clamp(grid.qmin, grid.qmax)


def setting(seed, rows=3, unknowns=5, groups=2, bits=3):
    """Random float rows, a covariance with strong correlations, scales, and a grid."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(groups, rows, unknowns, generator=generator, dtype=torch.float64)
    mix = torch.randn(groups, unknowns, unknowns + 2, generator=generator, dtype=torch.float64)
    mix[:, :, 0] *= 3
    covariance = mix @ mix.mT / unknowns + 0.01 * torch.eye(unknowns, dtype=torch.float64)
    grid = Grid(bits, True, 0)
    return w, covariance, w.abs().amax(2) / grid.qmax * 0.8, grid


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_independent_columns_are_rounded_plainly(bits):
    w, covariance, scale, grid = setting(0, bits=bits)
    diagonal = torch.diag_embed(covariance.diagonal(dim1=1, dim2=2))
    latent, error = round_columns(w, diagonal, scale, grid)
    torch.testing.assert_close(latent, w)
    torch.testing.assert_close(error, quadratic(w, codes_of(w, scale, grid), scale, diagonal))


@given(seed=st.integers(0, 10**6), bits=st.integers(2, 5), unknowns=st.integers(1, 7))
def test_the_error_told_is_the_error_made(seed, bits, unknowns):
    w, covariance, scale, grid = setting(seed, unknowns=unknowns, bits=bits)
    latent, error = round_columns(w, covariance, scale, grid)
    found = quadratic(w, codes_of(latent, scale, grid), scale, covariance)
    torch.testing.assert_close(error, found, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("unknowns", [5, 8, 13])
def test_blocks_of_columns_change_nothing(monkeypatch, unknowns):
    w, covariance, scale, grid = setting(1, unknowns=unknowns)
    whole = [*round_columns(w, covariance, scale, grid), *descend(w, w, covariance, scale, grid)]
    monkeypatch.setattr(comp, "BLOCK", 4)
    parts = [*round_columns(w, covariance, scale, grid), *descend(w, w, covariance, scale, grid)]
    for one, two in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, two)


def test_column_by_column_beats_plain_rounding_where_columns_correlate():
    better = []
    for seed in range(20):
        w, covariance, scale, grid = setting(seed, unknowns=12)
        _, error = round_columns(w, covariance, scale, grid)
        better.append(float(error.sum() / quadratic(w, codes_of(w, scale, grid), scale, covariance).sum()))
    assert np.mean(better) < 0.6


def test_the_best_scale_is_taken_row_by_row():
    w, covariance, scale, grid = setting(3)
    latent, chosen = best_scale(w, covariance, scale, grid)
    errors = torch.stack([round_columns(w, covariance, scale * share, grid)[1] for share in comp.SHARES])
    found = quadratic(w, codes_of(latent, chosen, grid), chosen, covariance)
    torch.testing.assert_close(found, errors.min(0).values)
    assert len((chosen / scale).round(decimals=3).unique()) > 1


@given(seed=st.integers(0, 10**6), bits=st.integers(2, 5), unknowns=st.integers(1, 7))
def test_descent_never_raises_the_error(seed, bits, unknowns):
    w, covariance, scale, grid = setting(seed, unknowns=unknowns, bits=bits)
    start = w + 0.3 * torch.randn(w.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    before = quadratic(w, codes_of(start, scale, grid), scale, covariance)
    latent, fitted = descend(start, w, covariance, scale.clone(), grid)
    after = quadratic(w, codes_of(latent, fitted, grid), fitted, covariance)
    assert bool((after <= before * (1 + 1e-9) + 1e-12).all())
    assert bool((fitted > 0).all())


def test_descent_against_all_codes_there_are():
    """Four weights of two bits: 256 rows of codes, each with the scale that fits it best."""
    ratios = []
    for seed in range(40):
        w, covariance, scale, grid = setting(seed, rows=1, unknowns=4, groups=1, bits=2)
        latent, start = best_scale(w, covariance, scale, grid)
        latent, fitted = descend(latent, w, covariance, start, grid)
        found = float(quadratic(w, codes_of(latent, fitted, grid), fitted, covariance))
        all_codes = torch.tensor(list(itertools.product(range(-2, 2), repeat=4)), dtype=torch.float64)
        row, c = w[0, 0], covariance[0]
        shared = all_codes @ c @ row
        power = (all_codes @ c * all_codes).sum(1)
        errors = row @ c @ row - torch.where((shared > 0) & (power > 0), shared**2 / power, 0.0)
        ratios.append(found / float(errors.min()))
    assert min(ratios) > 1 - 1e-9
    assert np.mean(np.array(ratios) < 1 + 1e-6) > 0.2
    assert np.median(ratios) < 2


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_lockstep_sees_what_the_mirror_computes(name):
    found = models.case(name, 4, 8)
    samples = models.samples_of(found, 8)
    batches = [[x[:4] for x in samples], [x[4:] for x in samples]]
    expected = []
    for batch in batches:
        kept = {}
        Probe(found.student, lambda value, x, kept=kept: kept.setdefault(value, x)).run(*batch)
        expected.append(kept)
    steps = Lockstep(found.student, batches)
    for layer in found.layers:
        index = next(i for i, tensor in enumerate(layer.node.inputs) if tensor is layer.source)
        node = steps.source_of(layer.node.name, index)
        for environment, kept in zip(steps.environments, expected, strict=True):
            assert torch.equal(steps.value(node, environment), kept[layer.source.name])
    assert max(len(environment) for environment in steps.environments) < len(steps.nodes) / 2


def output_error(mirror, teacher, batches):
    """Mean squared error of all outputs."""
    total = 0.0
    with torch.no_grad():
        for batch in batches:
            pairs = zip(mirror(*batch), teacher(*batch), strict=True)
            total += sum(float((a - b).square().mean() / b.square().mean()) for a, b in pairs)
    return total


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_a_solved_layer_is_no_worse_than_plain_rounding(kind, bits):
    found, batches = quantized(KINDS[kind], bits)
    plain = output_error(found.student, found.teacher, batches)
    (layer,) = found.layers
    assert compensate(found.student, found.teacher, found.plan, found.layers, batches) == [layer.weight.name]
    solved = output_error(found.student, found.teacher, batches)
    assert solved <= plain
    if layer.bias is not None:  # the mean that is left went into the bias
        ends = [(mirror, raw_nodes(mirror)[layer.output.name]) for mirror in (found.student, found.teacher)]
        mine, its = (function(mirror, placeholders(mirror), [node]) for mirror, node in ends)
        gaps = [(mine(*b)[0] - its(*b)[0]).movedim(layer.output_axis, 0).flatten(1).mean(1) for b in batches]
        step = found.student.scale(layer.source.name) * found.student.scale(layer.weight.name)  # of the bias
        assert bool((sum(gaps).detach().abs() / len(batches) <= step / 2 + 1e-3).all())


@pytest.mark.parametrize("name", MODELS)
def test_solved_networks_are_nearer_than_plain_ones_and_write_their_codes(name):
    found = models.quantize(MODELS[name](), Rules(3, 8))
    samples = models.samples_of(found, 96)
    size = 1 if name == "images1d" else 16
    batches = [[x[i : i + size] for x in samples] for i in range(0, 96, size)]
    plain = output_error(found.student, found.teacher, batches)
    solved = compensate(found.student, found.teacher, found.plan, found.layers, batches)
    planned = [layer for layer in found.layers if layer.weight.name in found.plan]
    assert solved == list(dict.fromkeys(layer.weight.name for layer in planned if can_solve(layer)))
    assert output_error(found.student, found.teacher, batches) < plain * (1.5 if name == "images1d" else 0.95)
    for name_, quantized_ in found.student.export(found.plan).items():
        if name_ in solved:
            assert int(quantized_.integers.min()) >= -4
            assert int(quantized_.integers.max()) <= 3


@pytest.mark.parametrize("what", ["zero channel", "dead input", "constant input"])
def test_what_carries_nothing_stays_finite(what):
    proto = copy.deepcopy(KINDS["gemm transB"])
    found, batches = quantized(proto)
    weight = found.teacher.constant(found.layers[0].weight.name)
    with torch.no_grad():
        if what == "zero channel":
            weight[2] = 0
            found.student.constant(found.layers[0].weight.name)[2] = 0
        for (x,) in batches:
            x[:, 1] = {"zero channel": x[:, 1], "dead input": 0.0, "constant input": 0.7}[what]
    compensate(found.student, found.teacher, found.plan, found.layers, batches)
    assert all(bool(value.isfinite().all()) for value in found.student.state_dict().values())
    if what == "zero channel":
        assert not found.student.export(found.plan)[found.layers[0].weight.name].integers[2].any()


def test_bytes_alive_while_layers_are_solved():
    found = models.cached("residual")
    images = [torch.randn(4, 3, 8, 8)]
    # the second convolution reads b, [6, 4, 4], which the Add needs as well; the image is forgotten by then
    assert held_bytes(found.teacher, found.layers[1:], images) == 2 * 4 * 6 * 4 * 4
    assert held_bytes(found.teacher, found.layers, images) == 2 * 4 * 3 * 8 * 8


def test_positions_that_count_more_get_the_smaller_error():
    """A layer cannot be right at both halves of a map with opposite weights: it is at the half that counts."""
    found = models.quantize(KINDS["conv"], Rules(2, 8))
    (layer,) = found.layers
    (samples,) = models.samples_of(found, 40)
    name = layer.output.name
    shape = found.teacher(samples)[0].movedim(1, 0)[0].shape
    errors = []
    for half in (0, 1):
        counts = torch.full(shape, 1e-3)
        counts.chunk(2, 2)[half][:] = 1.0
        student = copy.deepcopy(found.student)
        uneven = samples.clone()
        uneven.chunk(2, 3)[0].mul_(-1).abs_()
        compensate(student, found.teacher, found.plan, found.layers, [[uneven]], {name: [counts]})
        error = (student(uneven)[0] - found.teacher(uneven)[0]).square().mean((0, 1))
        errors.append([float(part.mean()) for part in error.chunk(2, 1)])
    assert errors[0][0] < errors[1][0]
    assert errors[1][1] < errors[0][1]


def test_a_bias_that_stays_float_is_written_as_it_was(tmp_path):
    """Of a spectrogram the weights are low-bit, but what they read is float, and so is the bias: the file has the old one."""
    draw = weights(4)
    proto = parse(
        """(float[N,1,32] wave) => (float[N,3,h] y) {
          s = Conv <strides=[4]> (wave, basis, offset)  p = Mul(s, s)  q = Add(p, tiny)  l = Log(q)  y = Conv(l, w, b)
        }""",
        basis=draw(6, 1, 8),
        offset=draw(6, fan=6),
        tiny=np.float32(0.01),
        w=draw(3, 6, 1),
        b=draw(3, fan=3),
    )
    data = {"wave": np.random.default_rng(0).normal(1, size=(64, 1, 32)).astype(np.float32)}
    result = pipeline.quantize(proto, data, tmp_path / "q.onnx", weight_bits=3, steps=4, threads=1)  # verifies
    assert result.report.learning.kept != "rtn"
    assert "offset" in result.plan.floats
    assert "basis" in result.plan
    found = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(tmp_path / "q.onnx").graph.initializer}
    before = next(onnx.numpy_helper.to_array(t) for t in proto.graph.initializer if t.name == "offset")
    np.testing.assert_array_equal(found["offset"], before)
