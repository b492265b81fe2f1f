"""Expected losses against direct measurements; what was measured once is not measured again."""

import json
import logging
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

import models
import onnx_eptq
from models import ORT_TARGET, parse, samples_of, weights
from onnx_eptq import compensate, hessian, sensitivity
from onnx_eptq.calibrate import elementwise_readers
from onnx_eptq.grid import Grid
from onnx_eptq.plan import Rules
from onnx_eptq.sensitivity import MEASURES, Cache, Setting, monotone
from onnx_eptq.widths import Asked, candidates

ASKED = Asked((2, 3, 4, 8), (4, 8))


def setting(case, count=48, **options):
    plan, groups = candidates(case.graph, ORT_TARGET, Rules(), ASKED)
    batch = case.proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value or 16
    samples = samples_of(case, count)
    found = Setting(
        case.graph,
        plan,
        case.layers,
        case.teacher,
        case.stats,
        samples,
        samples,
        batch,
        readers=elementwise_readers(case.graph),
    )
    return replace(found, **options), groups


def one_layer():
    """Tokens through one matrix: errors at the layer's output are errors of the network."""
    w = weights(40)
    proto = parse("(float[N,4,6] x) => (float[N,4,5] y) { a = MatMul(x, w)  y = Add(a, b) }", w=w(6, 5), b=w(5))
    return models.quantize(proto)


def rank_correlation(a, b):
    ranks = [np.argsort(np.argsort(values)) for values in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


def test_of_a_single_layer_the_local_loss_is_the_loss():
    problem, groups = setting(one_layer())
    weight = [group for group in groups if group.role == "weight"]
    (_, local), (_, output) = (next(MEASURES[how](problem, weight)) for how in ("local", "output"))
    assert local.keys() == {2, 3, 4, 8}
    ratios = [loss / output[bits] for bits, loss in local.items()]
    assert np.mean(ratios) == pytest.approx(1, rel=0.25)  # 64 random vectors


def test_of_an_activation_the_local_loss_is_about_the_loss():
    """Rounding errors of neighbours are unrelated, so that their squares add up."""
    problem, groups = setting(one_layer())
    group = replace(next(group for group in groups if group.name == "x"), widths=(4, 6))
    (_, local), (_, output) = (next(MEASURES[how](problem, [group])) for how in ("local", "output"))
    for bits, loss in local.items():
        assert loss == pytest.approx(output[bits], rel=0.35)


@pytest.mark.parametrize("name", models.MODELS)
def test_losses_are_numbers_and_fall_with_the_width(name):
    problem, groups = setting(models.cached(name))
    losses = dict(MEASURES["local"](problem, groups))
    assert losses.keys() == {group.name for group in groups}
    for group in groups:
        row = losses[group.name]
        assert tuple(sorted(row)) == group.widths
        assert all(np.isfinite(list(row.values())))
        assert min(row.values()) >= 0
        assert row[group.widths[-1]] <= row[group.widths[0]]


@pytest.mark.parametrize("name", ["residual", "depthwise", "concat", "two_towers", "attention", "transposed"])
def test_local_losses_rank_as_those_of_the_outputs(name):
    problem, groups = setting(models.cached(name))
    outputs = {tensor.name for tensor in problem.graph.outputs}  # judged before their own quantizers
    local, output = (dict(MEASURES[how](problem, groups)) for how in ("local", "output"))
    pairs = [(local[g.name][b], output[g.name][b]) for g in groups if g.name not in outputs for b in g.widths]
    assert rank_correlation(*zip(*pairs, strict=True)) > 0.75


def test_a_value_made_of_constants_is_measured_at_the_outputs():
    w = weights(41)
    proto = parse(
        """(float[N,4,6] x) => (float[N,4,5] y) {
          all = Shape(x)
          n = Slice(all, zero, one)
          sizes = Concat <axis=0> (n, rest)
          token = Expand(part, sizes)
          sum = Add(x, token)
          y = MatMul(sum, w)
        }""",
        zero=models.i64(0),
        one=models.i64(1),
        rest=models.i64(4, 6),
        part=w(1, 4, 6, fan=6),
        w=w(6, 5),
    )
    problem, groups = setting(models.quantize(proto))
    token = next(group for group in groups if group.name == "token")
    row = dict(MEASURES["local"](problem, [token]))["token"]
    assert row[4] > row[8] > 0


def test_memory_does_not_change_the_losses(monkeypatch):
    problem, groups = setting(models.cached("residual"))
    expected = dict(MEASURES["local"](problem, groups))
    runs = []
    original = sensitivity._gathered
    monkeypatch.setattr(sensitivity, "_gathered", lambda s, layers: runs.append(len(layers)) or original(s, layers))
    found = dict(MEASURES["local"](replace(problem, cache_bytes=0), groups))
    assert runs == [1, 1, 1]  # one layer at a time
    for name, row in expected.items():
        assert found[name] == pytest.approx(row, rel=1e-4)


def test_the_mean_of_a_rounded_layers_error_goes_to_its_bias():
    problem, _ = setting(models.cached("residual"))
    layer = problem.layers[1]
    weight = problem.teacher.constant(layer.weight.name)
    moments = sensitivity._gathered(problem, [layer])
    coarse, fine = (sensitivity.rounded(layer, weight, moments[layer.weight.name], Grid(b, True, 0)) for b in (3, 6))
    x = _value(problem, layer.source.name)
    powers = []
    for rounding in (coarse, fine):
        error = compensate.apply_linear(layer, x, weight - rounding.weight).movedim(1, 0).flatten(1)
        assert rounding.shift is not None
        torch.testing.assert_close(rounding.shift.float(), error.mean(1), rtol=1e-3, atol=1e-5)
        powers.append(float(error.var()))
    assert powers[0] > 10 * powers[1]


def test_projected_gradients_estimate_what_a_change_does_to_the_outputs():
    """Against finite differences of the network itself."""
    problem, _ = setting(models.cached("residual"))
    weight = problem.teacher.constant("w2")
    change = 1e-3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(3))
    (before,) = (z.clone() for z in problem.teacher(*problem.samples))
    with torch.no_grad():
        weight.add_(change)
        (after,) = problem.teacher(*problem.samples)
        weight.sub_(change)
    gradients = hessian.projected_gradients(
        problem.teacher, problem.graph, [weight], problem.samples, passes=300, batch=16
    )
    found = sum(float((gradient * change).sum()) ** 2 for (gradient,) in gradients)
    assert found == pytest.approx(float((after - before).square().sum()), rel=0.25)
    assert not weight.requires_grad


