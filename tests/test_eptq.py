"""Learning end to end on tiny models: the guard, every method, gradients of the loss, exports, interruptions."""

import copy
import json
import math
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import safetensors
import torch
import torch.nn.functional as F

import models
import onnx_eptq
from models import MODELS, f32, i64, parse, weights
from onnx_eptq import checkpoint, eptq, pieces, pipeline
from onnx_eptq.compensate import compensate
from onnx_eptq.eptq import Judge, Learner
from onnx_eptq.errors import UsageError
from onnx_eptq.methods import EFFORTS, METHODS, Method, Stage
from onnx_eptq.mirror import BiasQuantizer, Quantizer
from onnx_eptq.outputs import judged_targets
from onnx_eptq.plan import Rules
from onnx_eptq.rounding import ROUNDINGS, LearnedBias, LearnedScale

LEARNED = sorted(set(METHODS) - {"rtn"})
LAYERS = Method((Stage("layer", "latent", weight_rate=0.015, scale_rate=0.0045, bias_rate=0.0045),), "rtn")
BLOCKS = Method((Stage("block", "latent", activations="drop", weight_rate=0.05),))  # with random choices
TWICE = Method((Stage("layer", "latent", weight_rate=0.02), Stage("block", "frozen"), Stage("network", "latent", kl=1)))
W = weights(20)
ODD = {
    "softmax": parse(
        "(float[N,4] x) => (float[N,5] y) { a = Gemm(x, w, b) r = Relu(a) s = Gemm(r, v) y = Softmax(s) }",
        w=W(4, 6),
        b=W(6),
        v=W(6, 5),
    ),
    "sigmoid": parse(
        "(float[N,4] x) => (float[N,1] y) { a = MatMul(x, w) r = Relu(a) s = MatMul(r, v) y = Sigmoid(s) }",
        w=W(4, 6),
        v=W(6, 1),
    ),
    "argmax": parse(
        """(float[N,4] x) => (int64[N] y) {
          a = MatMul(x, w) r = Relu(a) s = MatMul(r, v) y = ArgMax <axis=1, keepdims=0> (s) }""",
        w=W(4, 6),
        v=W(6, 5),
    ),
    "two heads": parse(
        """(float[N,4] x) => (float[N,3] y, float[N,2,6] z) {
          a = Gemm(x, w) r = Relu(a) y = Gemm(r, v) s = Gemm(r, u) z = Reshape(s, shape) }""",
        w=W(4, 6),
        v=W(6, 3),
        u=W(6, 12) * 100,
        shape=i64(-1, 2, 6),
    ),
    "shared weight": parse(
        "(float[N,6] x) => (float[N,6] y) { a = MatMul(x, w) r = Relu(a) b = MatMul(r, w) q = Relu(b) y = MatMul(q, w) }",
        w=W(6, 6),
    ),
    "zero channel": parse(
        "(float[N,3] x) => (float[N,2] y) { a = Gemm <transB=1> (x, w, b) r = Relu(a) y = Gemm(r, v) }",
        w=np.array([[0, 0, 0], [1, -1, 0.5], [0.2, 0, 1]], np.float32),
        b=f32(1, 0.1, 0),
        v=W(3, 2),
    ),
    "dead relu": parse(
        "(float[N,4] x) => (float[N,3] y) { a = Gemm(x, w, b) r = Relu(a) y = Gemm(r, v, c) }",
        w=W(4, 6),
        b=np.full(6, -99, np.float32),
        v=W(6, 3),
        c=f32(1, 2, 3),
    ),
    "dead output": parse(
        "(float[N,4] x) => (float[N,3] y) { a = Gemm(x, w) r = Relu(a) s = Gemm(r, v, c) y = Relu(s) }",
        w=W(4, 6),
        v=W(6, 3),
        c=np.full(3, -99, np.float32),
    ),
    "one layer": parse("(float[N,4] x) => (float[N,3] y) { y = Gemm(x, w) }", w=W(4, 3)),
    "grouped": parse(
        """(float[N,4,6,6] x) => (float[N,6,6,6] y) {
          a = Conv <group=2, pads=[1,1,1,1]> (x, w) r = Relu(a) y = Conv <group=6, pads=[1,1,1,1]> (r, v) }""",
        w=W(6, 2, 3, 3),
        v=W(6, 1, 3, 3),
    ),
}
EVERY = {**{name: make() for name, make in MODELS.items()}, **ODD}


@pytest.fixture(autouse=True)
def _all_checks(monkeypatch):
    """Runs of a few steps look at the held-out samples as often as long ones do."""
    monkeypatch.setattr(eptq, "CHECK_STEPS", 1)


def case(name, weight_bits=3, act_bits=8):
    """A plainly rounded model whose parts may be changed."""
    return models.quantize(copy.deepcopy(EVERY[name]), Rules(weight_bits, act_bits))


def learn(found, method, **options):
    """A finished learner; the case's student is what it learned."""
    learner = Learner(models.problem(found, method, **options), found.student)
    losses = list(learner)
    assert all(np.isfinite(losses))
    assert len(losses) == learner.total >= learner.learning.steps > 0
    return learner


def distance_of(learner, student):
    return learner.judge.distance(student)


def test_the_tables_agree():
    for method in METHODS.values():
        for stage in method.stages:
            assert stage.scope in pieces.SCOPES
            assert stage.rounding in ROUNDINGS
    assert METHODS["rtn"] == Method()
    assert EFFORTS["fast"].steps < EFFORTS["default"].steps < EFFORTS["thorough"].steps


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("method", ["eptq", "brecq", "eptq-v2"])
def test_odd_and_tiny_models_learn_and_get_no_worse(name, method):
    found = case(name)
    learner = learn(found, method, steps=4)
    distances = learner.learning.distances
    after = distance_of(learner, found.student)
    assert np.isfinite(after)
    assert after <= distances["rtn"]
    kept = learner.learning.kept
    assert after == pytest.approx(distances[kept], rel=1e-4, abs=1e-9)
    assert distances[kept] == min(distances[name] for name in {kept, *eptq.STARTS} if name in distances)
    assert all(bool(value.isfinite().all()) for value in found.student.state_dict().values())


