"""Layers behind a selection: detectors in two stages, queries that are picked. Both networks select what the float one does."""

import copy

import numpy as np
import onnx
import pytest
import torch

import models
import onnx_eptq
from models import f32, i64, parse, weights
from onnx_eptq import pieces, pipeline
from onnx_eptq.calibrate import feed
from onnx_eptq.compensate import compensate
from onnx_eptq.eptq import Judge, Learner
from onnx_eptq.errors import VerificationError
from onnx_eptq.methods import METHODS
from onnx_eptq.mirror import Probe
from onnx_eptq.outputs import class_axes, decisions, learning_targets, selections
from onnx_eptq.plan import Rules
from onnx_eptq.remarks import low_fidelity
from onnx_eptq.report import Phases
from onnx_eptq.verify import Fidelity, Parity, check_parity, measure_fidelity

W = weights(40)
BODY = """c = Conv <pads=[1,1,1,1]> (x, w0) f = Relu(c) t = Reshape(f, flat) k = Transpose <perm=[0,2,1]> (t)
  s = MatMul(k, ws) q = Squeeze(s, last)"""
HEAD = "a = MatMul(z, w1) r = Relu(a) y = MatMul(r, w2) }"
CONSTANTS = {
    "flat": i64(0, 6, 64), "last": i64(-1), "rows": i64(-1, 6), "four": i64(4), "wide": i64(1, 1, 6),
    "half": f32(0.5).reshape(()), "w0": W(6, 3, 3, 3), "ws": W(6, 1), "w1": W(6, 8), "w2": W(8, 5), "order": i64(1, 0),
}  # fmt: skip
MODELS = {
    "picked": f"""(float[N,3,8,8] x) => (float[N,4,5] y) {{ {BODY} v, i = TopK(q, four) u = Unsqueeze(i, last)
      e = Expand(u, wide) z = GatherElements <axis=1> (k, e) {HEAD}""",
    "compressed": f"""(float[N,3,8,8] x) => (float[M,5] y) {{ {BODY} g = Greater(q, half) b = Reshape(g, last)
      l = Reshape(k, rows) z = Compress <axis=0> (l, b) {HEAD}""",
    "where": f"""(float[N,3,8,8] x) => (float[M,5] y) {{ {BODY} g = Greater(q, half) n = NonZero(g)
      p = Transpose <perm=[1,0]> (n) z = GatherND(k, p) {HEAD}""",
}
DECISIONS = {"picked": ["i"], "compressed": ["b"], "where": ["n", "g"]}


def model(name: str, threshold: float = 0.5) -> onnx.ModelProto:
    used = {key: array for key, array in CONSTANTS.items() if key in MODELS[name]}
    return parse(MODELS[name], **{**used, **({"half": f32(threshold).reshape(())} if "half" in used else {})})


def branching() -> onnx.ModelProto:
    """As exporters write torchvision's batched_nms: nothing is selected of nothing, else an If's branch selects."""
    branches = ", ".join(
        f"{branch} = {k}0 () => (int64[A,2] {k}2) {{{{ {k}1 = NonZero(g) {k}2 = Transpose <perm=[1,0]> ({k}1) }}}}"
        for branch, k in (("then_branch", "s"), ("else_branch", "e"))
    ).format()
    text = f"""(float[N,3,8,8] x) => (float[M,5] y) {{ {BODY} g = Greater(q, half) m = Cast <to=1> (g)
      n = ReduceSum <keepdims=0> (m) any = Greater(n, zero) p = If (any) <{branches}> z = GatherND(k, p) {HEAD}"""
    return parse(text, zero=f32(0.0).reshape(()), **{key: array for key, array in CONSTANTS.items() if key in text})


def images(count: int = 64) -> np.ndarray:
    return np.random.default_rng(2).standard_normal((count, 3, 8, 8)).astype(np.float32)


