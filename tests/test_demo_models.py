from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from onnx_eptq.data import InputSpec, open_data

MODELS = Path(__file__).parent.parent / "models"
CALIB = MODELS / "digits_calib"
IMAGE = InputSpec("image", (None, 1, 16, 16), np.dtype(np.float32))


@pytest.fixture(scope="module")
def model():
    return onnx.load(MODELS / "digits.onnx")


@pytest.fixture(scope="module")
def session():
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(MODELS / "digits.onnx", options, providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def held_out():
    with np.load(MODELS / "digits_eval.npz") as arrays:
        return arrays["x"], arrays["y"]


def test_the_file_is_valid_and_says_what_the_readme_says(model):
    onnx.checker.check_model(model, full_check=True)
    (given,), (result,) = model.graph.input, model.graph.output
    assert (given.name, result.name) == ("image", "logits")
    sizes = [dim.dim_param or dim.dim_value for dim in given.type.tensor_type.shape.dim]
    assert sizes == ["batch", 1, 16, 16]


def test_it_holds_what_quantizers_have_to_handle(model):
    ops = Counter(node.op_type for node in model.graph.node)
    assert {"Conv", "BatchNormalization", "Relu", "Clip", "Add", "Concat", "GlobalAveragePool", "Gemm"} <= set(ops)
    assert ops["Add"] == 2
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    groups = [next(a.i for a in node.attribute if a.name == "group") for node in convolutions]
    depthwise = [n for n, g in zip(convolutions, groups, strict=True) if g > 1 and weights[n.input[1]].shape[1] == 1]
    assert len(depthwise) == 4


def test_it_recognises_held_out_digits(session, held_out):
    x, y = held_out
    logits = session.run(["logits"], {"image": x})[0]
    assert (logits.argmax(1) == y).mean() >= 0.97


def rounded(model, bits):
    """Return the model with every weight rounded to the nearest step, per output channel."""
    result = onnx.ModelProto.FromString(model.SerializeToString())
    weights = {node.input[1] for node in result.graph.node if node.op_type in ("Conv", "Gemm")}
    for tensor in result.graph.initializer:
        if tensor.name in weights:
            weight = numpy_helper.to_array(tensor)
            scale = np.abs(weight).max(axis=tuple(range(1, weight.ndim)), keepdims=True) / (2 ** (bits - 1) - 1)
            tensor.CopyFrom(numpy_helper.from_array(np.rint(weight / scale) * scale, tensor.name))
    return result


@pytest.mark.parametrize(("bits", "low", "high"), [(8, 0.97, 1.0), (2, 0.1, 0.6)])
def test_plain_rounding_hurts_at_two_bits_only(model, held_out, bits, low, high):
    session = onnxruntime.InferenceSession(rounded(model, bits).SerializeToString(), providers=["CPUExecutionProvider"])
    logits = session.run(None, {"image": held_out[0]})[0]
    assert low <= (logits.argmax(1) == held_out[1]).mean() <= high


def test_any_batch_size_gives_the_same_logits(session, held_out):
    x = held_out[0][:7]
    together = session.run(None, {"image": x})[0]
    alone = np.concatenate([session.run(None, {"image": one[None]})[0] for one in x])
    np.testing.assert_allclose(together, alone, atol=1e-4)


def test_the_calibration_folder_needs_no_options(held_out):
    batches = open_data(CALIB, [IMAGE])
    assert (batches.num_samples, batches.describe()) == (256, f"256 PNG images in {CALIB}")
    fed = np.concatenate([batch["image"] for batch in batches])
    assert (fed.shape, fed.min(), fed.max()) == ((256, 1, 16, 16), 0, 1)
    # Both sets are preprocessed alike, and no held-out digit is among the calibration images.
    steps = np.arange(256, dtype=np.float32) * np.float32(1 / 255)
    assert set(np.unique(fed)) | set(np.unique(held_out[0])) <= set(steps)
    assert not {image.tobytes() for image in fed} & {image.tobytes() for image in held_out[0]}


def test_the_files_stay_small():
    sizes = {path.name: path.stat().st_size for path in MODELS.iterdir() if path.is_file()}
    assert sizes["digits.onnx"] < 250_000
    assert sizes["digits_eval.npz"] < 300_000
    assert sum(path.stat().st_size for path in CALIB.iterdir()) < 200_000