def test_plain_rounding_is_judged_with_its_own_scales():
    """EPTQ v2 begins with ranges by HMSE, which may be worse than those that are configured."""
    data = np.random.default_rng(0).standard_normal((64, 3, 8, 8), dtype=np.float32)
    first, second = (
        onnx_eptq.quantize(models.residual(), data, weight_bits=2, method=method, steps=2, threads=1).report.learning
        for method in ("eptq-v1", "eptq-v2")
    )
    assert first.distances["rtn"] == second.distances["rtn"]


def test_learning_begins_with_the_state_that_the_method_begins_with():
    found = case("gemm")
    problem = models.problem(found, "eptq-v2", steps=1)
    problem.begun = {key: value.clone() for key, value in found.student.state_dict().items()}
    scale = next(key for key, value in problem.begun.items() if "scale" in key and value.is_floating_point())
    problem.begun[scale] *= 1.25
    learner = Learner(problem, found.student)
    learner._start()
    torch.testing.assert_close(found.student.state_dict()[scale], problem.begun[scale])
    assert learner.learning.distances.keys() == {"rtn"}


STEPS = {"adaround": 400, "brecq": 400, "qdrop": 400}  # rates of these methods are made for many


@pytest.mark.parametrize("name", ["residual", "matmul"])
@pytest.mark.parametrize("method", LEARNED)
def test_every_method_learns(name, method):
    found = case(name, 3, 8)
    learner = learn(found, method, steps=STEPS.get(method, 60))
    distances = learner.learning.distances
    assert min(distances, key=distances.__getitem__) not in eptq.STARTS
    assert learner.learning.seconds > 0
    assert learner.learning.curve


@pytest.mark.parametrize("method", [replace(METHODS["eptq"], start="rtn"), "eptq-v1"], ids=["latent", "soft"])
def test_steps_in_chunks_are_steps_of_the_whole_batch(method):
    """A model that runs four samples at a time learns from sixteen as one that takes them at once."""
    students = []
    for chunk in (0, 4):
        found = case("residual", 3, 8)
        learner = Learner(replace(models.problem(found, method, steps=5), chunk=chunk), found.student)
        losses = torch.stack(list(learner))
        students.append((losses, learner.learning.distances))
    torch.testing.assert_close(students[0][0], students[1][0], rtol=1e-3, atol=1e-5)
    for name, distance in students[0][1].items():
        assert students[1][1][name] == pytest.approx(distance, rel=0.05)


@pytest.mark.parametrize("images", [False, True], ids=["rows", "images"])
@pytest.mark.parametrize("method", ["eptq", "eptq-v1", "eptq-v2", "adaquant", "qdrop"])
def test_mapped_steps_are_steps_of_one_sample_after_another(method, images):
    """Also where values within the model have no axis of samples; QDrop draws otherwise, but learns."""
    students = []
    for mapped in (False, True):
        found = models.quantize(models.one_image() if images else models.collapsed(), Rules(3, 8))
        problem = replace(models.problem(found, method, steps=5), chunk=1, mapped=mapped)
        if images:
            problem.samples = [x.to(memory_format=torch.channels_last) for x in problem.samples]
        problem.effort = replace(problem.effort, batch=16)
        learner = Learner(problem, found.student)
        losses = torch.stack(list(learner))
        assert learner.running is None
        students.append((losses, learner.learning.distances))
    if method == "qdrop":
        assert students[1][0].isfinite().all()
        return
    torch.testing.assert_close(students[0][0], students[1][0], rtol=1e-3, atol=1e-5)
    for name, distance in students[0][1].items():
        assert students[1][1][name] == pytest.approx(distance, rel=0.05)


def test_falling_rates_shrink_with_the_batch():
    """By the square root of its share of 32; constant rates, as published methods have them, stay."""
    for method, share in (("eptq", 0.5), ("eptq-v1", 1.0)):
        rates = {}
        for batch in (8, 32):
            found = case("residual")
            problem = models.problem(found, method)
            problem.effort = replace(problem.effort, batch=batch)
            learner = Learner(problem, found.student)
            next(iter(learner))
            assert learner.running is not None
            rates[batch] = learner.running.optimizer.param_groups[0]["lr"]
        assert rates[8] == pytest.approx(share * rates[32])


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("weighting", ["none", "mse", "lfh", "sla"])
def test_roundings_and_weightings_combine(rounding, weighting):
    found = case("residual", 2, 4)
    stage = Stage("network", rounding, weighting=weighting, weight_rate=0.2 if rounding == "soft" else 0.02)
    learner = learn(found, Method((stage,)), steps=40)
    assert distance_of(learner, found.student) < learner.learning.distances["rtn"]


@pytest.mark.parametrize("start", ["rtn", "float", "compensated"])
@pytest.mark.parametrize("scope", pieces.SCOPES)
@pytest.mark.parametrize("rate", [30.0, 1e9])
def test_bad_learning_is_thrown_away(start, scope, rate):
    found = case("residual", 4, 8)
    plain = {key: value.clone() for key, value in found.student.state_dict().items()}
    stage = Stage(
        scope, "latent", weight_rate=rate, scale_rate=rate, bias_rate=rate, step_rate=rate, constant=True, kl=0.1
    )
    learner = Learner(models.problem(found, Method((stage,), start), steps=12), found.student)
    for _ in learner:
        pass
    assert learner.learning.kept in eptq.STARTS
    assert all(isinstance(found.student.quantizer(v), Quantizer | BiasQuantizer) for v in found.student.quantizers)
    if start != "compensated":
        assert all(torch.equal(value, plain[key]) for key, value in found.student.state_dict().items())
    else:
        assert distance_of(learner, found.student) <= learner.learning.distances["rtn"]


