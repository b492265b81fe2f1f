"""Train small MobileViT, MLP-Mixer, RegNetX and MNASNet on CIFAR-10 and export them to ONNX, for a small copy of the table of
architectures.

train_cifar.py --data FOLDER [--out FOLDER] [--model NAME ...] [--epochs N] [--calibration N] [--quantize 4,3,2]

Nothing is downloaded: `--data` is the folder `cifar-10-batches-py` or `cifar-10-batches-bin` as it is unpacked from the archive,
a folder that holds one of them, or an .npz with `x_train`, `y_train`, `x_test`, `y_test` (pixels uint8, NHWC or NCHW).

Written to `--out`: NAME.onnx, checked against PyTorch; `calibration.npy`, training images as the networks are fed; and
NAME_wBITS.onnx for each of `--quantize`. Top-1 is that of the written files on the test images, in ONNX Runtime.
"""

import argparse
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from census import session
from cifar_data import Data, Part, read
from cifar_models import MODELS, SIDE, Model
from common import markdown, predict
from torch import Tensor, nn
from torch.nn import functional as F

import onnx_eptq
from onnx_eptq.errors import EptqError

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # of the training images, pixels in 0..1
PAD, SMOOTHING, WARM_UP = 4, 0.1, 0.05
BITS = range(2, 9)
OPSET = 17
TOLERANCE = 1e-3  # of the largest logit, between the file in ONNX Runtime and PyTorch


class FailedError(Exception):
    """A network that has no line in the table; the others still get theirs."""


def normalised(images: Tensor) -> Tensor:
    """What the networks are fed: float32, per channel (pixel / 255 - mean) / std."""
    mean, std = (torch.tensor(values, device=images.device)[:, None, None] for values in (MEAN, STD))
    return (images.float() / 255 - mean) / std


def fed(images: np.ndarray) -> np.ndarray:
    return normalised(torch.from_numpy(images)).numpy()


# --------------------------------------------------------------------------------------------------------------- training


