"""`quantize` end to end on the demo model: accuracy of the written file, determinism, sources, options, refusals."""

import copy
import json
import re
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import models
import onnx_eptq
from onnx_eptq import Config, calibrate, pipeline, remarks, verify
from onnx_eptq import graph as graphs
from onnx_eptq.errors import (
    CoverageError,
    DataError,
    ModelError,
    OutputError,
    UnsupportedOp,
    UsageError,
    VerificationError,
)
from onnx_eptq.plan import Plan
from onnx_eptq.report import MAX_LINES
from onnx_eptq.targets import TARGETS

MODELS = Path(__file__).parents[1] / "models"
DIGITS, CALIB = MODELS / "digits.onnx", MODELS / "digits_calib"
LINEAR = ("Conv", "ConvTranspose", "Gemm", "MatMul")
quantize = partial(onnx_eptq.quantize, method="rtn")  # learning has tests of its own


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def accuracy(path: Path | onnx.ModelProto) -> float:
    """Top-1 of a file on the held-out digits, by ONNX Runtime at full optimisation, in percent."""
    held_out = np.load(MODELS / "digits_eval.npz")
    source = path.SerializeToString() if isinstance(path, onnx.ModelProto) else str(path)
    session = ort.InferenceSession(source, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"image": held_out["x"]})
    return float(100 * (logits.argmax(1) == held_out["y"]).mean())


@pytest.fixture(scope="module")
def w4(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, onnx_eptq.Result]:
    path = tmp_path_factory.mktemp("w4") / "digits_int4.onnx"
    return path, quantize(DIGITS, CALIB, path, weight_bits=4, threads=1)


@pytest.mark.parametrize(
    ("weight_bits", "act_bits", "points_lost"), [(8, 8, 0.8), (4, 8, 2.0), (3, 8, 12.0), (8, 4, 12.0)]
)
def test_accuracy_floor_of_the_written_file(
    tmp_path: Path, weight_bits: int, act_bits: int, points_lost: float
) -> None:
    path = tmp_path / "q.onnx"
    quantize(DIGITS, CALIB, path, weight_bits=weight_bits, act_bits=act_bits, threads=1)
    assert accuracy(path) >= accuracy(DIGITS) - points_lost


def test_output_error_beats_plain_abs_max_at_low_bits() -> None:
    best = quantize(DIGITS, CALIB, weight_bits=3, threads=1).report.fidelity
    plain = quantize(
        DIGITS, CALIB, weight_bits=3, weight_calibration="absmax", bias_correction=False, threads=1
    ).report.fidelity
    assert best is not None
    assert plain is not None
    assert best.sqnr_db["logits"] > plain.sqnr_db["logits"] + 3


def test_every_layer_is_stored_in_low_bits(w4: tuple[Path, onnx_eptq.Result]) -> None:
    model = onnx.load(w4[0])
    producer = {output: node for node in model.graph.node for output in node.output}
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    linear = [node for node in model.graph.node if node.op_type in LINEAR]
    assert len(linear) == w4[1].report.coverage.layers > 5
    for node in linear:
        weight, bias = producer[node.input[1]], producer[node.input[2]]
        assert (weight.op_type, bias.op_type) == ("DequantizeLinear", "DequantizeLinear")
        cast = producer[weight.input[0]]
        assert (cast.op_type, types[cast.input[0]]) == ("Cast", TensorProto.INT4)
        assert types[bias.input[0]] == TensorProto.INT32
    assert {opset.domain for opset in model.opset_import} == {""}
    assert (model.opset_import[0].version, model.ir_version) == (21, 10)


def test_the_report_says_what_it_has_no_room_for(w4: tuple[Path, onnx_eptq.Result]) -> None:
    report = copy.deepcopy(w4[1].report)
    report.warnings = [f"warning {i}" for i in range(6)]
    report.fed = {f"x{i}": [0.0] * 4 for i in range(7)}
    assert report.fidelity is not None
    report.fidelity.sqnr_db = {f"y{i}": 30.0 for i in range(12)}
    report.fidelity.agreement = {}
    lines = str(report).splitlines()
    assert [" ".join(line.split()) for line in lines if "more" in line] == [
        "fed and 3 more inputs (all of them in --json)",
        "warning and 2 more warnings (all of them in --json)",
        "fidelity and 6 more outputs (all of them in --json)",
    ]
    assert len(lines) <= MAX_LINES
    report.coverage.float_values = {f"v{i}": "kept float as asked" for i in range(20)}
    report.fidelity.selected = {f"s{i}": ["y0"] for i in range(9)}
    lines = str(report).splitlines()
    assert 20 < len(lines) <= MAX_LINES
    assert {line.split()[0] for line in lines if "more" in line} == {"float", "fed", "warning", "fidelity"}