@pytest.mark.parametrize("best", ["compensated", "weighted"])
def test_learning_begins_at_the_better_start(monkeypatch, best):
    """Each start is solved from plain rounding, not from the other one; the worse is forgotten."""
    found = case("residual")
    rounded = {key: value.clone() for key, value in found.student.state_dict().items()}
    learner = Learner(models.problem(found, "eptq", steps=2), found.student)
    weight = found.layers[0].weight.name
    begun = []

    def solved(student, teacher, plan, layers, batches, importance, *others):
        begun.append(all(torch.equal(value, rounded[key]) for key, value in student.state_dict().items()))
        compensate(student, teacher, plan, layers, batches, importance, *others)
        if (best == "weighted") != bool(importance):
            student.constant(weight).mul_(-1)

    monkeypatch.setattr(eptq, "compensate", solved)
    learner._start()
    assert begun == [True, True]
    assert learner.learning.kept == best
    agree = (found.student.constant(weight) * found.teacher.constant(weight)).sum()
    assert float(agree) > 0


def test_the_fast_effort_solves_once():
    assert EFFORTS["fast"].starts == 1
    learner = learn(case("residual"), "eptq", steps=2, starts=1)
    assert "weighted" in learner.learning.distances
    assert "compensated" not in learner.learning.distances


def test_the_written_file_is_plain_rounding_when_nothing_better_is_found(tmp_path, monkeypatch):
    stage = Stage("network", "latent", weight_rate=1e6, scale_rate=1e6, constant=True)
    monkeypatch.setitem(METHODS, "qdrop", Method((stage,)))
    data = {"x": np.random.default_rng(0).standard_normal((64, 4)).astype(np.float32)}
    settings = {"weight_bits": 4, "threads": 1, "steps": 5}
    plain = onnx_eptq.quantize(ODD["softmax"], data, tmp_path / "a.onnx", method="rtn", **settings)
    found = onnx_eptq.quantize(ODD["softmax"], data, tmp_path / "b.onnx", method="qdrop", **settings)
    assert found.report.learning.kept == "rtn"
    assert any("nothing better than plain rounding" in warning for warning in found.report.warnings)
    assert list(found.model.graph.initializer) == list(plain.model.graph.initializer)


TARGETS = {"softmax": ["s"], "sigmoid": ["s"], "argmax": ["s"], "two heads": ["y", "z"]}


@pytest.mark.parametrize("name", TARGETS)
def test_what_is_distilled_and_judged(name):
    found = case(name)
    learner = learn(found, "eptq", steps=2)
    assert sorted(learner.learning.targets) == TARGETS[name]
    # Behind a Sigmoid there is less gradient, but that is what users get.
    outputs = [tensor.name for tensor in found.graph.outputs]
    assert sorted(learner.judge.targets) == (outputs if name == "sigmoid" else TARGETS[name])


def test_distance_by_hand():
    found = case("two heads")
    samples = models.samples_of(found, 20)
    judge = Judge(found.teacher, found.graph, ["y", "z"], samples, batch=7)
    assert judge.distance(found.teacher) == 0
    raw = [pieces.raw_nodes(mirror) for mirror in (found.teacher, found.student)]
    pairs = [
        pieces.function(mirror, pieces.placeholders(mirror), [nodes["y"], nodes["z"]])(*samples)
        for mirror, nodes in zip((found.teacher, found.student), raw, strict=True)
    ]
    total = sum(float((a - b).square().sum() / a.square().sum()) for a, b in zip(*pairs, strict=True))
    p, q = (F.softmax(side[0], 1) for side in pairs)
    total += float((p * (p / q).log()).sum(1).mean())  # y is a distribution, z of [2, 6] is none
    assert judge.distance(found.student) == pytest.approx(total, rel=1e-4)
    with torch.no_grad():
        found.student.constant(found.layers[0].weight.name).fill_(float("nan"))
    assert judge.distance(found.student) == float("inf")


@pytest.mark.parametrize(("end", "axis"), [("Softmax(h)", 2), ("Softmax <axis=1> (h)", 1), ("Sigmoid(h)", None)])
def test_divergence_is_along_the_axis_of_the_classes(end, axis):
    """Of a sequence at every position; scores that no Softmax compares have none."""
    draw = weights(5)
    text = f"(float[N,5,6] x) => (float[N,5,4] y) {{ a = MatMul(x, w) b = Relu(a) h = MatMul(b, v) y = {end} }}"
    found = models.quantize(parse(text, w=draw(6, 8), v=draw(8, 4)), Rules(3, 8))
    samples = models.samples_of(found, 12)
    judge = Judge(found.teacher, found.graph, ["h"], samples, batch=5)
    a, b = (
        pieces.function(mirror, pieces.placeholders(mirror), [pieces.raw_nodes(mirror)["h"]])(*samples)[0]
        for mirror in (found.teacher, found.student)
    )
    total = float((a - b).square().sum() / a.square().sum())
    if axis is not None:
        p, q = a.softmax(axis), b.softmax(axis)
        total += float((p * (p / q).log()).sum(axis).mean())
    assert judge.distance(found.student) == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize(("gap", "axis"), [(0.0, 1), (20.0, 1), (200.0, None)])
def test_measured_quantities_are_no_scores(gap, axis):
    """[samples, 5]: a Softmax of numbers that far apart would look at the largest alone."""
    z = torch.from_numpy(weights(9)(40, 5))
    z[torch.arange(40), torch.arange(40) % 5] += gap
    assert eptq.distribution_axis(z) == axis
    assert eptq.distribution_axis(z.reshape(40, 5, 1, 1)) == axis
    assert eptq.distribution_axis(z, known=1) == 1  # which a Softmax reads
    assert eptq.distribution_axis(z[:, :1]) is None
    assert eptq.distribution_axis(z[:0]) is None


def test_no_distance_is_below_zero():
    """In float32 the divergence of what is almost the same is a sum of errors of rounding, of either sign."""
    draw = weights(5)
    found = models.quantize(parse("(float[N,6] x) => (float[N,10] y) { y = MatMul(x, w) }", w=draw(6, 10)))
    judge = Judge(found.teacher, found.graph, ["y"], models.samples_of(found, 64), batch=64)
    weight = found.teacher.constant(found.layers[0].weight.name)
    with torch.no_grad():
        for _ in range(5):
            close = copy.deepcopy(found.teacher)
            close.constant(found.layers[0].weight.name).copy_(weight * (1 + 1e-6 * torch.randn_like(weight)))
            losses = judge.losses(close)
            assert float(losses.min()) >= 0
            assert 0 < float(losses.mean()) < 1e-10


