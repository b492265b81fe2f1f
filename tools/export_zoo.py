"""Export a zoo of architectures to ONNX, with both of PyTorch's exporters, for `score_zoo.py` to quantize.

export_zoo.py [--out FOLDER] [--only NAME ...] [--small] [--exporter torchscript|dynamo] [--opset N] [--list]

Weights are random but seeded, and scaled so that every layer passes its signal on; the statistics of BatchNormalization come
from a pass over the data that the models are later calibrated with. Nothing is downloaded.

Needs, beside the package itself:

    pip install --no-deps torchvision timm huggingface_hub
    pip install onnxscript safetensors          # onnxscript for the dynamo exporter

torchvision's wheel may be one for CUDA beside a PyTorch for the CPU: its compiled operators are declared here where they are
missing. The folder (default: the user's cache) holds one file per model, exporter and opset and, beside it, a description.
"""

import argparse
import contextlib
import importlib
import io
import json
import logging
import math
import os
import sys
import time
import unittest.mock
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

CACHE = Path(os.environ.get("ONNX_EPTQ_ZOO") or Path.home() / ".cache" / "onnx-eptq" / "zoo")
FORMS = (("torchscript", 13), ("torchscript", 17), ("dynamo", 18), ("dynamo", 20))
CLASSES = 20  # of detectors and segmenters
SEED = 1

# ------------------------------------------------------------------------------------------------------------------- data