def test_report_is_complete_and_true(w4: tuple[Path, onnx_eptq.Result]) -> None:
    path, result = w4
    report = result.report
    assert report.coverage.complete
    assert report.storage == {4: "cast"}
    assert report.bytes == path.stat().st_size
    assert report.float_bytes == DIGITS.stat().st_size
    assert report.samples == 256
    assert report.parity is not None
    assert report.parity.integer_values >= report.coverage.layers - 2
    assert report.parity.integer_differences == 0
    assert report.parity.basic_equals_off
    assert set(report.seconds) >= {"prepare", "calibrate", "weights", "verify", "compare"}
    assert len(str(report).splitlines()) <= 40
    assert json.loads(report.to_json())["fidelity"]["samples"] == 256
    properties = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert properties["onnx_eptq.version"] == onnx_eptq.__version__
    assert json.loads(properties["onnx_eptq.settings"])["weight_bits"] == 4
    assert "integer kernels 0/" in properties["onnx_eptq.parity"]
    assert f"{report.coverage.layers} of {report.coverage.layers} layers" in properties["onnx_eptq.coverage"]


def test_same_seed_and_threads_give_identical_bytes(tmp_path: Path, w4: tuple[Path, onnx_eptq.Result]) -> None:
    again = tmp_path / "again.onnx"
    quantize(DIGITS, CALIB, again, weight_bits=4, threads=1)
    assert again.read_bytes() == w4[0].read_bytes()


def test_path_proto_and_graph_give_the_same_model(w4: tuple[Path, onnx_eptq.Result]) -> None:
    proto = onnx.load(DIGITS)
    before = proto.SerializeToString()
    graph = gs.import_onnx(onnx.load(DIGITS))
    nodes = len(graph.nodes)
    for model in (proto, graph):
        result = quantize(model, CALIB, weight_bits=4, threads=1)
        assert [tensor.raw_data for tensor in result.model.graph.initializer] == [
            tensor.raw_data for tensor in w4[1].model.graph.initializer
        ]
    assert proto.SerializeToString() == before
    assert len(graph.nodes) == nodes


def test_iterables_and_readers_are_data(w4: tuple[Path, onnx_eptq.Result]) -> None:
    x = np.load(MODELS / "digits_eval.npz")["x"][:64]

    def samples() -> Iterator[dict[str, np.ndarray]]:
        yield from ({"image": sample} for sample in x)

    class Reader:
        def __init__(self) -> None:
            self.rows = iter(x)

        def get_next(self) -> dict[str, np.ndarray] | None:
            row = next(self.rows, None)
            return None if row is None else {"image": row[None]}

    models = [
        quantize(DIGITS, source, weight_bits=4, threads=1).model for source in (samples(), Reader(), {"image": x})
    ]
    assert models[0].SerializeToString() == models[1].SerializeToString() == models[2].SerializeToString()


def test_bit_overrides_and_kept_layers(tmp_path: Path) -> None:
    plain = quantize(DIGITS, CALIB, weight_bits=4, threads=1, num_samples=32)
    layers = [v for v, point in plain.plan.items() if point.role == "weight"]
    result = quantize(
        DIGITS,
        CALIB,
        tmp_path / "q.onnx",
        weight_bits=4,
        bits={layers[0]: 8},
        keep_float=("Gemm",),
        threads=1,
        num_samples=32,
    )
    coverage = result.report.coverage
    assert coverage.layers_by_bits == {8: 1, 4: coverage.layers - 2}
    assert list(coverage.float_layers.values()) == ["kept float as asked"]
    assert not coverage.complete
    gemm = next(node for node in onnx.load(tmp_path / "q.onnx").graph.node if node.op_type == "Gemm")
    names = {tensor.name for tensor in result.model.graph.initializer}
    assert gemm.input[1] in names
    with pytest.raises(CoverageError, match=r"1 of \d+ layers would stay float: .*kept float as asked"):
        quantize(DIGITS, CALIB, keep_float=("Gemm",), strict=True)