def test_the_last_layer_is_capped_whatever_moves_its_elements():
    draw = weights(5)
    text = "(float[N,6] x) => (float[N,k,2] y) { a = MatMul(x, w) b = Relu(a) h = Gemm(b, v) y = Reshape(h, pairs) }"
    found = models.quantize(parse(text, w=draw(6, 8), v=draw(8, 10) * np.float32(0.1), pairs=i64(0, 5, 2)))
    problem = models.problem(found, "eptq-v2", count=16)
    stage = replace(METHODS["eptq-v2"].stages[-1], last="cap")
    assert stage.weighting == "sla"
    values = [torch.ones(16, 8), torch.ones(16, 10)]
    first, last = (c.double().mean() / values[i].shape[1] for i, c in enumerate(
        eptq._coefficients(problem, stage, values, found.layers)))  # fmt: skip
    assert float(last) <= float(first) * (1 + 1e-6)


def test_what_is_learned_replaces_a_start_by_more_than_chance():
    """The paired gain against its standard error, as a t statistic would be."""
    generator = torch.Generator().manual_seed(3)
    kept = torch.rand(40, generator=generator, dtype=torch.float64)
    noise = torch.randn(40, generator=generator, dtype=torch.float64)
    noise -= noise.mean()
    error = float(noise.std()) / 40**0.5
    for share, better in ((0.9, False), (1.1, True)):
        losses = kept - noise - share * error
        assert (eptq.gain(losses, kept, errors=1) > 0) is better
        assert eptq.gain(losses, kept) == pytest.approx(share * error)
    worse = torch.full((40,), math.nan, dtype=torch.float64)
    assert eptq.gain(worse, kept) < 0 < eptq.gain(kept, worse)
    assert eptq.gain(worse, worse) < 0


def test_one_lucky_sample_does_not_replace_the_start():
    """A candidate whose mean is lower only because of one sample is not kept, unless another learned one is replaced."""
    found = case("residual")
    learner = Learner(models.problem(found, "eptq", steps=4), found.student)
    learner._keep("rtn")
    start = learner.losses
    lucky = start * 1.1
    lucky[0] = start[0] - 0.12 * start.sum()
    assert lucky.mean() < start.mean()
    learner.judge.losses = lambda student: lucky
    learner._keep("1 network/latent")
    assert learner.learning.kept == "rtn"
    assert learner.learning.distances["1 network/latent"] < learner.learning.distances["rtn"]
    learner.judge.losses = lambda student: start * 0.9
    learner._keep("1 network/latent")
    assert learner.learning.kept == "1 network/latent"
    learner.judge.losses = lambda student: lucky * 0.7
    learner._keep("2 network/frozen")
    assert learner.learning.kept == "2 network/frozen"


# ---- one piece, before and while it learns


def piece_of(found, stage, **options):
    """The whole network as one running piece."""
    problem = models.problem(found, Method((stage,)), **options)
    (whole,) = pieces.pieces(found.graph, found.layers, "network", set())
    names = [tensor.name for tensor in found.graph.inputs]
    kept = dict(zip(names, problem.samples, strict=True))
    return eptq._Piece(problem, found.student, stage, whole, True, kept, kept, set())


@pytest.mark.parametrize("name", MODELS)
def test_without_any_quantization_the_student_is_the_teacher(name):
    found = case(name, 8)
    running = piece_of(found, Stage("network", "soft", activations="gradual", kl=1.0, regularizer=0))
    running.parts.schedule(running.stage, 0.0)
    assert {a.share for a in running.parts.activations.values()} <= {0.0}
    index = torch.arange(8) if name != "images1d" else torch.arange(1)
    for found_, expected in zip(running.student(*running.inputs(index)), running._expected(index), strict=True):
        torch.testing.assert_close(found_.detach(), expected, rtol=0, atol=5e-3)
    running.parts.schedule(running.stage, 1.0)
    assert {a.share for a in running.parts.activations.values()} <= {1.0}


def rates(parts, stage):
    """Learning rate by parameter, from the optimiser's groups."""
    return {id(parameter): group["peak"] for group in parts.groups(stage) for parameter in group["params"]}


@pytest.mark.parametrize(("weight_bits", "act_bits"), [(2, 4), (4, 8), (8, 4), (8, 8)])
def test_rates_of_finer_grids_are_lower(weight_bits, act_bits):
    """One update moves the largest code by the same share of a step at every width above 4."""
    stage = Stage("network", "latent", scale_rate=0.02, bias_rate=0.03, step_rate=0.04, finer=True)
    found = case("residual", weight_bits, act_bits)
    parts = piece_of(found, stage).parts
    by_width = rates(parts, stage)
    plain = rates(parts, replace(stage, finer=False))
    assert set(by_width) == set(plain)
    for weight in parts.weights.values():
        bits = weight.point.grid.bits
        assert by_width[id(weight.log_factor)] * 2.0 ** max(bits, 4) == pytest.approx(0.02 * 16)
        assert plain[id(weight.log_factor)] == 0.02
        assert {by_width[id(p)] for n, p in weight.named_parameters() if n != "log_factor"} == {stage.weight_rate}
    for activation in parts.activations.values():
        assert by_width[id(activation.log_factor)] * 2.0 ** max(activation.point.grid.bits, 4) == pytest.approx(
            0.04 * 16
        )
    first = found.layers[0]  # the network's input has 8 bits
    for layer in found.layers:
        if layer.bias is not None and layer.bias.name in parts.biases:
            bits = min(weight_bits, 8 if layer is first else act_bits)
            assert by_width[id(parts.biases[layer.bias.name].shift)] * 2.0 ** max(bits, 4) == pytest.approx(0.03 * 16)
    assert not rates(parts, replace(stage, scale_rate=0, bias_rate=0, step_rate=0, weight_rate=0))