def images(shape: Sequence[int], generator: np.random.Generator) -> np.ndarray:
    """Smooth pictures with edges: a few waves per channel, some rectangles, mean about 0 and deviation about 1."""
    count, channels, height, width = shape
    rows, columns = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    found = np.zeros(tuple(shape))
    for picture in found:
        for _ in range(5):
            frequency, phase = generator.normal(0, 4, 2), generator.uniform(0, 2 * np.pi)
            wave = np.sin(2 * np.pi * (frequency[0] * rows + frequency[1] * columns) / 2 + phase)
            picture += generator.normal(0, 1, (channels, 1, 1)) * wave / (1 + np.hypot(*frequency))
        for _ in range(4):
            top, left = generator.integers(0, height * 3 // 4), generator.integers(0, width * 3 // 4)
            picture[:, top : top + height // 4, left : left + width // 4] += generator.normal(0, 0.7, (channels, 1, 1))
    found -= generator.normal(0, 0.1, (count, 1, 1, 1))
    return (found / 0.72).astype(np.float32)


def series(shape: Sequence[int], generator: np.random.Generator) -> np.ndarray:
    """Random walks that forget: features of a sound, [samples, steps, features]."""
    noise, state = generator.normal(0, 1, tuple(shape)), np.zeros((shape[0], shape[2]))
    for step in range(shape[1]):
        state = noise[:, step] = 0.8 * state + 0.6 * noise[:, step]
    return noise.astype(np.float32)


def tokens(shape: Sequence[int], generator: np.random.Generator) -> np.ndarray:
    """Words as frequent as words are: the second half as often as the first, and so on."""
    return np.minimum(generator.zipf(1.3, tuple(shape)), VOCABULARY - 1).astype(np.int64)


def masks(shape: Sequence[int], generator: np.random.Generator) -> np.ndarray:
    """1 for the words of a sentence, then 0."""
    ends = generator.integers(shape[1] // 2, shape[1] + 1, (shape[0], 1))
    return (np.arange(shape[1]) < ends).astype(np.int64)


def segments(shape: Sequence[int], generator: np.random.Generator) -> np.ndarray:
    """0 for the first sentence, 1 for the second."""
    return 1 - masks(shape, generator)


KINDS: dict[str, Callable[[Sequence[int], np.random.Generator], np.ndarray]] = {
    function.__name__: function for function in (images, series, tokens, masks, segments)
}
VOCABULARY = 2000


@dataclass(frozen=True)
class Input:
    """A network input: its name, the kind of data (a key of `KINDS`) and the shape of one sample."""

    name: str
    kind: str
    shape: tuple[int, ...]


def samples(inputs: Sequence[Input], count: int, seed: int) -> dict[str, np.ndarray]:
    """Seeded samples by input name."""
    generator = np.random.default_rng([seed, count])
    return {item.name: KINDS[item.kind]((count, *item.shape), generator) for item in inputs}


# ----------------------------------------------------------------------------------------------------------------- models


_DECLARED: list[Any] = []


def torchvision() -> Any:
    """torchvision's models, also where its compiled operators do not fit the PyTorch at hand."""
    import torch

    if "torchvision" not in sys.modules and not torch.cuda.is_available():
        library = torch.library.Library("torchvision", "FRAGMENT")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.impl("nms", _greedy_nms, "CPU")
        for operator in ("deform_conv2d", "roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool"):
            library.define(f"{operator}(Tensor x) -> Tensor")  # no model here runs them: the names are enough
            library.define(f"_{operator}_backward(Tensor x) -> Tensor")
        library.define("qnms(Tensor x) -> Tensor")
        library.define("qroi_align(Tensor x) -> Tensor")
        _DECLARED.append(library)  # what it declares lives as long as it does
    with _hushed():
        return importlib.import_module("torchvision")


def _greedy_nms(boxes: Any, scores: Any, threshold: float) -> Any:
    """Indices of the boxes that no better one overlaps by more than the threshold, best first."""
    import torch

    kept, order = [], scores.argsort(descending=True)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    while len(order):
        best, order = order[0], order[1:]
        kept.append(best)
        low, high = torch.maximum(boxes[best, :2], boxes[order, :2]), torch.minimum(boxes[best, 2:], boxes[order, 2:])
        shared = (high - low).clamp(min=0).prod(1)
        order = order[shared <= threshold * (area[best] + area[order] - shared)]
    return torch.stack(kept) if kept else order


def _timm(name: str, **settings: Any) -> Callable[[], Any]:
    def build() -> Any:
        torchvision()
        with _hushed():
            import timm
        return timm.create_model(name, **settings)

    return build


def _vision(name: str, **settings: Any) -> Callable[[], Any]:
    return lambda: getattr(torchvision().models, name)(weights=None, **settings)


def _own(name: str, **settings: Any) -> Callable[[], Any]:
    def build() -> Any:
        import zoo_models

        return getattr(zoo_models, name)(**settings)

    return build


@dataclass(frozen=True)
class Model:
    """One architecture: what builds it, what it is fed with, which family's goals hold, whether it is quick.

    `family` is `cnn` or `other`. `outputs` are names. `batch` is None where the number of samples is free.
    """

    build: Callable[[], Any]
    inputs: tuple[Input, ...]
    family: str
    small: bool = False
    outputs: tuple[str, ...] = ("logits",)
    batch: int | None = None


def _pictures(size: int) -> tuple[Input, ...]:
    return (Input("image", "images", (3, size, size)),)


_TEXT = (Input("ids", "tokens", (32,)), Input("types", "segments", (32,)), Input("mask", "masks", (32,)))
_HEADS = ("small", "medium", "large")
_BOXES = ("boxes", "scores", "classes")

MODELS: dict[str, Model] = {
    "resnet18": Model(_vision("resnet18"), _pictures(64), "cnn", True),
    "resnet50": Model(_vision("resnet50"), _pictures(96), "cnn"),
    "mobilenet_v2": Model(_vision("mobilenet_v2"), _pictures(64), "cnn", True),
    "regnetx_600mf": Model(_timm("regnetx_006"), _pictures(64), "cnn", True),
    "mnasnet": Model(_vision("mnasnet1_0"), _pictures(96), "cnn"),
    "mobilenet_v3": Model(_vision("mobilenet_v3_large"), _pictures(64), "cnn", True),
    "shufflenet_v2": Model(_vision("shufflenet_v2_x0_5"), _pictures(64), "cnn", True),
    "efficientnet_b0": Model(_timm("efficientnet_b0"), _pictures(96), "cnn"),
    "deeplab_v3": Model(_own("DeepLabV3"), _pictures(96), "cnn", outputs=("classes",)),
    "deeplab_v3plus": Model(_own("DeepLabV3Plus"), _pictures(96), "cnn", outputs=("classes",)),
    "unet": Model(_own("UNet"), _pictures(64), "cnn", True, ("classes",)),
    "retinanet": Model(_own("RetinaHeads"), _pictures(128), "cnn", outputs=("scores", "offsets")),
    "retinanet_decode": Model(_own("RetinaBoxes", size=128), _pictures(128), "cnn", False, _BOXES, 1),
    "yolo": Model(_own("Yolo"), _pictures(64), "cnn", True, _HEADS),
    "yolo_decode": Model(_own("YoloBoxes"), _pictures(64), "cnn", True, _BOXES, 1),
    "deit_tiny": Model(_timm("deit_tiny_patch16_224", img_size=96), _pictures(96), "other"),
    "vit": Model(_own("vision_transformer"), _pictures(64), "other", True),
    "swin_tiny": Model(_timm("swin_tiny_patch4_window7_224", img_size=128, window_size=4), _pictures(128), "other"),
    "mobilevit_xxs": Model(_timm("mobilevit_xxs"), _pictures(64), "other", True),
    "mixer_b16": Model(_timm("mixer_b16_224", img_size=112), _pictures(112), "other"),
    "convnext_atto": Model(_timm("convnext_atto"), _pictures(64), "other", True),
    "bert": Model(_own("Bert", vocabulary=VOCABULARY), _TEXT, "other", True, ("features", "logits")),
    "speech_gru": Model(_own("Speech"), (Input("features", "series", (40, 16)),), "other", True),
}


def fill(model: Any, seed: int) -> None:
    """Give a network random weights that keep the size of its signals, with channels of different sizes as after training.

    Matrices and kernels: normal, variance 1 / inputs (2 / inputs in a network of convolutions), channels scaled by a
    log-normal factor. Scales of normalizations about 1, biases about 0, tokens and tables normal. BatchNormalization is
    biased to the positive side: rectifiers that cut half of everything make a deep random network chaotic, so that any noise
    drowns its outputs, which no trained network does.
    """
    import torch
    from torch import nn

    generator = torch.Generator().manual_seed(seed)

    def normal(like: Any, deviation: float) -> Any:
        return torch.randn(like.shape, generator=generator) * deviation

    def uniform(like: Any, low: float, high: float) -> Any:
        return low + (high - low) * torch.rand(like.shape, generator=generator)

    rectified = any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    with torch.no_grad():
        for module in model.modules():
            norm = "norm" in type(module).__name__.lower()
            linear = isinstance(module, nn.Linear | nn.modules.conv._ConvNd)
            for name, parameter in module.named_parameters(recurse=False):
                if linear and name == "weight":
                    across = isinstance(module, nn.ConvTranspose2d)
                    inputs = parameter.numel() // len(parameter) if not across else len(parameter)
                    gain = 2 if rectified and not isinstance(module, nn.Linear) else 1
                    spread = torch.exp(0.3 * torch.randn(parameter.shape[across], generator=generator))
                    shape = [1] * parameter.ndim
                    shape[int(across)] = -1
                    parameter.copy_(normal(parameter, math.sqrt(gain / inputs)) * spread.reshape(shape))
                elif norm and name == "weight":
                    parameter.copy_(uniform(parameter, 0.6, 1.4))
                elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                    parameter.copy_(uniform(parameter, 0.3, 1.5))
                elif name.endswith("bias") or ("bias_" in name and parameter.ndim == 1):
                    parameter.copy_(normal(parameter, 0.1))
                elif name in ("gamma", "layer_scale"):
                    parameter.copy_(uniform(parameter, 0.2, 0.6))
                elif "proj_weight" in name or "weight_" in name:  # attention in one piece, recurrent layers
                    parameter.copy_(normal(parameter, 1 / math.sqrt(parameter.shape[1])))
                else:
                    parameter.copy_(normal(parameter, 0.5))


def settle(model: Any, data: dict[str, np.ndarray], inputs: Sequence[Input]) -> None:
    """Set the statistics of every BatchNormalization to those of the data, layer behind layer."""
    import torch
    from torch import nn

    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)]
    model.eval()
    for norm in norms:
        norm.train()
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches
    with torch.no_grad():
        model(*[torch.from_numpy(data[item.name]) for item in inputs])
    model.eval()


def temper(model: Any, data: dict[str, np.ndarray], inputs: Sequence[Input]) -> None:
    """Scale the layers that the model lists in `tempered`: all but a thousandth of their outputs are as small as it wants."""
    import torch

    for layer, wanted in model.tempered:
        seen: list[Any] = []
        handle = layer.register_forward_hook(lambda module, given, found, seen=seen: seen.append(found.flatten()))
        with torch.no_grad():
            model(*[torch.from_numpy(data[item.name]) for item in inputs])
            sizes = torch.cat(seen).abs()
            factor = wanted / sizes.kthvalue(len(sizes) * 999 // 1000).values
            for parameter in layer.parameters():
                parameter.mul_(factor)
        handle.remove()


def make(name: str, seed: int = SEED) -> Any:
    """The network with its weights, ready to be exported."""
    import torch

    torch.manual_seed(seed)
    torch.backends.mha.set_fastpath_enabled(False)  # whose operator has no ONNX form
    entry = MODELS[name]
    model = entry.build()
    fill(model, seed)
    body = getattr(model, "body", model)  # what decodes boxes takes one picture at a time
    data = samples(entry.inputs, 32, seed)
    settle(body, data, entry.inputs)
    if hasattr(body, "tempered"):
        temper(body, data, entry.inputs)
    return model.eval()


# ----------------------------------------------------------------------------------------------------------------- export


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """Without the warnings of exporters and libraries, which are not ours to act on."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _attention(query: Any, key: Any, value: Any, *rest: Any, **unused: Any) -> Any:
    """Attention in products and a Softmax: exporters know no other form before opset 14."""
    return (query * query.shape[-1] ** -0.5 @ key.transpose(-2, -1)).softmax(-1) @ value


def export(name: str, model: Any, exporter: str, opset: int, path: Path) -> None:
    """Write one file."""
    import torch

    entry = MODELS[name]
    data = samples(entry.inputs, entry.batch or 2, SEED)
    arguments = tuple(torch.from_numpy(data[item.name]) for item in entry.inputs)
    names = [item.name for item in entry.inputs]
    settings: dict[str, Any] = {"input_names": names, "output_names": list(entry.outputs), "opset_version": opset}
    if exporter == "dynamo":
        if entry.batch is None:
            batch = torch.export.Dim("batch", min=1, max=4096)
            settings["dynamic_shapes"] = tuple({0: batch} for _ in names)
        settings |= {"dynamo": True, "external_data": False, "optimize": True, "verbose": False}
    else:
        if entry.batch is None:
            settings["dynamic_axes"] = {value: {0: "batch"} for value in (*names, *entry.outputs)}
        settings["dynamo"] = False
    attention = torch.nn.functional.scaled_dot_product_attention if opset >= 14 else _attention
    spelled = unittest.mock.patch("torch.nn.functional.scaled_dot_product_attention", attention)
    with _hushed(), spelled, torch.no_grad():
        torch.onnx.export(model, arguments, str(path), **settings)


def file_name(name: str, exporter: str, opset: int) -> str:
    return f"{name}.{exporter}{opset}.onnx"


def describe(name: str, exporter: str, opset: int) -> dict[str, Any]:
    """What the description beside a file says."""
    entry = MODELS[name]
    facts = {"model": name, "exporter": exporter, "opset": opset, "family": entry.family, "small": entry.small}
    return facts | {"inputs": [asdict(item) for item in entry.inputs], "batch": entry.batch}


def choose_forms(parser: argparse.ArgumentParser) -> None:
    """Options that say which models in which forms: see `chosen` and `forms`."""
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=MODELS, help="these models")
    parser.add_argument("--small", action="store_true", help="the quick half of the models")
    parser.add_argument("--exporter", choices=sorted({form[0] for form in FORMS}))
    parser.add_argument("--opset", type=int, help="of the exporters' usual ones, or another for --exporter")


def chosen(options: argparse.Namespace) -> list[str]:
    """Names of the models asked for."""
    return [n for n in options.only or MODELS if MODELS[n].small or not options.small]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=CACHE, help="default: ONNX_EPTQ_ZOO, or the user's cache")
    choose_forms(parser)
    parser.add_argument("--force", action="store_true", help="also what is there already")
    parser.add_argument("--list", action="store_true", help="list the models and do nothing")
    return parser.parse_args()


def forms(options: argparse.Namespace) -> list[tuple[str, int]]:
    """Exporters and opsets asked for."""
    if options.exporter and options.opset:
        return [(options.exporter, options.opset)]
    return [f for f in FORMS if options.exporter in (None, f[0]) and options.opset in (None, f[1])]


def main() -> int:
    options = arguments()
    names = chosen(options)
    if options.list:
        print("\n".join(f"{n:<18}{MODELS[n].family:<7}{'small' if MODELS[n].small else ''}" for n in names))
        return 0
    sys.path.insert(0, str(Path(__file__).parent))
    options.out.mkdir(parents=True, exist_ok=True)
    failed = 0
    for name in names:
        missing = [f for f in forms(options) if options.force or not (options.out / file_name(name, *f)).exists()]
        model = make(name) if missing else None
        for form in missing:
            started, path = time.perf_counter(), options.out / file_name(name, *form)
            try:
                export(name, model, *form, path.with_suffix(".part"))
            except Exception as error:
                failed += 1
                print(f"{path.name}: failed: {type(error).__name__}: {str(error).strip().splitlines()[0][:300]}")
                continue
            path.with_suffix(".part").replace(path)
            path.with_suffix(".json").write_text(json.dumps(describe(name, *form)) + "\n")
            seconds = time.perf_counter() - started
            print(f"{path.name}: {path.stat().st_size:,} bytes, {seconds:.0f} s", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