def test_an_edited_plan_is_used(w4: tuple[Path, onnx_eptq.Result]) -> None:
    plan = Plan.from_json(w4[1].plan.to_json())
    assert plan == w4[1].plan
    same = quantize(DIGITS, CALIB, threads=1, plan=plan)
    assert same.model.graph.initializer == w4[1].model.graph.initializer
    with pytest.raises(UsageError, match="'nowhere' is no value of this model"):
        quantize(DIGITS, CALIB, plan=Plan({"nowhere": replace(next(iter(plan.values())), value="nowhere")}))
    del plan[next(point.scale_from[0] for point in plan.values() if point.scale_from)]
    with pytest.raises(UsageError, match="which the plan leaves float"):
        quantize(DIGITS, CALIB, plan=plan)


def test_targets_and_storage_compute_the_same(tmp_path: Path, w4: tuple[Path, onnx_eptq.Result]) -> None:
    x = np.load(MODELS / "digits_eval.npz")["x"][:100]

    def logits(path: Path) -> np.ndarray:
        return np.asarray(
            ort.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, {"image": x})[0]
        )

    expected = logits(w4[0])
    for settings in ({"storage": "int8"}, {"storage": "lut"}, {"opset": 13}, {"target": "onnx"}):
        path = tmp_path / f"{'_'.join(map(str, settings.values()))}.onnx"
        quantize(DIGITS, CALIB, path, weight_bits=4, threads=1, **settings)  # type: ignore[arg-type]
        if "target" in settings:  # float kernels: they round elsewhere
            assert (logits(path).argmax(1) == expected.argmax(1)).mean() >= 0.97
        else:
            np.testing.assert_array_equal(logits(path), expected)
    lowered = onnx.load(tmp_path / "13.onnx")
    assert (lowered.opset_import[0].version, lowered.ir_version) == (13, 8)


