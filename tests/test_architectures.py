"""Small forms of the architectures that people deploy, exported by PyTorch, through the whole of it."""

import io
import math
import warnings
from collections.abc import Callable
from functools import cache

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import parse, weights
from onnx_eptq import pipeline
from onnx_eptq.plan import is_constant
from onnx_eptq.report import Phases

MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {}


def architecture(*shape: int) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Register a network that takes samples of this shape."""

    def register(kind: type[nn.Module]) -> type[nn.Module]:
        MODELS[kind.__name__] = (kind, shape)
        return kind

    return register


@architecture(9, 16)
class Attention(nn.Module):
    """Two heads with scaled scores, a class token, LayerNorm, GELU; the token alone is classified."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.places = nn.Parameter(torch.randn(1, 1, 16)), nn.Parameter(torch.randn(1, 10, 16))
        self.norm, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.up, self.down, self.last = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.places
        q, k, v = self.qkv(self.norm(x)).reshape(x.shape[0], 10, 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)
        scores = (q * 8**-0.5) @ k.transpose(-1, -2)
        x = x + self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(x.shape[0], 10, 16))
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return self.last(x[:, 0])


@architecture(9, 16)
class Mixer(nn.Module):
    """Matrices over tokens and over channels, GELU in its tanh form."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.tokens = nn.Sequential(nn.Linear(9, 18), nn.GELU("tanh"), nn.Linear(18, 9))
        self.channels = nn.Sequential(nn.Linear(16, 32), nn.GELU("tanh"), nn.Linear(32, 16))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norm(x).transpose(1, 2)).transpose(1, 2)
        return (x + self.channels(self.norm2(x))).mean(1)


@architecture(8, 8, 8)
class Windows(nn.Module):
    """Shifted windows of 4 x 4 with a table of relative biases and a mask: axis 0 counts windows, not samples."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)
        self.bias = nn.Parameter(torch.randn(1, 16, 16))
        region = torch.zeros(8, 8)
        region[6:] += 1
        region[:, 6:] += 2
        flat = self.cut(region[None, :, :, None])[..., 0]
        self.register_buffer("mask", (flat[:, None] != flat[:, :, None]) * -100.0)

    @staticmethod
    def cut(x: Tensor) -> Tensor:
        x = x.reshape(x.shape[0], 2, 4, 2, 4, x.shape[-1])
        return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, x.shape[-1])

    def forward(self, x: Tensor) -> Tensor:
        windows = self.cut(torch.roll(self.norm(x), (-2, -2), (1, 2)))
        q, k, v = self.qkv(windows).chunk(3, -1)
        scores = q @ k.transpose(-1, -2) / math.sqrt(8) + self.bias
        scores = (scores.reshape(-1, 4, 16, 16) + self.mask).reshape(-1, 16, 16)
        mixed = self.out(scores.softmax(-1) @ v).reshape(-1, 2, 2, 4, 4, 8).permute(0, 1, 3, 2, 4, 5)
        return x + torch.roll(mixed.reshape(-1, 8, 8, 8), (2, 2), (1, 2))