def target(mirror, x, name="y"):
    return pieces.function(mirror, pieces.placeholders(mirror), [pieces.raw_nodes(mirror)[name]])(x)[0]


@pytest.mark.parametrize("name", MODELS)
def test_what_layers_have_a_say_in_is_a_decision(name):
    found = models.quantize(model(name), Rules(4, 8))
    assert decisions(found.graph) == DECISIONS[name]
    assert learning_targets(found.graph) == ["y", "q"]  # what is selected by counts, too


def test_what_inputs_alone_decide_is_one_if_they_are_rounded():
    text = """(float[N,6] x) => (float[M,5] y) { h = ReduceMax <keepdims=0> (x, one) b = Greater(h, half)
      z = Compress <axis=0> (x, b) a = MatMul(z, w1) y = MatMul(a, w2) }"""
    proto = parse(text, half=f32(0.5).reshape(()), one=i64(1), w1=W(6, 8), w2=W(8, 5))
    assert decisions(models.prepared(proto)) == ["b"]
    data = np.random.default_rng(5).standard_normal((512, 6)).astype(np.float32)
    report = onnx_eptq.quantize(proto, data, act_bits=4, effort="fast", threads=1).report
    assert np.isfinite(list(report.learning.distances.values())).all()


def test_what_a_mask_of_tokens_decides_is_none():
    text = """(int64[N] ids) => (float[M,5] y) { e = Gather(table, ids) b = Cast <to=9> (ids) z = Compress <axis=0> (e, b)
      y = MatMul(z, w) }"""
    assert decisions(models.prepared(parse(text, table=W(9, 6), w=W(6, 5)))) == []


@pytest.mark.parametrize("method", ["rtn", "eptq", "brecq"])
@pytest.mark.parametrize("batch", ["1", "N"])
def test_selected_elements_may_lie_on_the_second_axis(batch, method):
    text = f"""(float[{batch},3,8,8] x) => (float[B,M,5] y) {{ {BODY} g = Greater(q, half) n = NonZero(g)
      p = Transpose <perm=[1,0]> (n) z0 = GatherND(k, p) z = Unsqueeze(z0, zero) {HEAD}"""
    used = {key: array for key, array in CONSTANTS.items() if key in text}
    options = {} if method == "rtn" else {"steps": 6}
    result = onnx_eptq.quantize(parse(text, zero=i64(0), **used), images(), method=method, threads=1, **options)
    assert result.report.coverage.complete
    assert min(result.report.fidelity.sqnr_db.values()) > 12


def test_pieces_are_entered_with_what_the_teacher_selects():
    """Layer by layer, what crosses a cut behind the selection belongs to the same elements in both networks."""
    found = models.quantize(model("picked"), Rules(8, 8))
    problem = models.problem(found, "adaround", steps=1, count=16)
    learner = Learner(problem, copy.deepcopy(found.student))
    with torch.no_grad():
        learner.student.constant("ws").mul_(-1)  # the student alone would pick the worst
    (piece,) = (p for p in learner.pieces[0] if any(layer.weight.name == "w1" for layer in p.layers))
    places = {"x": problem.samples[0]}
    ours = theirs = places
    for index, part in enumerate(learner.pieces[0]):
        ours, theirs = learner._advance(part, index == 0, ours, theirs)
        if part is piece:
            break
    (name,) = piece.outputs
    assert ours[name].shape == theirs[name].shape
    error = (ours[name] - theirs[name]).square().mean() / theirs[name].square().mean()
    assert float(error) < 0.01


@pytest.mark.parametrize("name", MODELS)
def test_a_student_is_judged_on_what_the_teacher_selects(name):
    """Other scores select other elements; what is computed of the same ones does not differ."""
    found = models.quantize(model(name), Rules(4, 8))
    samples = [torch.from_numpy(images(12))]
    judge = Judge(found.teacher, found.graph, ["y"], samples, batch=5)
    other = copy.deepcopy(found.teacher)
    with torch.no_grad():
        other.constant("ws").mul_(-0.9)
    alone = [target(mirror, samples[0]) for mirror in (found.teacher, other)]
    assert alone[0].shape != alone[1].shape or not torch.allclose(*alone)
    assert judge.distance(other) == 0
    with torch.no_grad():
        other.constant("w2").mul_(1.1)
    assert 0.0099 < judge.distance(other) < 0.02  # the squared error, and of rows of classes their divergence