@pytest.fixture(params=[False, True], ids=["one file", "external data"])
def external(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether weights go to a data file, as if they were too large for protobuf."""
    if request.param:
        monkeypatch.setattr(graphs, "PROTOBUF_LIMIT", 1000)
        monkeypatch.setattr(graphs, "EXTERNAL_BYTES", 64)
    return bool(request.param)


@pytest.mark.parametrize("error", [VerificationError("planted"), KeyboardInterrupt()])
@pytest.mark.parametrize("stage", ["check_parity", "measure_fidelity"])
def test_what_fails_or_is_interrupted_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, external: bool, stage: str, error: BaseException
) -> None:
    path = tmp_path / "q.onnx"
    path.write_text("what was here before")

    def fail(*args: object, **kwargs: object) -> None:
        (staged,) = (argument for argument in args if isinstance(argument, Path) and argument != DIGITS)
        assert staged.name == path.name
        assert (staged.parent / "q.onnx.data").exists() == external
        raise error

    monkeypatch.setattr(verify, stage, fail)
    with pytest.raises(type(error)):
        quantize(DIGITS, CALIB, path, threads=1, num_samples=32)
    assert path.read_text() == "what was here before"
    assert list(tmp_path.iterdir()) == [path]


def test_external_data_changes_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, external: bool, w4: tuple[Path, onnx_eptq.Result]
) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):  # the second run replaces the files of the first
        result = quantize(DIGITS, CALIB, "q.onnx", weight_bits=4, threads=1)
        files = {path.name: path for path in tmp_path.iterdir()}
        assert set(files) == ({"q.onnx", "q.onnx.data"} if external else {"q.onnx"})
        assert result.report.bytes == sum(path.stat().st_size for path in files.values())
    outside = [t for t in onnx.load("q.onnx", load_external_data=False).graph.initializer if t.external_data]
    assert bool(outside) == external
    found, expected = onnx.load("q.onnx"), onnx.load(w4[0])
    for model in (found, result.model):
        assert contents(model) == contents(expected)
        assert list(model.metadata_props) == list(expected.metadata_props)
        assert list(model.graph.node) == list(expected.graph.node)
    assert (result.report.parity, result.report.fidelity) == (w4[1].report.parity, w4[1].report.fidelity)
    assert accuracy(files["q.onnx"]) == accuracy(w4[0])


def contents(model: onnx.ModelProto) -> list[tuple[object, ...]]:
    return [(t.name, t.data_type, tuple(t.dims), t.raw_data) for t in model.graph.initializer]


def test_the_file_itself_is_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, external: bool) -> None:
    write = graphs.Staged.write

    def damaged(self: graphs.Staged, model: onnx.ModelProto) -> None:
        write(self, model)
        path = self.path.with_name("q.onnx.data") if external else self.path
        largest = max((t.raw_data for t in model.graph.initializer if t.data_type == TensorProto.INT4), key=len)
        data = path.read_bytes()
        assert data.count(largest) == 1
        path.write_bytes(data.replace(largest, bytes(byte ^ 0x11 for byte in largest)))

    monkeypatch.setattr(graphs.Staged, "write", damaged)
    with pytest.raises(VerificationError, match="the written file and the simulation differ"):
        quantize(DIGITS, CALIB, tmp_path / "q.onnx", weight_bits=4, threads=1, num_samples=32)
    assert not list(tmp_path.iterdir())


def test_without_an_output_nothing_stays_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, external: bool
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    result = quantize(DIGITS, CALIB, threads=1, num_samples=32)
    assert not list(tmp_path.iterdir())
    assert result.report.output is None
    assert result.report.bytes > 50_000
    assert accuracy(result.model) > 90


def _with_node(op: str, domain: str = "") -> onnx.ModelProto:
    weight = numpy_helper.from_array(np.eye(4, dtype=np.float32), "w")
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["h"], name="linear"),
            helper.make_node(op, ["h"], ["y"], "odd", domain=domain),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [weight],
    )
    opsets = [helper.make_opsetid("", 17), *([helper.make_opsetid(domain, 1)] if domain else [])]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def _brain_float() -> onnx.ModelProto:
    weight = helper.make_tensor("w", TensorProto.BFLOAT16, (4, 4), np.eye(4).ravel())
    ends = [helper.make_tensor_value_info(name, TensorProto.BFLOAT16, ["N", 4]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", ends[:1], ends[1:], [weight])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_models_that_cannot_be_quantized_are_refused() -> None:
    x = np.zeros((8, 4), np.float32)
    with pytest.raises(UnsupportedOp, match=r"1 node\(s\) cannot be simulated: 'odd' my.domain.Odd"):
        quantize(_with_node("Odd", "my.domain"), x)
    with pytest.raises(ModelError, match="bfloat16"):
        quantize(_brain_float(), x)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight_bits": 9}, "weight_bits: input should be less than or equal to 8, found 9"),
        ({"weight_bit": 4}, "no setting 'weight_bit'"),
        ({"method": "magic"}, "method: .*rtn.*, found 'magic'"),
        ({"target": "toaster"}, "no target 'toaster'; known: onnxruntime, onnx"),
        ({"preset": "sepia"}, "no preset 'sepia'; known: .*imagenet"),
        ({"opset": 13, "weight_bits": 4, "storage": "cast"}, "storage 'cast' .* need opset 21, not 13"),
        ({"device": "abacus"}, "device 'abacus' cannot be used"),
        ({"seed": 2**63}, "seed: input should be less than"),
        ({"threads": 10**10}, "threads: input should be less than"),
        ({"opset": 12}, "opset: input should be greater than or equal to 13"),
        ({"bits": {"conv9999": 4}}, "'conv9999' matches no layer"),
        ({"keep_float": ("nothing",)}, "'nothing' matches no layer"),
    ],
)
def test_settings_are_checked_first(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        quantize(DIGITS, CALIB, **settings)  # type: ignore[arg-type]


def test_outputs_are_checked_first(tmp_path: Path) -> None:
    copy = tmp_path / "copy.onnx"
    copy.write_bytes(DIGITS.read_bytes())
    link = tmp_path / "link.onnx"
    link.symlink_to(tmp_path / "no" / "such.onnx")
    for output, message in (
        (copy, "is the input model itself"),
        (tmp_path, "is a folder"),
        (tmp_path / "no" / "such.onnx", "folder .* does not exist"),
        (link, "folder .* does not exist"),
        (tmp_path / "q.pbtxt", "has the name of a textproto file"),
        (tmp_path / "q.json", "has the name of a json file"),
    ):
        with pytest.raises(OutputError, match=message):
            quantize(copy, CALIB, output)
    with pytest.raises(DataError):
        quantize(copy, tmp_path / "nowhere", tmp_path / "q.onnx")
    data = tmp_path / "x.npy"
    np.save(data, np.zeros((2, 1, 8, 8), np.float32))
    with pytest.raises(OutputError, match="is the calibration data itself"):
        quantize(copy, data, data)
    assert copy.read_bytes() == DIGITS.read_bytes()


def test_a_model_that_preparation_changed_is_warned_about(monkeypatch: pytest.MonkeyPatch) -> None:
    prepare = pipeline.prepare

    def change(graph: gs.Graph) -> dict[str, int]:
        changes = prepare(graph)
        weight = next(node.inputs[1] for node in graph.nodes if node.op == "Conv")
        weight.values = weight.values * np.float32(1.2)
        return changes

    monkeypatch.setattr(pipeline, "prepare", change)
    job = pipeline.begin(DIGITS, CALIB, method="rtn")
    (warning,) = job.report.warnings
    assert "of the prepared float model is only" in warning


def test_last_digits_are_no_change_of_a_model() -> None:
    """What is normalized to a deviation of 0 is noise, in the model and as prepared."""
    text = "(float[N,4,5,5] x) => (float[N,4,5,5] y) { h = Conv(x, w) y = InstanceNormalization <epsilon=1e-12> (h, s, b) }"
    draw = models.weights(0)
    x = np.random.default_rng(0).standard_normal((40, 4, 5, 5)).astype(np.float32)
    x[0] = 0.3
    proto = models.parse(text, w=draw(4, 4, 1, 1), s=draw(4), b=draw(4))
    assert pipeline.begin(proto, x, method="rtn", threads=1).report.warnings == []


def test_scores_that_no_kernel_tells_apart_are_no_change_of_a_model() -> None:
    """Where a Sigmoid is all but 0, ONNX Runtime's own is off by more than the value; on a grid of such values by steps."""
    draw = models.weights(0)
    text = "(float[N,16] x) => (float[N,256] y) { l = Gemm(x, w, b) y = Sigmoid(l) }"
    x = np.random.default_rng(0).standard_normal((64, 16)).astype(np.float32)
    small = models.parse(text, w=draw(16, 256) * np.float32(0.3), b=np.full(256, -17, np.float32))
    report = quantize(small, x, method="rtn", threads=1).report
    assert report.parity.float_differences > 0
    assert report.parity.float_unexplained == 0
    x[0] = 0
    mixed = models.parse(text, w=draw(16, 256) * np.float32(8), b=np.full(256, -40, np.float32))
    assert pipeline.begin(mixed, x, method="rtn", threads=1).report.warnings == []


def test_a_model_given_as_a_proto_is_held_against_as_it_came() -> None:
    proto = onnx.load(DIGITS)
    assert pipeline.begin(proto, CALIB, method="rtn").source is proto


@pytest.mark.parametrize("fault", ["names", "ir_version", "domain"])
def test_protos_that_importing_mends_are_quantized(fault: str) -> None:
    proto = onnx.load(DIGITS)
    if fault == "names":
        for node in proto.graph.node:
            node.name = "same"
    elif fault == "ir_version":
        proto.ir_version = 99
    else:
        proto.opset_import.append(onnx.helper.make_opsetid("ai.onnx.ml", 99))
    with pytest.raises(VerificationError):
        pipeline.verify.session(proto, "basic")
    before = proto.SerializeToString()
    assert pipeline.begin(proto, CALIB, method="rtn").report.warnings == []
    assert proto.SerializeToString() == before


def test_what_is_empty_in_every_sample_is_warned_about() -> None:
    """A cache of keys in several parts, before the first step."""
    draw = models.weights(0)
    text = (
        "(float[N,T,8] x, float[N,2,P,8] past) => (float[N,T,8] y) { k = MatMul(x, w) i = Constant <value_int=0> () "
        "j = Constant <value_int=1> () a = Gather <axis=1> (past, i) b = Gather <axis=1> (past, j) c = Concat <axis=1> (a, k) "
        "d = Concat <axis=1> (b, k) t = Transpose <perm=[0,2,1]> (c) s = MatMul(k, t) p = Softmax(s) y = MatMul(p, d) }"
    )
    draws = np.random.default_rng(0).standard_normal((40, 1, 4, 8)).astype(np.float32)
    data = [{"x": x, "past": np.zeros((1, 2, 0, 8), np.float32)} for x in draws]
    report = quantize(models.parse(text, w=draw(8, 8)), data, method="rtn", threads=1).report
    assert (
        "'past' is empty in every sample, so its range is a guess; calibrate on samples that fill it, too"
        in report.warnings
    )


def test_config_round_trip(tmp_path: Path) -> None:
    config = Config.make(weight_bits=4, mean=(0.5,), bits={"a*": 8}, keep_float=("Gemm",))
    config.save(tmp_path / "c.yaml")
    assert Config.load(tmp_path / "c.yaml") == config
    assert Config.load(tmp_path / "c.yaml", weight_bits=8).weight_bits == 8
    for text, message in (
        ("- a", "holds a list"),
        ("weigth_bits: 4", "no setting 'weigth_bits'"),
        ("a: [", "cannot read"),
    ):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(UsageError, match=message):
            Config.load(tmp_path / "bad.yaml")
    with pytest.raises(UsageError, match="cannot read the config file"):
        Config.load(tmp_path / "none.yaml")


def test_raw_pixels_are_warned_about_unless_asked_for(tmp_path: Path) -> None:
    x = np.load(MODELS / "digits_eval.npz")["x"][:32] * 255
    warned = quantize(DIGITS, {"image": x}, threads=1).report.warnings
    assert any("looks like raw pixels" in warning for warning in warned)
    assert not quantize(DIGITS, CALIB, preset="raw", num_samples=32, threads=1).report.warnings


@pytest.mark.parametrize(("bias", "warned"), [(-6.0, True), (0.0, False)])
def test_a_score_that_no_sample_raises_is_warned_about(bias: float, warned: bool) -> None:
    text = "(float[N,4] x) => (float[N,1] y) { h = Gemm(x, w, b) y = Sigmoid(h) }"
    model = models.parse(text, w=models.weights(0)(4, 1), b=np.array([bias], np.float32))
    data = np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32)
    warnings = quantize(model, data, method="rtn", threads=1).report.warnings
    assert any("'y' is a score between 0 and 1" in warning for warning in warnings) == warned