@architecture(3, 16, 16)
class Squeeze(nn.Module):
    """Inverted bottleneck with squeeze and excitation, HardSwish and SiLU."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.norm = nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16)
        self.deep = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.small, self.large = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.leave, self.last = nn.Conv2d(16, 16, 1), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.norm(self.enter(x)))
        y = F.silu(self.deep(x))
        gate = F.hardsigmoid(self.large(F.relu(self.small(F.adaptive_avg_pool2d(y, 1)))))
        return self.last((x + self.leave(y * gate)).mean((2, 3)))


@architecture(3, 16, 16)
class Shuffle(nn.Module):
    """Channels split, shuffled and joined; GroupNorm and InstanceNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.left, self.right = (
            nn.Conv2d(3, 16, 3, 2, 1),
            nn.Conv2d(8, 8, 1),
            nn.Conv2d(8, 8, 3, 1, 1, groups=8),
        )
        self.group, self.instance, self.last = (
            nn.GroupNorm(4, 16),
            nn.InstanceNorm2d(16, affine=True),
            nn.Conv2d(16, 4, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        a, b = F.relu(self.enter(x)).chunk(2, 1)
        x = torch.cat([self.left(a), F.relu(self.right(b))], 1)
        x = x.reshape(-1, 2, 8, 8, 8).transpose(1, 2).reshape(-1, 16, 8, 8)
        return self.last(self.instance(F.relu(self.group(x))))


@architecture(3, 16, 16)
class UNet(nn.Module):
    """Down, up by a transposed convolution and by interpolation, joined with what was there before."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1)
        self.up, self.after, self.last = (
            nn.ConvTranspose2d(16, 8, 2, 2),
            nn.Conv2d(16, 8, 3, padding=1),
            nn.Conv2d(24, 4, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.first(x))
        b = F.relu(self.second(F.max_pool2d(a, 2)))
        y = F.relu(self.after(torch.cat([a, self.up(b)], 1)))
        wide = F.interpolate(b, scale_factor=2.0, mode="bilinear", align_corners=False)
        return self.last(torch.cat([y, wide], 1))


@architecture(12, 6)
class Recurrent(nn.Module):
    """A convolution over time, a GRU and an LSTM, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.gru = nn.Conv1d(6, 16, 3, padding=1), nn.GRU(16, 8, batch_first=True)
        self.lstm, self.last = nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.enter(x.transpose(1, 2))).transpose(1, 2)
        return self.last(self.lstm(self.gru(x)[0])[0][:, -1])


@architecture(4, 6)
class Products(nn.Module):
    """Einstein sums, with a weight and of two activations."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        mixed = torch.einsum("bic,bjc->bij", y, y).softmax(-1)
        return self.last(torch.einsum("bij,bjc->bic", mixed, y))


@cache
def exported(name: str, opset: int) -> onnx.ModelProto:
    """The network with seeded weights, by the exporter that needs no other package."""
    kind, shape = MODELS[name]
    torch.manual_seed(0)
    model, file = kind().eval(), io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model, (torch.randn(2, *shape),), file, dynamo=False, opset_version=opset, input_names=["x"],
            output_names=["y"], dynamic_axes={"x": {0: "batch"}, "y": {0: "batch"}},
        )  # fmt: skip
    return onnx.load_from_string(file.getvalue())


def samples(name: str, count: int = 48) -> np.ndarray:
    generator = np.random.default_rng(1)
    return generator.normal(size=(count, *MODELS[name][1])).astype(np.float32).cumsum(-1) / 2


FLOOR = {"Recurrent": 25, "Products": 20, "Shuffle": 20}  # dB, where normalizing or a peaky Softmax amplifies noise
INSIDE = {"Recurrent"}  # weights of GRU and LSTM stay float


@pytest.mark.parametrize("opset", [13, 17])
@pytest.mark.parametrize("name", MODELS)
def test_it_is_quantized_verified_and_close(name: str, opset: int) -> None:
    report = pipeline.quantize(
        exported(name, opset), {"x": samples(name)}, method="rtn", weight_bits=8, threads=1
    ).report
    assert report.coverage.float_layers == {}
    assert report.coverage.complete == (name not in INSIDE)
    assert report.fidelity is not None
    assert min(report.fidelity.sqnr_db.values()) > FLOOR.get(name, 28)
    assert bool(report.islands) == (name in INSIDE)


@pytest.mark.parametrize("name", MODELS)
def test_every_product_of_activations_is_quantized(name: str) -> None:
    job = pipeline.begin(exported(name, 17), {"x": samples(name, 8)}, method="rtn", weight_bits=4, threads=1)
    products = [node for node in job.graph.nodes if node.op in ("MatMul", "Einsum", "Conv", "ConvTranspose", "Gemm")]
    names = {tensor.name for node in products for tensor in node.inputs[:2]}
    assert names <= set(job.plan)
    assert len(products) > 1
    if name in ("Attention", "Windows", "Products"):
        pairs = [node for node in products if not any(is_constant(tensor) for tensor in node.inputs)]
        assert len(pairs) == 2


def test_probabilities_lie_between_0_and_1() -> None:
    job = pipeline.begin(exported("Attention", 17), {"x": samples("Attention", 8)}, method="rtn", threads=1)
    (softmax,) = (node for node in job.graph.nodes if node.op == "Softmax")
    point = job.plan[softmax.outputs[0].name]
    assert point.limits == (0.0, 1.0)
    qparams = pipeline.calibrated(job, Phases()).student.qparams_of(point)
    assert float(qparams.zero_point) == 0
    assert float(qparams.scale) <= 1 / 255 + 1e-9


class Stateful(nn.Module):
    """A recurrent step written out: two inputs, two outputs, the state goes in and out."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.state, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.enter(x) + self.state(h))
        return self.last(h), h


class Volume(nn.Module):
    """Five dimensions: convolution, pooling, transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.up, self.last = (
            nn.Conv3d(2, 8, 3, padding=1),
            nn.ConvTranspose3d(8, 4, 2, 2),
            nn.Conv3d(4, 3, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.up(F.max_pool3d(F.relu(self.enter(x)), 2))))


def export_as(
    model: nn.Module, given: tuple[Tensor, ...], names: list[str], axes: dict[str, dict[int, str]]
) -> onnx.ModelProto:
    """The network with these inputs' names and free axes."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model.eval(), given, file, dynamo=False, opset_version=17, input_names=names, dynamic_axes=axes
        )
    return onnx.load_from_string(file.getvalue())


