"""The tools that export and score whole architectures, on architectures that are there."""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from test_architectures import exported
from test_tools import TOP, cells, run

from models import parse, weights
from onnx_eptq import pipeline
from onnx_eptq.report import Phases

import export_zoo  # isort: skip
import score_zoo  # isort: skip

TOOLS = TOP / "tools"


@pytest.mark.parametrize("kind", export_zoo.KINDS)
def test_samples_are_seeded_and_sized(kind):
    shape = {"images": (3, 8, 10), "series": (5, 4)}.get(kind, (12,))
    inputs = [export_zoo.Input("x", kind, shape)]
    first, again, other = (export_zoo.samples(inputs, 6, seed)["x"] for seed in (1, 1, 2))
    assert first.shape == (6, *shape)
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    if first.dtype == np.int64:
        assert 0 <= first.min() <= first.max() < export_zoo.VOCABULARY
    else:
        assert abs(first.mean()) < 1
        assert 0.3 < first.std() < 3


def test_every_model_says_what_it_needs():
    small = [entry for entry in export_zoo.MODELS.values() if entry.small]
    assert 0.4 < len(small) / len(export_zoo.MODELS) < 0.7
    for entry in export_zoo.MODELS.values():
        assert entry.family in score_zoo.GOALS
        assert all(item.kind in export_zoo.KINDS for item in entry.inputs)


def test_forms_that_are_asked_for():
    def chosen(exporter, opset):
        return export_zoo.forms(argparse.Namespace(exporter=exporter, opset=opset))

    assert chosen(None, None) == list(export_zoo.FORMS)
    assert chosen("dynamo", None) == [form for form in export_zoo.FORMS if form[0] == "dynamo"]
    assert chosen(None, 17) == [("torchscript", 17)]
    assert chosen("torchscript", 16) == [("torchscript", 16)]


def test_multiplications_are_counted():
    """Against the definition of each operator; a product of which one side stays float does not count as done."""
    draw = weights(1)
    proto = parse(
        """(float[N,3,6,6] x) => (float[N,5] y) {
          a = Conv <pads=[1,1,1,1], strides=[2,2]> (x, w0) r = Relu(a)
          u = ConvTranspose <strides=[2,2]> (r, w1) f = Flatten(u) g = Gemm(f, w2)
          e = Exp(g) h = Log(e) m = MatMul(h, w3)
          t = Unsqueeze(m, one) o = MatMul(t, t2) s = Squeeze(o, one) y = Add(s, m)
        }""",
        w0=draw(8, 3, 3, 3, fan=27), w1=draw(8, 4, 2, 2, fan=32), w2=draw(144, 5, fan=144), w3=draw(5, 5, fan=5),
        t2=draw(5, 5, fan=5), one=np.array([1]),
    )  # fmt: skip
    data = {"x": np.random.default_rng(0).normal(size=(8, 3, 6, 6)).astype(np.float32)}
    job = pipeline.begin(proto, data, method="rtn", weight_bits=4, keep_float=["w3"], threads=1)
    ready = pipeline.calibrated(job, Phases())
    done, everything = score_zoo.multiplications(ready, job.plan, {"x": data["x"][:2]})
    each = {"Conv": 9 * 8 * 27, "ConvTranspose": 9 * 8 * 4 * 4, "Gemm": 144 * 5, "kept": 25, "last": 25}
    assert everything == 2 * sum(each.values())
    assert done == everything - 2 * each["kept"]


def row(**changes):
    good = {
        "family": "cnn",
        "w4a8": {"bytes_percent": 99.9, "macs_percent": 100.0},
        "w8a8": {"sqnr_db": {"y": 30.0}},
        "static": {"sqnr_db": {"y": 30.2}},
        "learned": {"distances": {"rtn": 2.0, "1 network/latent": 1.0}, "kept": "1 network/latent"},
    }
    return {**good, **changes}