@pytest.mark.parametrize(("channels", "together", "judging"), [(2, 32, 64), (48, 32, 32), (128, 12, 24), (512, 3, 8)])
def test_large_activations_are_run_few_at_a_time(
    monkeypatch: pytest.MonkeyPatch, channels: int, together: int, judging: int
) -> None:
    """A sample is as large as its largest activation where that exceeds its input by far."""
    monkeypatch.setattr(pipeline, "IMAGE_ELEMENTS", 3 * 8 * 8)
    nodes = f"h = Conv <pads=[1,1,1,1]> (x, w) y = Conv <group={channels}> (h, w)"
    model = models.parse(
        f"(float[N,1,8,8] x) => (float[N,{channels},6,6] y) {{ {nodes} }}", w=np.ones((channels, 1, 3, 3), np.float32)
    )
    data = np.zeros((80, 1, 8, 8), np.float32)
    job = pipeline.begin(model, data, threads=1)
    assert job.batches.batch_size == together
    assert pipeline.weight_samples(job) == judging
    assert pipeline.begin(model, data, threads=1, batch_size=5).batches.batch_size == 5


@pytest.mark.parametrize(("count", "used"), [(10, 10), (80, 32)])
def test_few_samples_all_take_part_in_evening_out_channels(
    monkeypatch: pytest.MonkeyPatch, count: int, used: int
) -> None:
    monkeypatch.setattr(pipeline, "IMAGE_ELEMENTS", 4)  # so that samples of four numbers count as images
    seen = []

    def record(*arguments: Any) -> list[Any]:
        seen.append(arguments[4].batches.num_samples)
        return []

    monkeypatch.setattr(pipeline, "equalize", record)
    model = models.parse("(float[N,4] x) => (float[N,3] y) { y = MatMul(x, w) }", w=models.weights(0)(4, 3))
    quantize(model, np.random.default_rng(0).normal(size=(count, 4)).astype(np.float32), threads=1)
    assert seen == [used]