def _value(problem, name):
    found = []
    probe = sensitivity.Probe(problem.teacher, lambda value, x: (found.append(x) if value == name else None, x)[1])
    probe.run(*problem.samples)
    return found[0]


def test_the_float_network_is_as_it_was_after_measuring():
    problem, groups = setting(models.cached("residual"))
    before = {name: tensor.clone() for name, tensor in problem.teacher.state_dict().items()}
    for how in MEASURES:
        list(MEASURES[how](problem, groups))
    for name, tensor in problem.teacher.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_what_is_cached_is_not_missing(tmp_path):
    groups = candidates(models.cached("residual").graph, ORT_TARGET, Rules(), ASKED)[1]
    cache = Cache(tmp_path / "new", "key")
    assert cache.missing(groups) == groups
    cache.add("w1", {2: 0.5, 4: 0.25})
    again = Cache(tmp_path / "new", "key")
    assert again.losses == {"w1": {2: 0.5, 4: 0.25}}
    assert {g.name: g.widths for g in again.missing(groups)}["w1"] == (3, 8)
    again.add("w1", {3: 0.3, 8: 0.1})
    assert "w1" not in {g.name for g in Cache(tmp_path / "new", "key").missing(groups)}
    assert Cache(tmp_path / "new", "other").missing(groups) == groups


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"losses": 3}', json.dumps({"losses": {"w1": {"two": 1}}}), '{"losses": {"w1": {"2": NaN}}}'],
)
def test_a_broken_cache_is_said_and_measured_anew(tmp_path, text, caplog):
    (tmp_path / "key.json").write_text(text)
    with caplog.at_level(logging.WARNING):
        assert Cache(tmp_path, "key").losses == {}
    assert "cannot be read" in caplog.text