def test_what_is_complained_about():
    assert score_zoo.complaints(row()) == []
    assert score_zoo.complaints(row(static={"error": "it fails"})) == []
    assert score_zoo.complaints(row(w4a8={"error": "no"})) == ["w4a8: no"]
    assert score_zoo.complaints(row(w4a8={"bytes_percent": 98.0, "macs_percent": 100.0})) == ["bytes_percent 98.0 < 99"]
    assert score_zoo.complaints(row(family="other", w4a8={"bytes_percent": 98.0, "macs_percent": 97.5})) == []
    assert "29.0 dB" in score_zoo.complaints(row(w8a8={"sqnr_db": {"y": 29.0}}))[0]
    worse = {"distances": {"rtn": 1.0, "1 network/latent": 2.0}, "kept": "rtn"}
    assert score_zoo.complaints(row(learned=worse)) == ["learning found nothing better than rtn"]


@pytest.mark.slow
def test_a_file_is_scored_once(tmp_path):
    """A small U-Net in the place of the zoo's; the second run makes nothing again."""
    name = export_zoo.file_name("unet", "torchscript", 17)
    onnx.save(exported("UNet", 17), tmp_path / name)
    facts = export_zoo.describe("unet", "torchscript", 17)
    facts["inputs"] = [{"name": "x", "kind": "images", "shape": [3, 16, 16]}]
    (tmp_path / name).with_suffix(".json").write_text(json.dumps(facts))
    out = tmp_path / "rows.jsonl"
    flags = [
        f"--zoo={tmp_path}",
        "--only=unet",
        "--steps=20",
        "--learn=all",
        "--batch=4",
        "--threads=1",
        f"--out={out}",
    ]
    printed = run("score_zoo.py", *flags)
    (header, line) = cells(printed)
    assert (line[0], line[1], line[3], line[-1]) == ("unet", "torchscript 17", "100", "")
    assert float(line[2]) > 99.5  # scales of a Resize are float
    (scored,) = map(json.loads, out.read_text().splitlines())
    assert min(scored["w8a8"]["sqnr_db"]["y"], scored["static"]["sqnr_db"]["y"]) > 20
    assert scored["learned"]["steps"] == 20
    assert len(header) == len(line)
    assert run("score_zoo.py", *flags) == printed
    assert len(out.read_text().splitlines()) == 1


@pytest.mark.slow
def test_no_node_case_is_computed_wrong():
    header, *rows = cells(run("node_cases.py"))
    assert header == ["operator", "cases", "by function", "by runtime", "not run", "wrong"]
    everything = rows[-1]
    assert everything[0] == "all"
    assert int(everything[5]) == 0
    assert int(everything[2]) >= 850
    assert int(everything[3]) >= 120
    counts = np.array([[int(cell or 0) for cell in line[1:]] for line in rows[:-1]])
    assert (counts[:, 0] == counts[:, 1:].sum(1)).all()


@pytest.mark.slow
def test_the_small_half_of_the_zoo_reaches_its_goals(tmp_path: Path) -> None:
    folder = os.environ.get("ONNX_EPTQ_ZOO")
    if not folder:
        packages = ("torchvision", "timm", "onnxscript")
        missing = [name for name in packages if importlib.util.find_spec(name) is None]
        if missing:
            pytest.skip(f"no zoo in ONNX_EPTQ_ZOO, and {', '.join(missing)} missing to export one")
        folder = str(tmp_path / "zoo")
        subprocess.run([sys.executable, TOOLS / "export_zoo.py", "--small", "--out", folder], check=True)
    out = tmp_path / "zoo.jsonl"
    flags = ["--zoo", folder, "--small", "--forms", "turn", "--threads", "1", "--parts", "w4a8", "w8a8", "static"]
    command = [sys.executable, TOOLS / "score_zoo.py", *flags, "--out", out]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len({scored["model"] for scored in rows}) >= 10
    assert ran.returncode == 0, ran.stdout