def test_random_data_must_be_asked_for(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no calibration data is given"):
        quantize(DIGITS, None, threads=1)
    result = quantize(DIGITS, None, num_samples=16, threads=1, random_calibration=True)
    assert "random" in result.report.data
    assert any("only 16 calibration samples" in warning for warning in result.report.warnings)


def test_a_runtime_with_numbers_of_its_own_is_warned_about():
    """ONNX Runtime rounds the inputs of a product whose weights alone are integers (MatMulNBits)."""
    proto = models.MODELS["spectrogram"]()
    feeds = models.feeds(proto, batch=16)
    data = {name: np.concatenate([feed[name] for feed in feeds]) for name in feeds[0]}
    found = {target: onnx_eptq.quantize(proto, data, target=target, method="rtn", threads=1) for target in TARGETS}
    noise = {target: result.report.parity.optimized_db["logits"] for target, result in found.items()}
    assert noise["onnxruntime"] > noise["onnx"] + 10
    full, exact = (
        verify.measure_fidelity(proto, found["onnx"].model, [data], 1, level=level) for level in ("all", "basic")
    )
    worse, better = full.sqnr_db["logits"], exact.sqnr_db["logits"]
    assert better > worse + 2
    warned = [warning for warning in found["onnx"].report.warnings if "at full optimisation" in warning]
    assert len(warned) == 1
    assert f"{worse} dB at full" in warned[0]
    assert f"{better} dB at basic" in warned[0]
    assert not any("at full optimisation" in warning for warning in found["onnxruntime"].report.warnings)
    assert remarks.runtime_losses(["logits"], full, exact) == warned
    near = replace(exact, sqnr_db={"logits": worse + 0.9})  # other numbers, about as good
    assert remarks.runtime_losses(["logits"], full, near) == remarks.runtime_losses([], full, exact) == []
    parity = replace(found["onnx"].report.parity, optimized_db={"logits": 20.0})
    for decibel, differs in ((10.0, False), (19.0, True), (30.0, True)):
        fidelity = replace(full, sqnr_db={"logits": decibel})
        assert bool(remarks.deviating(parity, fidelity)) == differs
    assert remarks.deviating(parity, replace(full, sqnr_db={})) == []
    fidelity = replace(full, sqnr_db={"logits": 44.0})
    assert remarks.deviating(replace(parity, optimized_db={"logits": 45.0}), fidelity) == []  # and no harm


def test_ranges_weighed_by_gradients_lose_less_at_four_bits() -> None:
    found = [
        quantize(DIGITS, CALIB, act_bits=4, calibration=method, threads=1).report.fidelity for method in ("hmse", "mse")
    ]
    assert found[0] is not None
    assert found[1] is not None
    assert found[0].sqnr_db["logits"] > found[1].sqnr_db["logits"] + 0.3


def test_gradients_that_mislead_are_not_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were all that counts near 0, ranges would saturate nearly everything; the network's output tells."""
    seen = []

    def mislead(
        teacher: object, graph: object, plan: object, stats: calibrate.Stats, *args: object, **rest: object
    ) -> None:
        for histogram in stats.histograms.values():
            histogram.importance = torch.zeros_like(histogram.counts)
            histogram.importance[histogram.bins_of(torch.zeros(1))] = 1.0
        seen.append(stats)

    monkeypatch.setattr(pipeline.hessian, "weigh_ranges", mislead)
    monkeypatch.setattr(calibrate, "LEANINGS", (1.0, 0.0))
    misled = quantize(DIGITS, CALIB, act_bits=4, calibration="hmse", threads=1)
    plain = quantize(DIGITS, CALIB, act_bits=4, calibration="mse", threads=1)
    assert {histogram.leaning for histogram in seen[0].histograms.values()} == {0.0}
    assert list(misled.model.graph.initializer) == list(plain.model.graph.initializer)


def test_ranges_without_memory_for_gradients_are_plain_and_it_is_said() -> None:
    found = quantize(DIGITS, CALIB, act_bits=4, cache_mb=0, threads=1)
    assert any(re.search(r"gradients need \d+ MB, more than --cache-mb allows", text) for text in found.report.warnings)
    plain = quantize(DIGITS, CALIB, act_bits=4, calibration="mse", threads=1)
    assert list(found.model.graph.initializer) == list(plain.model.graph.initializer)


def with_external_weights(path: Path, seed: int, *, in_nodes: bool = False) -> None:
    model = models.parse(
        "(float[N,8] x) => (float[N,4] y) { h = MatMul(x, w) r = Relu(h) y = MatMul(r, v) }",
        w=models.weights(seed)(8, 64),
        v=models.weights(seed + 1)(64, 4),
    )
    if in_nodes:
        held = [helper.make_node("Constant", [], [tensor.name], value=tensor) for tensor in model.graph.initializer]
        nodes = [*held, *model.graph.node]
        del model.graph.initializer[:], model.graph.node[:]
        model.graph.node.extend(nodes)
    outside = {"save_as_external_data": True, "location": "weights.bin", "size_threshold": 16}
    onnx.save(model, path, **outside, convert_attribute=in_nodes)


@pytest.mark.parametrize("in_nodes", [False, True])
def test_an_output_that_holds_the_models_weights_is_refused(tmp_path: Path, in_nodes: bool) -> None:
    with_external_weights(tmp_path / "m.onnx", 0, in_nodes=in_nodes)
    assert graphs.file_bytes(tmp_path / "m.onnx") > 4 * (8 * 64 + 64 * 4)
    before = (tmp_path / "weights.bin").read_bytes()
    with pytest.raises(OutputError, match=r"would replace .*weights.bin"):
        quantize(tmp_path / "m.onnx", np.zeros((8, 8), np.float32), tmp_path / "weights.bin", threads=1)
    assert (tmp_path / "weights.bin").read_bytes() == before


def test_a_checkpoint_belongs_to_weights_that_lie_beside_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)
    with_external_weights(tmp_path / "m.onnx", 0)
    run = partial(quantize, tmp_path / "m.onnx", data, tmp_path / "q.onnx", method="eptq", steps=4, threads=1)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "finish", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run()
    before = (tmp_path / "m.onnx").read_bytes()
    (tmp_path / "weights.bin").unlink()
    with_external_weights(tmp_path / "m.onnx", 5)
    assert (tmp_path / "m.onnx").read_bytes() == before  # all that differs lies beside it
    with pytest.raises(UsageError, match="belongs to another model"):
        run(resume=True)