@pytest.mark.parametrize("name", MODELS)
def test_the_start_solves_layers_behind_a_selection(name):
    found = models.quantize(model(name), Rules(3, 8))
    with torch.no_grad():  # the student alone would select other rows than the teacher, and in general fewer or more
        found.student.constant("ws").mul_(-1)
    samples = [torch.from_numpy(images(48))]
    judge = Judge(found.teacher, found.graph, ["y"], samples, batch=16)
    before = judge.distance(found.student)
    batches = [[samples[0][i : i + 16]] for i in range(0, 48, 16)]
    solved = compensate(
        found.student, found.teacher, found.plan, found.layers, batches, decisions=decisions(found.graph)
    )
    assert set(solved) == {"w0", "ws", "w1", "w2"}
    assert judge.distance(found.student) < 0.8 * before


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"rtn"}))
@pytest.mark.parametrize("name", MODELS)
def test_every_method_learns_behind_a_selection(name, method):
    found = models.quantize(model(name), Rules(3, 8))
    problem = models.problem(found, method, steps=12, count=64)
    learner = Learner(problem, copy.deepcopy(found.student))
    losses = [float(loss) for loss in learner]
    assert np.isfinite(losses).all()
    distances = learner.learning.distances
    assert np.isfinite(list(distances.values())).all()
    if method == "eptq":
        assert min(distances.values()) < 0.9 * distances["rtn"]