def test_outputs_are_compared_behind_a_final_sigmoid():
    """An error of scores that are near 0 and stay there costs nothing."""
    found = case("sigmoid")
    running = piece_of(found, Stage("network", "latent", features=0, kl=1.0))
    index = torch.arange(8)
    expected = running._expected(index)
    assert judged_targets(found.graph) == [found.graph.outputs[0].name]
    assert all(bool(((value >= 0) & (value <= 1)).all()) for value in expected)
    with torch.no_grad():
        (mine,) = running.student(*running.inputs(index))
        error = (mine - expected[0]).square().mean() / expected[0].square().mean()
        assert float(running.loss(index, 0, 1)) == pytest.approx(float(error), rel=1e-4)


def test_the_schedule_of_activation_quantization():
    found = case("residual")
    running = piece_of(found, Stage("network", "soft"))
    for kind, done, share, drop in (
        ("all", 0.0, 1.0, False),
        ("gradual", 0.0, 0.0, False),
        ("gradual", 0.25, 0.25, False),
        ("gradual", 1.0, 1.0, False),
        ("drop", 0.0, 0.5, True),
        ("drop", 0.9, 0.5, True),
        ("drop", 1.0, 1.0, True),
    ):
        running.parts.schedule(replace(running.stage, activations=kind), done)
        assert {(a.share, a.drop) for a in running.parts.activations.values()} == {(share, drop)}