def test_inputs_with_a_default_become_constants_and_that_is_said() -> None:
    model = models.parse(
        "(float[N,4] x) => (float[N,3] y) { h = MatMul(x, w) y = Mul(h, gain) }",
        w=models.weights(0)(4, 3),
        gain=np.float32(2),
    )
    model.graph.input.append(helper.make_tensor_value_info("gain", TensorProto.FLOAT, []))
    data = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32)
    report = quantize(model, data, threads=1).report
    assert any("inputs with a default ('gain') become constants" in warning for warning in report.warnings)
    model.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [4, 3]))  # as old exporters list all
    assert not any("default" in warning for warning in quantize(model, data, threads=1).report.warnings)


def test_widths_that_are_given_are_heeded(w4: tuple[Path, onnx_eptq.Result], tmp_path: Path) -> None:
    settings = {"num_samples": 16, "threads": 1, "sensitivity_cache": tmp_path}
    result = quantize(DIGITS, CALIB, weight_bits=8, compression=3, **settings)
    assert result.report.coverage.layers_by_bits == {8: 14}
    with pytest.raises(UsageError, match="says every width already"):
        quantize(DIGITS, CALIB, weight_bits=8, plan=w4[1].plan, **settings)
    found = onnx_eptq.explore(DIGITS, CALIB, **settings)
    assert found.choose(max_weight_bytes=np.int64(20_000))[1].average_bits <= 4.5


