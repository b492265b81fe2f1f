"""Label-Free Hessian: against exact Jacobians and Hessians by autograd, taken without the code under test."""

import numpy as np
import pytest
import torch
from torch.autograd.functional import hessian, jacobian

import models
from models import MODELS, parse, prepared, weights
from onnx_eptq import hessian as lfh
from onnx_eptq.calibrate import observe, weight_mse
from onnx_eptq.grid import Grid, QParams, fake_quantize, symmetric_qparams
from onnx_eptq.hessian import (
    capped,
    channel_importance,
    hmse_scales,
    label_free_hessian,
    log_normalised,
    position_importance,
    sample_ids,
    weigh_ranges,
    weight_hessian,
)
from onnx_eptq.mirror import Probe, build
from onnx_eptq.outputs import judged_targets, learning_targets
from onnx_eptq.plan import Rules, linear_layers, make_plan

ALL = 10**6  # probes: more than any output has elements, so that unit vectors are used
SINGLE = [name for name in MODELS if len(learning_targets(models.cached(name).graph)) == 1]
W = weights(3)


def net(text, **constants):
    graph = prepared(parse(text, **constants))
    return build(graph), graph, linear_layers(graph)


def named(name):
    found = models.cached(name)
    return found.teacher, found.graph, found.layers, models.samples_of(found, 3)


def behind(teacher, targets, value, inputs):
    """The targets as a function of what is added to a value: by an interpreter, not by the functions under test."""

    def run(shift):
        kept = {}

        def see(name, x):
            kept[name] = x + shift if name == value else x
            return kept[name]

        Probe(teacher, see).run(*inputs)
        return torch.cat([kept[name].reshape(-1) for name in targets])

    return run


def value_of(teacher, value, inputs):
    kept = {}
    Probe(teacher, lambda name, x: kept.setdefault(name, x)).run(*inputs)
    return kept[value]


def exact(teacher, graph, layer, samples):
    """Squared Jacobians, summed over outputs: per sample, shaped like the layer's output."""
    found = []
    for i in range(len(samples[0])):
        inputs = [x[i : i + 1] for x in samples]
        value = value_of(teacher, layer.output.name, inputs)
        slopes = jacobian(
            behind(teacher, learning_targets(graph), layer.output.name, inputs),
            torch.zeros_like(value),
            vectorize=False,
        )
        found.append(slopes.double().square().sum(0))
    return torch.cat(found)