LOSSES = {
    "mse": Stage("network", "soft", weighting="mse", regularizer=0.01),
    "power and divergence": Stage("network", "soft", weighting="none", kl=0.5, regularizer=0),
    "attention": Stage("network", "soft", weighting="sla", regularizer=0.1),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", ["residual", "matmul", "two_towers"])
def test_gradients_of_the_loss_by_finite_differences(name, loss):
    """With activations float, the loss is smooth in alpha, weight scales and (up to their fine grid) biases."""
    found = case(name, 3)
    stage = LOSSES[loss]
    running = piece_of(found, stage)
    for quantizer in running.parts.activations.values():
        quantizer.share = 0.0
    index, generator = torch.arange(12), torch.Generator().manual_seed(3)
    groups = {
        "alpha": [w.alpha for w in running.parts.weights.values()],
        "scale": [w.log_factor for w in running.parts.weights.values()],
        "bias": [b.shift for b in running.parts.biases.values()],
    }
    for parameters in groups.values():
        for parameter in parameters:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    for b in running.parts.biases.values():
        b.forward = lambda bias, *_scales, b=b: b.shifted(bias)  # their rounding is straight-through
    for what, parameters in groups.items():
        if not parameters:
            continue
        directions = [torch.randn(p.shape, generator=generator) for p in parameters]
        value = running.loss(index, 500, 1000)
        slopes = torch.autograd.grad(value, parameters)
        expected = float(sum((a * b).sum() for a, b in zip(slopes, directions, strict=True)))
        step, ends = 2e-3, []
        for sign in (1, -2, 1):
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter.data += sign * step * direction
            ends.append(float(running.loss(index, 500, 1000).detach()))
        assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(expected, rel=0.03, abs=2e-3), what


def test_steps_of_activations_learn_by_the_straight_through_rule():
    """The slope by a step is what the quantizer hands over: (q(x) - x) inside, q(x) outside, times what flows back."""
    found = case("gemm", 8, 3)
    running = piece_of(found, Stage("network", "frozen"))
    (name,) = [value for value in running.parts.activations if value == "b"]
    quantizer, seen = running.parts.activations[name], {}
    quantizer.base *= 0.5

    def watch(module, inputs, output):
        seen["x"], seen["out"] = inputs[0], output
        output.retain_grad()

    quantizer.register_forward_hook(watch)
    running.loss(torch.arange(16), 0, 10).backward()
    x, out, upstream = seen["x"].detach(), seen["out"].detach(), seen["out"].grad
    steps = x / quantizer.scale.detach() + quantizer.zero_point
    inside = (steps > -0.5) & (steps < 7.5)
    assert not inside.all()
    expected = (upstream * torch.where(inside, out - x, out)).sum()  # by the factor's logarithm
    torch.testing.assert_close(quantizer.log_factor.grad, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("layout", ["plain", "turned"])
def test_squared_error_is_that_of_torch(layout):
    a = torch.randn(5, 4, 3, requires_grad=True)
    b = torch.randn(3, 4, 5).permute(2, 1, 0) if layout == "turned" else torch.randn(5, 4, 3)
    found, expected = eptq.squared_error(a, b, 2.5), 2.5 * F.mse_loss(a, b)
    torch.testing.assert_close(found, expected)
    for one, two in zip(torch.autograd.grad(3 * found, a), torch.autograd.grad(3 * expected, a), strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("name", ["residual", "two_towers", "attention", "moves"])
def test_baked_students_compute_and_export_what_was_learned(name, rounding):
    found = case(name, 3, 4)
    stage = Stage("network", rounding, weight_rate=0.1, scale_rate=0.02, bias_rate=0.02, step_rate=0.02)
    running = piece_of(found, stage)
    for step in range(6):
        running.step(torch.arange(16), step, 6)
    running.parts.judged(True)
    samples = models.samples_of(found, 16)
    with torch.no_grad():
        learned = found.student(*samples)
    codes = {value: weight.hard().clone() for value, weight in running.parts.weights.items()}
    moved = [float(w.log_factor.detach().abs().max()) for w in running.parts.weights.values()]
    assert max(moved) > 0.01
    eptq.bake(found.student, found.plan)
    assert not [m for m in found.student.modules() if isinstance(m, LearnedScale | LearnedBias)]
    with torch.no_grad():
        for one, two in zip(learned, found.student(*samples), strict=True):
            torch.testing.assert_close(one, two, rtol=0, atol=1e-5)
    for value, quantized in found.student.export(found.plan).items():
        if value in codes:
            assert torch.equal(quantized.integers.float(), codes[value])
            assert -4 <= int(quantized.integers.min()) <= int(quantized.integers.max()) <= 3


@pytest.mark.parametrize("method", ["eptq", "eptq-v2"])
@pytest.mark.parametrize("bits", [3, 8])
def test_the_written_file_holds_the_learned_codes(tmp_path, monkeypatch, method, bits):
    students = []
    finish = pipeline.finish
    monkeypatch.setattr(
        "onnx_eptq.pipeline.finish",
        lambda job, student, *rest: (students.append((student, job.plan)), finish(job, student, *rest))[1],
    )
    data = {"image": np.random.default_rng(0).standard_normal((64, 3, 8, 8)).astype(np.float32)}
    result = onnx_eptq.quantize(
        EVERY["residual"],
        data,
        tmp_path / "q.onnx",
        method=method,
        weight_bits=bits,
        steps=8,
        threads=1,
        storage="int8",
    )
    ((student, plan),) = students
    written, checked = onnx.load(tmp_path / "q.onnx"), 0
    for value, quantized in student.export(plan).items():
        if plan[value].role == "weight":
            found = [t for t in written.graph.initializer if list(t.dims) == list(quantized.integers.shape)]
            arrays = [onnx.numpy_helper.to_array(t).astype(np.int64) for t in found]
            assert any(np.array_equal(array, quantized.integers.numpy()) for array in arrays), value
            checked += 1
            assert -(2 ** (bits - 1)) <= int(quantized.integers.min())
            assert int(quantized.integers.max()) < 2 ** (bits - 1)
    assert checked == 3
    assert result.report.parity.integer_differences == 0
    assert {path.name for path in tmp_path.iterdir()} == {"q.onnx"}


# ---- the same again, and interruptions


def test_seeds_decide_everything():
    states = []
    for seed in (0, 0, 1):
        found = case("residual", 3, 4)
        assert learn(found, BLOCKS, steps=6, seed=seed).learning.kept != "rtn"
        states.append(found.student.state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert not all(torch.equal(states[0][key], states[2][key]) for key in states[0])


@pytest.mark.parametrize("method", ["qdrop", "eptq"])
def test_seeds_may_be_as_large_as_a_time_stamp(method):
    learn(case("residual", 3, 4), method, steps=2, seed=20261122175500)


def uninterrupted(name, method):
    found = case(name, 3, 4)
    learner = Learner(models.problem(found, method, steps=8), found.student)
    losses = list(learner)
    assert learner.learning.kept != "rtn"  # else anything would be as good
    return found.student.state_dict(), learner.learning, losses


@pytest.mark.parametrize("share", [0.02, 0.3, 0.5, 0.77, 0.99])
@pytest.mark.parametrize(
    ("name", "method"),
    [("residual", "eptq"), ("residual", BLOCKS), ("matmul", LAYERS), ("concat", "eptq-v1"), ("attention", TWICE)],
    ids=["eptq", "blocks", "layers", "soft", "three stages"],
)
def test_a_resumed_run_ends_bit_for_bit_as_the_whole_one(tmp_path, name, method, share):
    expected, learning, losses = uninterrupted(name, method)
    path, saved = tmp_path / "c", (tmp_path / "c", "mark")
    found = case(name, 3, 4)
    first = Learner(models.problem(found, method, steps=8), found.student, saved)
    stop = max(1, round(share * first.total))
    walk = iter(first)
    seen = [next(walk) for _ in range(stop)]
    with pytest.raises(KeyboardInterrupt):
        walk.throw(KeyboardInterrupt())
    again = case(name, 3, 4)
    second = Learner(models.problem(again, method, steps=8), again.student, saved, checkpoint.load(path, "mark"))
    seen += list(second)
    assert seen == losses
    assert all(torch.equal(value, expected[key]) for key, value in again.student.state_dict().items())
    for field in ("distances", "kept", "undecided", "gap", "steps", "curve"):
        assert getattr(second.learning, field) == getattr(learning, field), field


def interrupting(monkeypatch, where, call, after):
    """Let the so-many-th call of a function or method of the module end in Ctrl-C, before or after its work."""
    owner, _, attribute = where.rpartition(".")
    place = getattr(eptq, owner) if owner else eptq
    original, calls = getattr(place, attribute), []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == call and not after:
            raise KeyboardInterrupt
        result = original(*args, **kwargs)
        if len(calls) == call:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(place, attribute, interrupted)


def run_once(path, method):
    """One run that saves to a path and goes on from what is there; returns the student."""
    found = case("residual", 3, 4)
    state = checkpoint.load(path, "mark") if path.exists() else None
    for _ in Learner(models.problem(found, method, steps=8), found.student, (path, "mark"), state):
        pass
    return found.student.state_dict()


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


BETWEEN = {  # method, where it is interrupted, at which calls
    ("eptq", "compensate"): (1,),
    ("eptq", "Learner._keep"): (1, 2, 3, 4),
    ("eptq", "Learner._check"): (1, 2, 4),
    ("eptq", "bake"): (1, 2),
    ("eptq", "_Piece.__init__"): (1, 2),
    ("blocks", "Learner._advance"): (1,),
    ("blocks", "Learner._keep"): (1, 2),
    ("blocks", "bake"): (1, 2),
    ("blocks", "_Piece.__init__"): (1, 2),
}


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(
    ("method", "where", "call"), [(*place, call) for place, calls in BETWEEN.items() for call in calls]
)
def test_interruptions_between_steps_lose_nothing(tmp_path, monkeypatch, method, where, call, after):
    """Ctrl-C while layers are solved, pieces are advanced, judged or baked: resumed runs still end as the whole one."""
    method = BLOCKS if method == "blocks" else method
    expected, _, _ = uninterrupted("residual", method)
    with monkeypatch.context() as patch:
        interrupting(patch, where, call, after)
        with pytest.raises(KeyboardInterrupt):
            run_once(tmp_path / "c", method)
    assert same(run_once(tmp_path / "c", method), expected)


@pytest.mark.parametrize("method", ["eptq", BLOCKS], ids=["eptq", "blocks"])
@pytest.mark.parametrize("where", ["Learner._restore", "_Piece.__init__", "Learner._restore_running"])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_an_interruption_while_resuming_loses_nothing(tmp_path, monkeypatch, where, method, after):
    expected, _, _ = uninterrupted("residual", method)
    monkeypatch.setattr(eptq, "INTERVAL", 0)
    for place, call, late in (("_Piece.step", 3, False), (where, 1, after)):
        with monkeypatch.context() as patch:
            interrupting(patch, place, call, late)
            with pytest.raises(KeyboardInterrupt):
                run_once(tmp_path / "c", method)
    assert same(run_once(tmp_path / "c", method), expected)


@pytest.mark.parametrize("method", ["eptq", BLOCKS], ids=["eptq", "blocks"])
def test_a_killed_run_goes_on_from_its_last_checkpoint(tmp_path, monkeypatch, method):
    """Whoever is killed saves nothing at the end: each of the checkpoints on the way leads to the same result."""
    expected, _, _ = uninterrupted("residual", method)
    monkeypatch.setattr(eptq, "INTERVAL", 0)
    path, kept = tmp_path / "c", []
    found = case("residual", 3, 4)
    for _ in Learner(models.problem(found, method, steps=8), found.student, (path, "mark")):
        kept.append(shutil.copy(path, tmp_path / f"c{len(kept)}"))
    assert len(kept) > 6
    for file in kept[:: len(kept) // 5]:
        again = case("residual", 3, 4)
        state = checkpoint.load(Path(file), "mark")
        for _ in Learner(models.problem(again, method, steps=8), again.student, None, state):
            pass
        assert all(torch.equal(value, expected[key]) for key, value in again.student.state_dict().items())


DATA = {"image": np.random.default_rng(0).standard_normal((64, 3, 8, 8)).astype(np.float32)}
SETTINGS = {"weight_bits": 3, "act_bits": 4, "steps": 10, "threads": 1}


def test_a_resumed_file_has_the_same_bytes(tmp_path, monkeypatch):
    whole, parted = tmp_path / "whole.onnx", tmp_path / "q.onnx"
    onnx_eptq.quantize(EVERY["residual"], DATA, whole, **SETTINGS)
    saved = tmp_path / "q.onnx.checkpoint"
    with monkeypatch.context() as patch:
        interrupting(patch, "_Piece.step", 4, after=False)
        with pytest.raises(KeyboardInterrupt):
            onnx_eptq.quantize(EVERY["residual"], DATA, parted, **SETTINGS)
    assert saved.exists()
    assert not parted.exists()
    content = saved.read_bytes()
    others = (
        {"weight_bits": 4},
        {"seed": 1},
        {"method": "qdrop"},
        {"steps": 11},
    )
    for other in others:
        told = "; ".join(f"{name} .*, not {value}" for name, value in other.items())
        with monkeypatch.context() as patch:
            patch.setattr(pipeline, "calibrated", None)  # it is said before any long work
            with pytest.raises(UsageError, match=rf"belongs to a run with other settings \({told}\)"):
                onnx_eptq.quantize(EVERY["residual"], DATA, parted, resume=True, **{**SETTINGS, **other})
    with pytest.raises(UsageError, match="belongs to another"):
        onnx_eptq.quantize(EVERY["residual"], {"image": DATA["image"] * 2}, parted, resume=True, **SETTINGS)
    assert saved.read_bytes() == content
    onnx_eptq.quantize(EVERY["residual"], DATA, parted, resume=True, **SETTINGS)
    assert parted.read_bytes() == whole.read_bytes()
    assert not saved.exists()
    onnx_eptq.quantize(EVERY["residual"], DATA, parted, resume=True, **SETTINGS)  # nothing to go on from: anew
    assert parted.read_bytes() == whole.read_bytes()


def test_a_damaged_checkpoint_is_refused(tmp_path):
    saved = tmp_path / "q.onnx.checkpoint"
    saved.write_bytes(b"no checkpoint")
    with pytest.raises(UsageError, match="is not a checkpoint that can be read"):
        onnx_eptq.quantize(EVERY["residual"], DATA, tmp_path / "q.onnx", resume=True, **SETTINGS)
    assert {path.name for path in tmp_path.iterdir()} == {"q.onnx.checkpoint"}


def run_cli(folder, *arguments):
    return [sys.executable, "-m", "onnx_eptq", "m.onnx", "x.npy", "-o", "q.onnx", "--threads", "1", *arguments]


@pytest.mark.slow
def test_interrupted_on_the_command_line_and_resumed(tmp_path):
    onnx.save(EVERY["residual"], tmp_path / "m.onnx")
    np.save(tmp_path / "x.npy", DATA["image"])
    arguments = ("-w", "3", "--steps", "1500", "--method", "qdrop")
    process = subprocess.Popen(
        run_cli(tmp_path, *arguments), cwd=tmp_path, stderr=subprocess.PIPE, text=True, preexec_fn=models.heed_sigint
    )
    assert process.stderr is not None
    seen = ""
    while not seen.startswith("weights"):
        seen = process.stderr.readline()
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    _, text = process.communicate(timeout=60)
    # Where an interruption meets code made by exec, as in an import, Python ends itself by the signal: 130 in a shell, too.
    assert process.returncode in (130, -signal.SIGINT)
    assert "--resume goes on" in text
    assert "Traceback" not in text
    assert {path.name for path in tmp_path.iterdir()} == {"m.onnx", "x.npy", "q.onnx.checkpoint"}
    refused = subprocess.run(
        run_cli(tmp_path, *arguments, "--resume", "--seed", "5"),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert refused.returncode == 2
    assert "belongs to a run with other settings (seed 0, not 5)" in refused.stderr
    resumed = subprocess.run(
        run_cli(tmp_path, *arguments, "--resume", "--json"), cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads(resumed.stdout)["learning"]["steps"] % 1500 == 0
    assert {path.name for path in tmp_path.iterdir()} == {"m.onnx", "x.npy", "q.onnx"}


@pytest.mark.slow
def test_killed_on_the_command_line_and_resumed(tmp_path):
    """SIGKILL leaves no time to save: the checkpoint on the way has to do, and lead to the bytes of an unbroken run."""
    onnx.save(EVERY["residual"], tmp_path / "m.onnx")
    np.save(tmp_path / "x.npy", DATA["image"])
    code = "import sys; from onnx_eptq import eptq, cli; eptq.INTERVAL = 0.0; sys.argv = ['onnx-eptq', *sys.argv[1:]]; cli.main()"
    arguments = [*run_cli(tmp_path, "-w", "3", "--steps", "300")[3:], "--quiet"]
    command = [sys.executable, "-c", code, *arguments]
    saved = tmp_path / "q.onnx.checkpoint"
    process = subprocess.Popen(command, cwd=tmp_path)
    while process.poll() is None and (not saved.exists() or progress(saved) < 50):
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "it ended before it could be killed"
    assert not (tmp_path / "q.onnx").exists()
    files = []
    for rest in (["--resume"], []):
        subprocess.run([*command, *rest], cwd=tmp_path, check=True)
        files.append((tmp_path / "q.onnx").read_bytes())
    assert files[0] == files[1]
    assert not saved.exists()


def progress(saved):
    """How many steps lie in a checkpoint."""
    with safetensors.safe_open(str(saved), "pt") as file:
        return json.loads(file.metadata()["facts"])["learning"]["steps"]


def test_a_damaged_checkpoint_on_the_command_line(tmp_path):
    onnx.save(EVERY["residual"], tmp_path / "m.onnx")
    np.save(tmp_path / "x.npy", DATA["image"])
    (tmp_path / "q.onnx.checkpoint").write_bytes(b"{}" * 40)
    done = subprocess.run(
        run_cli(tmp_path, "--steps", "5", "--resume"), cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "q.onnx.checkpoint is not a checkpoint that can be read" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "q.onnx").exists()


# ---- batches that models fix, compiling, precision


@pytest.mark.parametrize("count", [64, 72, 30])
@pytest.mark.parametrize("method", ["eptq", "brecq"])
def test_models_that_mix_a_fixed_batch_learn(count, method):
    mixed = parse(
        """(float[4,6] x) => (float[4,3] y) {
          r = Reshape(x, s) h = MatMul(r, w) a = Relu(h) f = Reshape(a, t) y = MatMul(f, u) }""",
        s=i64(2, 12),
        t=i64(4, 6),
        w=W(12, 12),
        u=W(6, 3),
    )
    data = {"x": np.random.default_rng(0).standard_normal((count, 6)).astype(np.float32)}
    report = onnx_eptq.quantize(mixed, data, method=method, weight_bits=4, steps=4, threads=1).report
    assert report.learning.kept


@pytest.mark.parametrize(("kept", "said"), [("1 network/latent", False), ("compensated", True)])
def test_the_report_says_why_a_lower_distance_is_not_kept(kept, said):
    report = onnx_eptq.quantize(EVERY["residual"], DATA, weight_bits=3, method="rtn", threads=1).report
    report.learning = eptq.Learning({"rtn": 3.0, "compensated": 2.0, "1 network/latent": 1.0}, kept)
    (line,) = [line for line in str(report).splitlines() if line.startswith("learned")]
    assert line.endswith(
        f"kept: {kept}, as 1 network/latent may be better by chance alone" if said else f"kept: {kept}"
    )


@pytest.mark.parametrize("settings", [{}, {"cache_mb": 0}, {"precision": "bfloat16"}, {"effort": "fast"}])
def test_settings_of_learning(settings):
    report = onnx_eptq.quantize(
        EVERY["residual"], DATA, weight_bits=3, act_bits=4, threads=1, **{"steps": 40, **settings}
    ).report
    assert report.learning.steps == 40
    distances = report.learning.distances
    assert min(distance for name, distance in distances.items() if name not in eptq.STARTS) < 0.85 * distances["rtn"]


def test_what_is_cached_is_what_is_computed():
    losses = []
    for size in (0, 2**30):
        found = case("residual")
        losses.append(list(Learner(models.problem(found, "eptq", cache_bytes=size), found.student)))
    assert [float(loss) for loss in losses[0]] == pytest.approx([float(loss) for loss in losses[1]], rel=1e-4)


def count_teacher_caches(monkeypatch, method, steps):
    """How often all of the teacher's values are computed in one run."""
    found, calls, original = case("residual"), [], eptq._Piece._cached

    def counted(piece):
        calls.append(piece)
        return original(piece)

    monkeypatch.setattr(eptq._Piece, "_cached", counted)
    list(Learner(models.problem(found, method, steps=steps), found.student))
    return len(calls)


def test_stages_over_the_network_share_what_the_teacher_computes(monkeypatch):
    assert count_teacher_caches(monkeypatch, "eptq", 20) == 1


def test_what_is_hardly_asked_for_is_not_kept(monkeypatch):
    assert count_teacher_caches(monkeypatch, "eptq", 2) == 0


def test_pieces_keep_their_own_values(monkeypatch):
    assert count_teacher_caches(monkeypatch, "adaquant", 20) == 3  # one per layer


def test_checks_are_not_closer_than_they_are_worth(monkeypatch):
    found, checks = case("residual"), []
    monkeypatch.setattr(eptq, "CHECK_STEPS", 5)
    monkeypatch.setattr(Learner, "_check", lambda learner, running, stage: checks.append(learner.step))
    list(Learner(models.problem(found, "eptq", steps=24), found.student))
    assert checks == [5, 10, 5, 10]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_steps_are_compiled_in_one_piece():
    """A break would compile every quantizer alone, which is slower than not to compile."""
    found = case("gemm")
    learner = Learner(models.problem(found, "eptq", steps=1), found.student)
    list(learner)
    running = eptq._Piece(
        learner.problem, found.student, learner.problem.method.stages[0],
        pieces.pieces(found.graph, learner.problem.layers, "network", set())[0], True,
        *[dict(zip((tensor.name for tensor in found.graph.inputs), learner.problem.samples, strict=True))] * 2, set(),
    )  # fmt: skip
    assert torch._dynamo.explain(running.student)(*running.inputs(torch.arange(8))).graph_break_count == 0


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler")
@pytest.mark.filterwarnings("ignore")
def test_compiled_steps_learn_the_same():
    losses = []
    for compiled in (False, True):
        found = case("gemm")
        losses.append(list(Learner(models.problem(found, "eptq", steps=4, compile=compiled), found.student)))
    assert [float(loss) for loss in losses[0]] == pytest.approx([float(loss) for loss in losses[1]], rel=0.02)