def test_another_default_device_changes_nothing() -> None:
    torch.set_default_device("meta")
    try:
        assert quantize(DIGITS, CALIB, num_samples=16, threads=1).report.bytes
        assert torch.get_default_device().type == "meta"
    finally:
        torch.set_default_device("cpu")


SAMPLES = np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32)
ODD_SAMPLES = {
    "the same": (np.tile(SAMPLES[:1], (64, 1)), "the first 8 samples are all the same"),
    "one far out": (
        np.concatenate([SAMPLES, SAMPLES[:1] * 1000]),
        r"1 of 65 samples of input 'x' reach \d+ times as far",
    ),
    "far out and lost": (np.concatenate([SAMPLES, SAMPLES[:1] * 1000]), "output 'y' agrees with the float model's in"),
    "as they should be": (SAMPLES, None),
}


@pytest.mark.parametrize("name", ODD_SAMPLES)
def test_samples_that_say_little_are_warned_about(name: str) -> None:
    data, message = ODD_SAMPLES[name]
    model = models.parse("(float[N,4] x) => (float[N,3] y) { y = MatMul(x, w) }", w=models.weights(0)(4, 3))
    warnings = quantize(model, data, calibration="minmax", threads=1).report.warnings
    assert any(re.search(message, warning) for warning in warnings) if message else not warnings


def test_notes_of_the_exporter_are_counted_and_can_be_left_out() -> None:
    model = onnx.load(DIGITS)
    helper.set_model_props(model, {"classes": "0 to 9"})
    for node in model.graph.node:
        helper.set_metadata_props(node, {"stack_trace": 2000 * "x"})
        node.doc_string = 500 * "y"
    data = np.random.default_rng(0).random((32, 1, 16, 16), np.float32)
    kept, stripped = (quantize(model, data, strip_notes=strip, threads=1) for strip in (False, True))
    assert kept.report.bytes - stripped.report.bytes == pytest.approx(kept.report.notes_bytes, rel=0.05)
    assert kept.report.notes_bytes > 20000
    assert stripped.report.notes_bytes == 0
    assert any("--strip-notes leaves them out" in warning for warning in kept.report.warnings)
    assert not any("--strip-notes" in warning for warning in stripped.report.warnings)
    assert not any(node.metadata_props or node.doc_string for node in stripped.model.graph.node)
    assert any(entry.key == "classes" for entry in stripped.model.metadata_props)
    budget = {"weight_bits": (4, 8), "max_size": kept.report.bytes - 30000}
    with pytest.raises(UsageError, match=r"file size can be no less than .*; .* --strip-notes leaves"):
        quantize(model, data, **budget, threads=1)
    assert quantize(model, data, **budget, strip_notes=True, threads=1).report.bytes <= budget["max_size"]