def test_a_state_that_goes_in_and_out() -> None:
    torch.manual_seed(0)
    free = {"x": {0: "batch"}, "h": {0: "batch"}}
    proto = export_as(Stateful(), (torch.randn(2, 6), torch.randn(2, 8)), ["x", "h"], free)
    generator = np.random.default_rng(0)
    data = {
        "x": generator.normal(size=(48, 6)).astype(np.float32),
        "h": np.tanh(generator.normal(size=(48, 8))).astype(np.float32),
    }
    result = pipeline.quantize(proto, data, weight_bits=8, steps=4, threads=1)
    assert result.report.coverage.complete
    assert result.report.fidelity is not None
    assert len(result.report.fidelity.sqnr_db) == 2
    assert min(result.report.fidelity.sqnr_db.values()) > 28
    assert {"x", "h"} <= set(result.plan)


class Stepped(nn.Module):
    """Layers before and behind an LSTM, whose states [layers,batch,features] go in and out."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.last = nn.Linear(6, 8), nn.Linear(8, 5)
        self.lstm = nn.LSTM(8, 8, num_layers=2)

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        h, c = state.split(2)
        y, (h, c) = self.lstm(F.relu(self.enter(x))[None], (h.contiguous(), c.contiguous()))
        return self.last(y[0]), torch.cat([h, c])


@pytest.mark.parametrize("free", [{}, {"x": {0: "batch"}, "state": {1: "batch"}}], ids=["fixed", "free"])
@pytest.mark.parametrize("method", ["rtn", "eptq"])
def test_a_state_whose_first_axis_is_not_the_batch(method: str, free: dict[str, dict[int, str]]) -> None:
    """Each sample holds whole inputs; several never share a run."""
    torch.manual_seed(0)
    proto = export_as(Stepped(), (torch.randn(1, 6), torch.randn(4, 1, 8)), ["x", "state"], free)
    generator = np.random.default_rng(0)
    data = {
        "x": generator.normal(size=(40, 1, 6)).astype(np.float32),
        "state": np.tanh(generator.normal(size=(40, 4, 1, 8))).astype(np.float32),
    }
    result = pipeline.quantize(proto, data, method=method, weight_bits=8, steps=4, threads=1)
    assert result.report.fidelity is not None
    assert min(result.report.fidelity.sqnr_db.values()) > 28
    assert {"x", "state"} <= set(result.plan)


@pytest.mark.parametrize("free", [{0: "batch", 2: "height", 3: "width"}, {}])
def test_free_height_and_width_and_a_fixed_batch_of_one(free: dict[int, str]) -> None:
    torch.manual_seed(0)
    proto = export_as(MODELS["UNet"][0](), (torch.randn(1, 3, 16, 16),), ["x"], {"x": free} if free else {})
    images = [{"x": np.random.default_rng(i).normal(size=(1, 3, 16, 16)).astype(np.float32)} for i in range(16)]
    report = pipeline.quantize(proto, images, weight_bits=8, steps=4, threads=1).report
    assert report.coverage.complete
    assert report.fidelity is not None
    assert min(report.fidelity.sqnr_db.values()) > 28


def test_volumes() -> None:
    torch.manual_seed(0)
    proto = export_as(Volume(), (torch.randn(2, 2, 4, 6, 6),), ["x"], {"x": {0: "batch"}})
    data = {"x": np.random.default_rng(0).normal(size=(32, 2, 4, 6, 6)).astype(np.float32)}
    result = pipeline.quantize(proto, data, weight_bits=8, steps=4, threads=1)
    assert result.report.coverage.complete
    assert result.report.fidelity is not None
    assert min(result.report.fidelity.sqnr_db.values()) > 28
    axes = [point.grid.axis for point in result.plan.values() if point.role == "weight"]
    assert axes == [0, 1, 0]


def test_attention_to_a_single_token_is_not_lost() -> None:
    """ONNX Runtime's integer Softmax of one element is 0, not 1."""
    draw = weights(2)
    proto = parse(
        """(float[N,1,8] x) => (float[N,1,8] y) {
          q = MatMul(x, wq) k = MatMul(x, wk) v = MatMul(x, wv) t = Transpose <perm=[0,2,1]> (k)
          s = MatMul(q, t) p = Softmax <axis=-1> (s) y = MatMul(p, v)
        }""",
        **{name: draw(8, 8, fan=8) for name in ("wq", "wk", "wv")},
    )
    data = {"x": np.random.default_rng(0).normal(size=(32, 1, 8)).astype(np.float32)}
    result = pipeline.quantize(proto, data, method="rtn", weight_bits=8, threads=1)
    assert result.report.fidelity is not None
    assert result.report.fidelity.sqnr_db["y"] > 28
    assert "p" in result.plan.floats