OPTIONS = [
    {"method": "rtn"},
    {"effort": "fast"},
    {"method": "eptq-v2", "steps": 4},
    {"compression": 7, "method": "rtn"},
    {"effort": "fast", "batch_size": 1},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("threshold", [0.5, 2.5, 50])  # some rows, few (of some samples none), none at all
def test_from_end_to_end_with_few_elements_or_none(threshold, options):
    result = onnx_eptq.quantize(model("compressed", threshold), images(), threads=1, **options)
    assert min(result.report.fidelity.sqnr_db.values()) > 12
    assert result.report.coverage.complete


ONE = "k = MatMul(x, w) s = MatMul(k, ws) q = Squeeze(s, both) v, i = TopK(q, three)"
ENDS = {  # whether what is learned lies behind the selection
    "z = Gather <axis=1> (k, i) r = Relu(z) y = MatMul(r, w2)": True,
    "r = Relu(k) h = MatMul(r, w2) y = Gather <axis=1> (h, i)": False,
}


@pytest.mark.parametrize("end", ENDS)
def test_models_that_take_one_sample_at_a_time_learn_behind_a_selection(end):
    """Its places have no axis of samples, so that they could not be told apart if several went through at once."""
    constants = {"w": W(6, 6), "ws": W(6, 1), "both": i64(0, 2), "three": i64(3), "w2": W(6, 5)}
    proto = parse(f"(float[1,8,6] x) => (float[1,3,5] y) {{ {ONE} {end} }}", **constants)
    data = np.random.default_rng(3).standard_normal((40, 8, 6)).astype(np.float32)
    job = pipeline.begin(proto, data, weight_bits=3, threads=1)
    problem = pipeline.learning_problem(job, pipeline.calibrated(job, Phases()))
    assert problem.chunk == 1
    assert problem.mapped != ENDS[end]
    result = onnx_eptq.quantize(proto, data, weight_bits=3, steps=20, threads=1)
    distances = result.report.learning.distances
    assert min(distances.values()) < 0.9 * distances["rtn"]


@pytest.mark.parametrize("name", MODELS)
def test_fidelity_tells_of_what_lies_behind_a_selection(name):
    """Against the float model run by ONNX Runtime, whose selection the other one is told."""
    proto, other = model(name), model(name)
    tables = {tensor.name: tensor for tensor in other.graph.initializer}
    for weight, factor in (
        ("ws", -0.9),
        ("w2", 1.1),
    ):  # other elements are selected; what is computed of them is 10 % more
        tables[weight].CopyFrom(
            onnx.numpy_helper.from_array(factor * onnx.numpy_helper.to_array(tables[weight]), weight)
        )
    graph = models.prepared(proto)
    batches = [{"x": images(24)[i : i + 8]} for i in range(0, 24, 8)]
    found = measure_fidelity(proto, other, batches, 1, selections(graph), class_axes(graph), decisions=decisions(graph))
    assert found.selected_db == {"y": 20.0}
    assert set(found.selected) == {"y"}
    assert "y" not in found.sqnr_db
    assert found.agreement == {}
    silent = measure_fidelity(proto, other, batches, 1, selections(graph), decisions=["no such value"])
    assert silent.selected_db == {}
    assert silent.sqnr_db == found.sqnr_db


def test_fidelity_of_labels_and_scores_where_both_models_select_the_same():
    """Boxes that are picked, their values in the order of the other model's scores, and integers beside them."""
    text = """(float[N,6] x) => (float[N,2] v, int64[N,2] i, int64[N,2] big) { a = MatMul(x, w) v, i = TopK <axis=1> (a, two)
      s = Mul(v, ten) r = Floor(s) big = Cast <to=7> (r) }"""
    table = W(6, 5)
    proto, other = (parse(text, w=weight, two=i64(2), ten=f32(10.0)) for weight in (table, -table))
    graph = models.prepared(proto)
    batches = [{"x": np.random.default_rng(3).standard_normal((32, 6)).astype(np.float32)}]
    args = (batches, 1, selections(graph), class_axes(graph))
    assert decisions(graph) == ["i"]
    same = measure_fidelity(proto, proto, *args, decisions=["i"])
    assert same.selected_db["v"] > 100
    assert same.selected_agreement == {"big": 100.0}
    assert same.agreement == {"a": 100.0}
    turned = measure_fidelity(proto, other, *args, decisions=["i"])  # the same elements, of the other sign
    assert turned.selected_db["v"] == pytest.approx(-6.02, abs=0.01)
    assert turned.agreement["a"] < 30
    assert turned.selected_agreement["big"] < 30


def test_the_report_says_what_a_second_stage_costs():
    result = onnx_eptq.quantize(model("picked"), images(), method="rtn", bits={"w1": 2, "w2": 2}, threads=1)
    fidelity = result.report.fidelity
    assert fidelity.selected_db["y"] < min(fidelity.sqnr_db.values()) - 10
    assert f"SQNR {fidelity.selected_db['y']} dB where both select the same" in str(result.report)


def test_a_loss_behind_a_selection_is_warned_of():
    fidelity = Fidelity(8, {"q": 30.0}, {}, {"y": ["q"]}, selected_db={"y": 3.0})
    (warning,) = low_fidelity(fidelity, "try more bits")
    assert warning.startswith("output 'y' is 3.0 dB from the float model's even where both select the same")


def test_what_a_branch_selects_is_a_decision():
    found = models.quantize(branching(), Rules(4, 8))
    assert decisions(found.graph) == ["p", "any", "g"]
    samples = [torch.from_numpy(images(12))]
    judge = Judge(found.teacher, found.graph, ["y"], samples, batch=5)
    other = copy.deepcopy(found.teacher)
    with torch.no_grad():
        other.constant("ws").mul_(-0.9)
    assert judge.distance(other) == 0
    report = onnx_eptq.quantize(branching(), images(), method="rtn", threads=1).report
    assert report.fidelity.selected_db["y"] > 20


def test_what_a_float_table_decides_is_a_decision():
    text = """(int64[N,9] ids) => (float[N,3,5] y) { e = Gather(table, ids) s = ReduceMax <keepdims=0> (e, last)
      v, i = TopK(s, three) u = Unsqueeze(i, last) k = Expand(u, wide) z = GatherElements <axis=1> (e, k) y = MatMul(z, w) }"""
    proto = parse(text, table=W(9, 6), last=i64(-1), three=i64(3), wide=i64(1, 1, 6), w=W(6, 5))
    assert decisions(models.prepared(proto)) == ["i"]


def test_a_detector_may_find_nothing():
    text = f"""(float[N,3,8,8] x) => (float[M,5] y) {{ {BODY} g = Greater(q, half) n = NonZero(g)
      p = Transpose <perm=[1,0]> (n) z = GatherND(k, p) a0 = MatMul(z, w1) a = Add(a0, b1) o = Softplus(a) r = MatMul(o, w2)
      y = Sqrt(r) }}"""
    used = {key: array for key, array in CONSTANTS.items() if key in text and key != "half"}
    proto = parse(text, half=f32(1e9).reshape(()), b1=W(8), **used)
    assert onnx_eptq.quantize(proto, images(16), method="rtn", threads=1).report.parity.basic_equals_off


# ---- what the written file selects, held against the simulation


def verified(found: models.Case, written: onnx.ModelProto | None = None) -> Parity:
    selecting = decisions(found.graph)
    assert selecting
    proto = written or found.written
    return check_parity(
        proto, found.student, found.plan, found.layers, found.quantized, found.batches, 1, decisions=selecting
    )


def test_rows_that_tie_may_be_selected_either_way():
    """Sums of few steps are often the same but for the last bit, which depends on the order of adding."""
    text = """(float[N,40,64] x) => (float[N,20,6] y) { s = ReduceSum <keepdims=0> (x, last) v, i = TopK(s, twenty)
      u = Unsqueeze(i, last) wide = Expand(u, shape) z = GatherElements <axis=1> (x, wide) y = MatMul(z, w) }"""
    proto = parse(text, last=i64(-1), twenty=i64(20), shape=i64(1, 1, 64), w=weights(41)(64, 6))
    found, seen = models.quantize(proto, Rules(4, 4)), {}
    with torch.no_grad():
        Probe(found.student, seen.setdefault).run(*feed(found.student, found.batches[0]))
    if not (models.run_ort(found.written, found.batches[0], ["i"])["i"] != seen["i"].numpy()).any():
        pytest.skip("ONNX Runtime and torch add in the same order here")
    verified(found)
    x = np.concatenate([feed["x"] for feed in found.batches])
    onnx_eptq.quantize(proto, x, method="rtn", weight_bits=4, act_bits=4, threads=1)


def test_what_is_selected_in_no_order_is_verified():
    text = MODELS["picked"].replace("TopK(q, four)", "TopK <sorted=0> (q, four)")
    proto = parse(text, **{key: array for key, array in CONSTANTS.items() if key in text})
    assert onnx_eptq.quantize(proto, images(16), method="rtn", threads=1).report.parity.basic_equals_off


@pytest.mark.parametrize("name", ["picked", "compressed", "where"])
def test_a_file_that_selects_otherwise_is_refused(name):
    found = models.quantize(model(name), Rules(8, 8))
    verified(found)
    other = copy.deepcopy(found.written)
    if name == "picked":
        node = next(node for node in other.graph.node if node.op_type == "TopK")
        node.attribute.append(onnx.helper.make_attribute("largest", 0))
    else:
        node = next(node for node in other.graph.node if node.op_type == "Greater")
        node.op_type = "Less"
    value = {"picked": "i", "compressed": "b", "where": "g"}[name]
    with pytest.raises(VerificationError, match=f"value '{value}'"):
        verified(found, other)