def cropped(images: Tensor, top: Tensor, left: Tensor, mirrored: Tensor) -> Tensor:
    """Per image, the part of its zero-padded form that begins at (top, left), from right to left where mirrored."""
    padded = F.pad(images, (PAD,) * 4)
    places = torch.arange(SIDE, device=images.device)
    rows = top[:, None] + places
    columns = left[:, None] + torch.where(mirrored[:, None], places.flip(0), places)
    samples = torch.arange(len(images), device=images.device)[:, None, None]
    return padded[samples, :, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """A random part of each image, mirrored or not."""
    top, left = torch.randint(2 * PAD + 1, (2, len(images)), generator=generator)
    mirrored = torch.rand(len(images), generator=generator) < 0.5
    return cropped(images, *(draw.to(images.device) for draw in (top, left, mirrored)))


def batches(count: int, size: int, steps: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Rows of that many batches, in a new order each time all were seen; BatchNormalization wants no small remainder."""
    left = steps
    while left:
        for rows in torch.randperm(count, generator=generator)[: count // size * size].split(size)[:left]:
            left -= 1
            yield rows


def factor(step: int, steps: int) -> float:
    """Share of the learning rate: up in a line over the first steps, then down along a cosine to nearly 0."""
    warm = max(1, round(WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm + 1) / (steps - warm + 1)))


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "sgd": lambda groups, lr: torch.optim.SGD(groups, lr, momentum=0.9, nesterov=True),
}


def optimizer(network: nn.Module, model: Model, rate: float | None) -> torch.optim.Optimizer:
    """Biases and the scales of normalizations are not decayed."""
    tensors = list(network.parameters())
    groups = [
        {"params": [tensor for tensor in tensors if tensor.ndim > 1], "weight_decay": model.decay},
        {"params": [tensor for tensor in tensors if tensor.ndim < 2], "weight_decay": 0.0},
    ]
    return OPTIMIZERS[model.optimizer](groups, lr=model.rate if rate is None else rate)


def steps_of(count: int, options: argparse.Namespace) -> int:
    steps = options.epochs * (count // options.batch_size)
    return min(steps, options.steps or steps)


def train(name: str, data: Part, options: argparse.Namespace) -> nn.Module:
    """The trained network, on the CPU. Loss: cross-entropy with smoothed labels."""
    torch.manual_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    network = MODELS[name].build().to(options.device).train()
    images, labels = (torch.from_numpy(array).to(options.device) for array in data)
    steps = steps_of(len(images), options)
    optimiser = optimizer(network, MODELS[name], options.lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: factor(step, steps))
    every, started = max(1, len(images) // options.batch_size), time.perf_counter()
    total = torch.zeros((), device=options.device)
    for step, rows in enumerate(batches(len(images), options.batch_size, steps, generator), 1):
        rows = rows.to(options.device)
        logits = network(augmented(normalised(images[rows]), generator))
        loss = F.cross_entropy(logits, labels[rows], label_smoothing=SMOOTHING)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        total += loss.detach()
        if step % every == 0 or step == steps:
            mean = total.item() / (step % every or every)
            if not math.isfinite(mean):
                raise FailedError(f"training diverged before step {step}; give a lower --lr")
            print(
                f"{name}: step {step} of {steps}, loss {mean:.3f}, {time.perf_counter() - started:.0f} s",
                file=sys.stderr,
            )
            total.zero_()
    return network.cpu().eval()


# ----------------------------------------------------------------------------------------------------------------- export


def export(network: nn.Module, path: Path) -> None:
    with warnings.catch_warnings():
        # The TorchScript exporter is deprecated, but needs no package beyond torch and onnx.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network,
            (torch.zeros(2, 3, SIDE, SIDE),),
            str(path),
            dynamo=False,
            opset_version=OPSET,
            input_names=["image"],
            output_names=["logits"],
            dynamic_axes={"image": {0: "batch"}, "logits": {0: "batch"}},
        )
    onnx.checker.check_model(onnx.load(path), full_check=True)


def check(network: nn.Module, path: Path, x: np.ndarray) -> None:
    """Raise FailedError and delete the file where ONNX Runtime computes other logits than PyTorch, batched or not."""
    ran = session(path)
    with torch.no_grad():
        wanted = network(torch.from_numpy(x)).numpy()
    for count in (len(x), 1):
        (found,) = ran.run(["logits"], {"image": x[:count]})
        error = float(np.abs(found - wanted[:count]).max() / np.abs(wanted).max())
        if not error <= TOLERANCE:
            path.unlink()
            raise FailedError(
                f"{path} is not what was trained: logits of {count} images are {error:.1e} of the largest apart in ONNX Runtime"
            )


def top1(path: Path, x: np.ndarray, labels: np.ndarray, threads: int) -> float:
    """Percent, of the file in ONNX Runtime."""
    return round(100 * float((predict(path, x, threads) == labels).mean()), 2)


def write_calibration(data: Part, options: argparse.Namespace) -> Path:
    """Random training images as the networks are fed, float32 [n, 3, 32, 32]."""
    rows = np.random.default_rng(options.seed).choice(len(data.images), options.calibration, replace=False)
    path = options.out / "calibration.npy"
    np.save(path, fed(data.images[np.sort(rows)]))
    return path


def quantized(path: Path, calibration: Path, bits: int, options: argparse.Namespace) -> Path | None:
    """The file with weights of so many bits; None, with the reason on the error output, where there is none."""
    out = path.with_name(f"{path.stem}_w{bits}.onnx")
    names = ("method", "effort", "seed", "threads", "device")
    settings = {name: getattr(options, name) for name in names}
    try:
        onnx_eptq.quantize(path, calibration, out, weight_bits=bits, **settings)
    except EptqError as error:
        print(f"{out} was not written: {error}", file=sys.stderr, flush=True)
        return None
    return out


def row(name: str, data: Data, x: np.ndarray, calibration: Path | None, options: argparse.Namespace) -> list[Any]:
    """One line of the table, None where something failed; `x` are the test images as they are fed."""
    path = options.out / f"{name}.onnx"
    try:
        network = train(name, data.train, options)
        export(network, path)
        check(network, path, x[:64])
    except FailedError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return [name, *[None] * (2 + len(options.quantize))]
    files = [path, *(quantized(path, calibration, bits, options) for bits in options.quantize if calibration)]
    found = [None if file is None else top1(file, x, data.test.labels, options.threads) for file in files]
    return [name, f"{sum(tensor.numel() for tensor in network.parameters()):,}", *found]


# ---------------------------------------------------------------------------------------------------------------- options


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return value


def rate(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a learning rate above 0")
    return value


def widths(text: str) -> tuple[int, ...]:
    found = tuple(int(item) for item in text.split(","))
    if wrong := [bits for bits in found if bits not in BITS]:
        raise argparse.ArgumentTypeError(f"weights of {wrong[0]} bits; wanted {BITS[0]} to {BITS[-1]}, such as 4,3,2")
    return tuple(dict.fromkeys(found))


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="CIFAR-10: a folder or an .npz file")
    parser.add_argument("--out", type=Path, default=Path("cifar"), help="default: %(default)s")
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS), help="default: all")
    parser.add_argument("--epochs", type=positive, default=60, help="default: %(default)s")
    parser.add_argument("--steps", type=positive, help="at most so many, however many epochs")
    parser.add_argument("--batch-size", type=positive, default=128, help="default: %(default)s")
    parser.add_argument("--lr", type=rate, help="learning rate; default: the model's own")
    parser.add_argument("--calibration", type=int, default=1024, help="training images to write; default: %(default)s")
    parser.add_argument("--quantize", type=widths, default=(), metavar="BITS", help="weight widths, such as 4,3,2")
    parser.add_argument("--method", default="eptq", help="of --quantize, as in onnx-eptq; default: %(default)s")
    parser.add_argument("--effort", default="default", help="of --quantize, as in onnx-eptq; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="decides weights, order and calibration images")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; default: one per core")
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    options = parser.parse_args(given)
    try:
        onnx_eptq.Config.make(**{name: getattr(options, name) for name in ("method", "effort", "seed", "threads")})
        torch.zeros(1, device=options.device)
    except EptqError as error:
        parser.error(str(error))
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {options.device} cannot be used: {str(error).splitlines()[0]}")
    if options.quantize and options.calibration < 1:
        parser.error("--quantize needs images to calibrate with; give --calibration 1 or more")
    return options


def agree(data: Data, options: argparse.Namespace) -> None:
    """End the program where the options ask for more images than there are."""
    count = len(data.train.images)
    for name, wanted, least in (("--batch-size", options.batch_size, 1), ("--calibration", options.calibration, 0)):
        if not least <= wanted <= count:
            sys.exit(f"{name} {wanted}: wanted {least} to {count:,}, the number of training images in {options.data}")


def main(given: list[str] | None = None) -> int:
    options = arguments(given)
    data = read(options.data)
    agree(data, options)
    if options.threads:
        torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    calibration = write_calibration(data.train, options) if options.calibration else None
    x = fed(data.test.images)
    rows = [row(name, data, x, calibration, options) for name in options.model]
    print(
        markdown(["model", "parameters", "float top-1 %", *(f"W{bits}A8 top-1 %" for bits in options.quantize)], rows)
    )
    return int(any(None in cells for cells in rows))


if __name__ == "__main__":
    sys.exit(main())