def detector() -> onnx.ModelProto:
    """Two heads, boxes decoded by Exp, the best scores by TopK, overlapping boxes removed."""
    draw = weights(2)
    return parse(
        """(float[1,3,8,8] x) => (float[boxes,4] boxes, float[boxes] scores, int64[boxes] labels) {
          f = Conv <pads=[1,1,1,1]> (x, w0, b0) a = Relu(f)
          c = Conv(a, w1, b1) o = Conv(a, w2, b2)
          ct = Transpose <perm=[0,2,3,1]> (c) cs = Reshape(ct, flat) p = Sigmoid(cs)
          ot = Transpose <perm=[0,2,3,1]> (o) os = Reshape(ot, four)
          lows, sizes = Split <axis=-1, num_outputs=2> (os) grown = Exp(sizes)
          near = Add(lows, anchors) high = Add(near, grown) all = Concat <axis=-1> (near, high)
          top, index = TopK(p, ten) place = Div(index, three) label = Mod(index, three)
          best = Gather(all, place)
          bs = Unsqueeze(best, zero) ts = Reshape(top, ones)
          kept = NonMaxSuppression(bs, ts, ten, half)
          k = Gather <axis=1> (kept, two) k1 = Squeeze(k, axis)
          boxes = Gather(best, k1) scores = Gather(top, k1) labels = Gather(label, k1)
        }""",
        w0=draw(8, 3, 3, 3, fan=27), b0=draw(8, fan=10), w1=draw(3, 8, 1, 1, fan=8), b1=draw(3, fan=10),
        w2=draw(4, 8, 1, 1, fan=20), b2=draw(4, fan=10),
        flat=np.array([-1]), four=np.array([-1, 4]), ten=np.array([10]), three=np.array(3), zero=np.array([0]),
        ones=np.array([1, 1, 10]), half=np.float32([0.5]), two=np.array([2]), axis=np.array([1]),
        anchors=np.indices((8, 8)).reshape(2, 64).T.astype(np.float32),
    )  # fmt: skip


def test_a_detector_keeps_its_decoding_in_float_and_is_judged_before_it() -> None:
    generator = np.random.default_rng(1)
    images = [{"x": generator.normal(size=(1, 3, 8, 8)).astype(np.float32)} for _ in range(32)]
    result = pipeline.quantize(detector(), images, weight_bits=8, steps=4, threads=1)
    report = result.report
    assert report.coverage.complete
    assert {"grown", "near", "high", "all", "best"} <= set(result.plan.floats)
    assert report.fidelity is not None
    assert set(report.fidelity.selected) == {"boxes", "scores", "labels"}
    assert set(report.fidelity.sqnr_db) == {"p", "all"}
    assert min(report.fidelity.sqnr_db.values()) > 28
    assert "boxes: selected, so judged before it is" in str(report)
    assert report.learning is not None
    assert set(report.learning.targets) <= {"cs", "sizes", "near"}