@pytest.mark.parametrize("name", SINGLE)
def test_unit_vectors_give_the_exact_jacobian(name):
    teacher, graph, layers, samples = named(name)
    traces, attention = label_free_hessian(teacher, graph, layers, samples, probes=ALL)
    for layer in layers:
        squares = exact(teacher, graph, layer, samples)
        torch.testing.assert_close(traces[layer.output.name], squares.flatten(1).sum(1), rtol=1e-4, atol=1e-8)
        channels = squares.movedim(layer.output_axis, -1).reshape(len(squares), -1, squares.shape[layer.output_axis])
        torch.testing.assert_close(attention[layer.output.name], channels.mean(1).amax(1), rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("probes", [ALL, 16])
def test_two_linear_layers_by_hand(probes):
    first, second = W(7, 5), W(4, 7)
    teacher, graph, layers = net(
        "(float[N,5] x) => (float[N,4] y) { a = Gemm <transB=1> (x, w1) y = Gemm <transB=1> (a, w2) }",
        w1=first,
        w2=second,
    )
    traces, attention = label_free_hessian(teacher, graph, layers, [torch.randn(6, 5)], probes=probes)
    torch.testing.assert_close(traces["a"], torch.full((6,), float((second**2).sum()), dtype=torch.float64))
    torch.testing.assert_close(attention["a"], torch.full((6,), float((second**2).sum(0).max()), dtype=torch.float64))
    assert traces["y"].tolist() == [4] * 6
    assert attention["y"].tolist() == [1] * 6


@pytest.mark.parametrize("name", ["gemm", "residual", "images1d"])
def test_the_hessian_of_a_squared_loss_has_two_over_d_times_this_trace(name):
    teacher, graph, layers, samples = named(name)
    traces, _ = label_free_hessian(teacher, graph, layers, samples, probes=ALL)
    (target,) = learning_targets(graph)
    inputs = [x[:1] for x in samples]
    label = torch.randn_like(value_of(teacher, target, inputs)).flatten()
    for layer in layers:
        value = value_of(teacher, layer.output.name, inputs)
        run = behind(teacher, [target], layer.output.name, inputs)
        table = hessian(lambda shift, run=run: (run(shift) - label).square().mean(), torch.zeros_like(value))
        trace = table.reshape(value.numel(), -1).diagonal().sum()
        assert float(trace) == pytest.approx(2 / len(label) * float(traces[layer.output.name][0]), rel=1e-3)


def test_hutchinson_tends_to_the_exact_value():
    teacher, graph, layers, _ = named("depthwise")
    samples = [torch.randn(40, 3, 7, 7)]
    layers = layers[:1]
    expected, _ = label_free_hessian(teacher, graph, layers, samples, probes=ALL)
    errors = []
    for probes in (2, 32):
        found, _ = label_free_hessian(teacher, graph, layers, samples, probes=probes, seed=1)
        (ratio,) = (found[name] / expected[name] - 1 for name in expected)
        errors.append(float(ratio.square().mean().sqrt()))
    assert 2.5 < errors[0] / errors[1] < 6.5  # 4 = sqrt(32 / 2)
    assert errors[1] < 0.2


@pytest.mark.parametrize("name", SINGLE)
def test_a_batch_is_its_samples(name):
    teacher, graph, layers, samples = named(name)
    for together, alone in zip(
        label_free_hessian(teacher, graph, layers, samples, probes=ALL),
        label_free_hessian(teacher, graph, layers, samples, probes=ALL, batch=1),
        strict=True,
    ):
        for value, found in together.items():
            torch.testing.assert_close(found, alone[value], rtol=1e-4, atol=1e-9)


def test_seeds_decide_the_vectors():
    teacher, graph, layers, samples = named("depthwise")
    traces = [label_free_hessian(teacher, graph, layers, samples, seed=seed)[0]["a"].tolist() for seed in (0, 0, 1)]
    assert traces[0] == traces[1] != traces[2]


@pytest.mark.parametrize("name", ["residual", "matmul"])
def test_what_positions_count_is_the_mean_over_channels(monkeypatch, name):
    teacher, graph, layers, samples = named(name)
    monkeypatch.setattr(lfh, "FEW_PROBES", 1000)  # unit vectors: exact
    found = position_importance(teacher, graph, layers, samples, batch=2)
    assert judged_targets(graph) == learning_targets(graph)  # which `exact` differentiates
    for layer in layers:
        slopes = exact(teacher, graph, layer, samples).movedim(layer.output_axis, 0).mean(0)
        expected = 1 - lfh.LEANING + lfh.LEANING * slopes / slopes.mean()
        parts = found[layer.output.name]
        assert [len(part) for part in parts] == [2 * len(expected) // 3, len(expected) // 3]
        torch.testing.assert_close(torch.cat(parts).double(), expected, rtol=1e-4, atol=1e-6)
        assert float(torch.cat(parts).mean()) == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize("name", ["residual", "matmul"])
def test_what_channels_count_is_the_sum_over_positions(monkeypatch, name):
    teacher, graph, layers, samples = named(name)
    monkeypatch.setattr(lfh, "FEW_PROBES", 1000)  # unit vectors: exact
    found = channel_importance(teacher, graph, layers, samples, batch=2)
    assert set(found) == {layer.output.name for layer in layers}
    for layer in layers:
        slopes = exact(teacher, graph, layer, samples).movedim(layer.output_axis, 0).flatten(1).sum(1)
        torch.testing.assert_close(found[layer.output.name], slopes / len(samples[0]), rtol=1e-4, atol=1e-6)


def test_positions_behind_which_no_gradient_is_left_count_alike():
    teacher, graph, layers = net(
        "(float[N,4] x) => (float[N,3] y) { a = Gemm(x, w, b) r = Relu(a) y = Gemm(r, v) }",
        w=W(4, 6), b=np.full(6, -99, np.float32), v=W(6, 3),
    )  # fmt: skip
    found = position_importance(teacher, graph, layers, [torch.randn(5, 4)])
    assert set(found) == {layers[1].output.name}


def slopes_at(teacher, graph, value, samples):
    """Squared Jacobians of the outputs with respect to a value, summed over outputs; shaped like it."""
    found = []
    for i in range(len(samples[0])):
        inputs = [x[i : i + 1] for x in samples]
        shift = torch.zeros_like(value_of(teacher, value, inputs))
        slopes = jacobian(behind(teacher, learning_targets(graph), value, inputs), shift, vectorize=False)
        found.append(slopes.double().square().sum(0))
    return torch.cat(found)


@pytest.mark.parametrize("name", ["residual", "concat", "matmul"])
def test_ranges_weigh_elements_by_their_exact_gradients(monkeypatch, name):
    """By an interpreter and autograd's Jacobians; values of one grid are counted in one histogram, each by its gradients."""
    monkeypatch.setattr(lfh, "FEW_PROBES", ALL)  # unit vectors
    found = models.cached(name)
    samples = models.samples_of(found, 3)
    stats = observe(found.teacher, found.plan, found.layers, found.batches)
    weigh_ranges(found.teacher, found.graph, found.plan, stats, samples, batch=2)
    points = [point for point in found.plan.values() if point.role == "activation" and not point.moved]
    for root, histogram in stats.histograms.items():
        expected = torch.zeros(4096, dtype=torch.float64)
        for point in points:
            if root in (point.value, point.tied_to):
                slopes = slopes_at(found.teacher, found.graph, point.value, samples)
                value = torch.cat(
                    [value_of(found.teacher, point.value, [x[i : i + 1] for x in samples]) for i in range(3)]
                )
                expected += torch.bincount(histogram.bins_of(value).flatten(), slopes.flatten(), 4096)
        if root == "shares":  # behind the Softmax at the end
            assert histogram.importance is None
            continue
        expected /= expected.sum()
        assert histogram.importance is not None
        assert float((histogram.importance - expected).abs().sum()) < 1e-5


def test_ranges_that_no_gradient_reaches_stay_as_they_are():
    teacher, graph, layers = net(
        "(float[N,4] x) => (float[N,3] y) { a = Gemm(x, w, b) r = Relu(a) y = Gemm(r, v) }",
        w=W(4, 6), b=np.full(6, -99, np.float32), v=W(6, 3),
    )  # fmt: skip
    plan = make_plan(graph, models.TARGETS["onnxruntime"], Rules(8, 8))
    data = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)
    stats = observe(teacher, plan, layers, [{"x": data}])
    weigh_ranges(teacher, graph, plan, stats, [torch.from_numpy(data)])
    reached = {value: histogram.importance is not None for value, histogram in stats.histograms.items()}
    assert reached == {"x": False, "r": True, "y": True}
    assert stats.histograms["x"].weighted() is stats.histograms["x"]


def test_a_large_head_does_not_drown_a_small_one():
    def shares(factor):
        teacher, graph, layers = net(
            """(float[N,4] x) => (float[N,3] y, float[N,2] z) {
              a = Gemm(x, w) b = Relu(a) y = Gemm(b, v) c = Gemm(x, u) d = Relu(c) z = Gemm(d, t) }""",
            **CONSTANTS,
            t=CONSTANT_T * factor,
        )
        traces, _ = label_free_hessian(teacher, graph, layers, [SAMPLES])
        return {name: float(traces[name].mean()) for name in ("a", "c")}

    small, large = shares(np.float32(1)), shares(np.float32(1000))
    assert small["a"] > 0
    assert large == pytest.approx(small, rel=1e-4)


CONSTANTS = {"w": W(4, 6), "v": W(6, 3), "u": W(4, 6)}
CONSTANT_T = W(6, 2)
SAMPLES = torch.randn(9, 4, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("name", ["gemm", "residual", "matmul", "transposed"])
def test_weights_against_jacobians_of_single_samples(name):
    teacher, graph, layers, samples = named(name)
    found = weight_hessian(teacher, graph, layers, samples, probes=ALL, batch=1)
    (target,) = learning_targets(graph)
    for layer in layers:
        weight, expected = teacher.constant(layer.weight.name), 0
        for i in range(3):

            def run(w, i=i, layer=layer):
                kept = {}
                key = teacher.constants[layer.weight.name]
                parameter = getattr(teacher, key)
                delattr(teacher, key)
                setattr(teacher, key, w)
                try:
                    Probe(teacher, lambda name, x: kept.setdefault(name, x)).run(*[x[i : i + 1] for x in samples])
                finally:
                    delattr(teacher, key)
                    teacher.register_parameter(key, parameter)
                return kept[target].flatten()

            expected = expected + jacobian(run, weight.detach().clone()).double().square().sum(0) / 3
        torch.testing.assert_close(found[layer.weight.name], expected, rtol=1e-4, atol=1e-8)
        assert not weight.requires_grad


def test_whole_batches_estimate_the_same_weights():
    teacher, graph, layers, _ = named("residual")
    samples = [torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(0))]
    single = weight_hessian(teacher, graph, layers, samples, batch=1)
    whole = weight_hessian(teacher, graph, layers, samples, probes=256, batch=24)
    for name, expected in single.items():
        assert float((whole[name] - expected).norm() / expected.norm()) < 0.2
        assert float(whole[name].sum() / expected.sum()) == pytest.approx(1, abs=0.1)


def test_log_normalised_layers():
    traces = {"a": torch.tensor([1.0, 10.0]), "b": torch.tensor([10.0, 100.0]), "c": torch.tensor([100.0, 1000.0])}
    for normalise in (True, False):  # the two samples differ by a factor only
        assert log_normalised(traces, normalise) == pytest.approx({"a": 0, "b": 1, "c": 2}, abs=1e-6)
    traces["c"] = torch.tensor([100.0, 0.0])
    shares = [[1 / 111, 10 / 110], [10 / 111, 100 / 110], [100 / 111, 0]]
    logs = np.log10(np.mean(shares, 1))
    assert log_normalised(traces) == pytest.approx(dict(zip("abc", logs - logs.min(), strict=True)), abs=1e-6)
    assert log_normalised({"a": torch.zeros(2), "b": torch.ones(2)}) == pytest.approx({"a": 0, "b": 0})


def test_the_last_layer_is_capped():
    scores = {"a": torch.tensor([0.1, 0.3]), "b": torch.tensor([0.5, 0.1]), "y": torch.tensor([1.0, 1.0])}
    found = capped(scores, ["y"])
    assert float(found["y"].mean()) == pytest.approx(0.3)
    assert all(torch.equal(found[name], scores[name]) for name in "ab")
    assert torch.equal(capped({"y": scores["y"]}, ["y"])["y"], scores["y"])


def test_sample_choice_is_seeded_and_ordered():
    ids = sample_ids(50, 20, 3)
    assert len(set(ids.tolist())) == 20
    assert torch.equal(ids, ids.sort().values)
    assert torch.equal(ids, sample_ids(50, 20, 3))
    assert not torch.equal(ids, sample_ids(50, 20, 4))
    assert sample_ids(5, 20, 0).tolist() == list(range(5))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_hmse_against_brute_force(bits):
    found = models.cached("residual", bits, 8)
    sensitivity = {
        layer.weight.name: torch.rand(layer.weight.shape, dtype=torch.float64).square() for layer in found.layers
    }
    for name, qparams in hmse_scales(found.plan, found.teacher, sensitivity).items():
        weight = found.teacher.constant(name).detach()
        h = sensitivity[name] + 1e-3 * sensitivity[name].mean()
        grid = found.plan[name].grid
        for channel in range(weight.shape[grid.axis]):
            row, counts = (x.select(grid.axis, channel).flatten() for x in (weight, h))
            candidates = [
                symmetric_qparams(row.abs().max() * share, Grid(bits, True)).scale
                for share in torch.linspace(1.1, 0.2, 60).tolist()
            ]

            def error(scale, row=row, counts=counts):
                codes = (row / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
                return float(((codes * scale - row).double().square() * counts).sum())

            assert error(qparams.scale[channel]) <= min(map(error, candidates)) * (1 + 1e-5)


def test_channels_do_not_see_each_other_and_even_importance_is_plain():
    teacher, graph, (layer,) = net("(float[N,4] x) => (float[N,6] y) { y = Gemm(x, w) }", w=CONSTANTS["w"])
    plan, name = make_plan(graph, models.ORT_TARGET, Rules(3, 8)), layer.weight.name
    weight, grid = teacher.constant(name).detach(), plan[name].grid

    def scales(importance):
        return hmse_scales(plan, teacher, {name: importance.double()})[name]

    plain = weight_mse(weight, grid)
    for constant in (0.3, 0.0):
        torch.testing.assert_close(scales(torch.full(weight.shape, constant)).scale, plain.scale, rtol=0, atol=0)
    importance = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) ** 4
    before = scales(importance)
    errors = [
        float(((fake_quantize(weight, QParams(q.scale, q.zero_point), grid) - weight).square() * importance).sum())
        for q in (before, plain)
    ]
    assert errors[0] < errors[1]
    with torch.no_grad():
        channel = teacher.constant(name).select(grid.axis, 2)
        channel.mul_(torch.linspace(0.1, 9, len(channel)))
    assert (before.scale != scales(importance).scale).nonzero().flatten().tolist() == [2]