def test_a_folder_that_cannot_be_written_is_done_without(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    cache = Cache(tmp_path / "file", "key")
    with caplog.at_level(logging.WARNING):
        cache.add("w1", {2: 0.5})
        cache.add("w1", {4: 0.2})
    assert caplog.text.count("cannot be written") == 1
    assert cache.losses == {"w1": {2: 0.5, 4: 0.2}}


def test_samples_are_parted_where_there_are_enough():
    many, few = [torch.arange(100)], [torch.arange(30)]
    judged, fitting = sensitivity.parted(many, 32)
    assert (len(judged[0]), len(fitting[0])) == (32, 68)
    assert not set(judged[0].tolist()) & set(fitting[0].tolist())
    assert [len(part[0]) for part in sensitivity.parted(few, 32)] == [30, 30]


def test_a_layer_of_more_inputs_than_samples_does_not_look_good_by_its_own_samples():
    w = weights(42)
    found = models.quantize(
        parse("(float[N,96] x) => (float[N,8] y) { y = Gemm <transB=1> (x, w, b) }", w=w(8, 96), b=w(8))
    )
    problem, groups = setting(found, count=96)
    weight = [replace(group, widths=(2,)) for group in groups if group.role == "weight"]
    judged, fitting = sensitivity.parted(problem.samples, 48)
    ((_, own),) = MEASURES["local"](replace(problem, samples=fitting, fitting=fitting), weight)
    ((_, other),) = MEASURES["local"](replace(problem, samples=judged, fitting=fitting), weight)
    assert other[2] > 2 * own[2]


def test_monotone_losses_rise_with_every_narrower_width():
    assert monotone({2: 0.1, 4: 0.5, 8: 0.0}, 0.01) == {8: 0.0, 4: 0.5, 2: 0.51}


BEHIND = {
    "a GRU": """l = Transpose <perm=[1,0,2]> (r) a, last = GRU <hidden_size=5> (l, gates, again) s = Squeeze(last, first)
      y = MatMul(s, v)""",
    "a GRU, but for a narrow way around": """l = Transpose <perm=[1,0,2]> (r) a, last = GRU <hidden_size=5> (l, gates, again)
      s = Squeeze(last, first) m = ReduceMean <keepdims=0> (r, axis) k = Mul(m, tiny) d = Add(s, k) y = MatMul(d, v)""",
    "a rounding": "f = Floor(r) s = ReduceMean <keepdims=0> (f, axis) y = MatMul(s, v)",
}


@pytest.mark.parametrize("name", BEHIND)
def test_layers_that_no_gradient_reaches_are_measured_at_the_outputs(name, tmp_path):
    """Losses of 0 would let them take the narrowest widths whatever they do."""
    text = f"(float[N,6,4] x) => (float[N,3] y) {{ h = MatMul(x, w) r = Relu(h) {BEHIND[name]} }}"
    draw = weights(0)
    constants = {"w": draw(4, 5) * np.float32(3), "v": draw(5, 3), "gates": draw(1, 15, 5), "again": draw(1, 15, 5)}
    constants |= {"first": np.array([0]), "axis": np.array([1]), "tiny": np.float32(1e-4)}
    used = {key: value for key, value in constants.items() if re.search(rf"\b{key}\b", text)}
    data = np.random.default_rng(0).normal(size=(128, 6, 4)).astype(np.float32)
    found = onnx_eptq.explore(parse(text, **used), data, act_choices=(4, 8), sensitivity_cache=tmp_path, threads=1)
    assert {"w", "v"} <= set(found.losses)
    for row in (found.losses[value] for value in {"w", "v", "r"} & set(found.losses)):
        assert row[min(row)] > row[8] > 0
    assert found.losses["w"][2] > 1e-3
