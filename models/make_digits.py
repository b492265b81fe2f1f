"""Train and export the demo: a small residual CNN with depthwise layers on scikit-learn's handwritten digits.

Writes, beside this file: `digits.onnx`, `digits_calib/NNNN.png` (256 training images) and `digits_eval.npz` (500
held-out images `x`, already scaled to 0..1, and their labels `y`). About a minute on one core.
"""

import logging
import shutil
import warnings
from pathlib import Path

import numpy as np
import onnx
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

HERE = Path(__file__).parent
SIDE, EVAL, CALIB, EPOCHS, OPSET = 16, 500, 256, 60, 17


def pixels() -> tuple[np.ndarray, np.ndarray]:
    """Return the 1,797 digits in a fixed random order: uint8 `[n, 16, 16]` (8x8 in the source, enlarged) and labels."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    small = (digits.images[order] * (255 / 16)).round().astype(np.uint8)
    large = [Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BICUBIC) for image in small]
    return np.stack([np.asarray(image) for image in large]), digits.target[order].astype(np.int64)


def scaled(images: np.ndarray) -> np.ndarray:
    """Return what onnx-eptq feeds without any option: float32 `[n, 1, 16, 16]`, 0..1."""
    return images.astype(np.float32)[:, None] * np.float32(1 / 255)


def conv(
    inputs: int, outputs: int, kernel: int, activation: nn.Module, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        activation,
    )


class Inverted(nn.Module):
    """Expand, filter each channel alone, project; added to the input where the shapes agree (MobileNetV2's block)."""

    def __init__(self, inputs: int, hidden: int, outputs: int, stride: int):
        super().__init__()
        self.body = nn.Sequential(
            conv(inputs, hidden, 1, nn.ReLU6()),
            conv(hidden, hidden, 3, nn.ReLU6(), stride, groups=hidden),
            conv(hidden, outputs, 1, nn.Identity()),
        )
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.residual else self.body(x)


class Digits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(1, 24, 3, nn.ReLU())
        self.blocks = nn.Sequential(Inverted(24, 72, 24, 1), Inverted(24, 96, 40, 2), Inverted(40, 160, 40, 1))
        self.near = conv(40, 40, 1, nn.ReLU())
        self.wide = conv(40, 40, 3, nn.ReLU(), groups=40)
        self.head = conv(80, 128, 1, nn.ReLU6(), stride=2)
        self.classify = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x))
        x = self.head(torch.cat([self.near(x), self.wide(x)], dim=1))
        return self.classify(torch.flatten(functional.adaptive_avg_pool2d(x, 1), 1))


def shifted(x: Tensor) -> Tensor:
    """Move the batch by up to one pixel, so that 1,297 images train more than their own places."""
    dy, dx = torch.randint(-1, 2, (2,)).tolist()
    return torch.roll(x, (dy, dx), (2, 3))


def train(x: Tensor, y: Tensor) -> Digits:
    model = Digits()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=1e-4)
    steps = EPOCHS * (len(x) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 8e-3, total_steps=steps)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(x))[: len(x) // 64 * 64].split(64):
            loss = functional.cross_entropy(model(shifted(x[rows])), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def export(model: Digits, path: Path) -> None:
    """Write the file as PyTorch's exporter leaves it: BatchNormalization kept, dynamic batch."""
    with warnings.catch_warnings():
        # The TorchScript exporter is deprecated, but needs no package beyond torch and onnx.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            (torch.zeros(1, 1, SIDE, SIDE),),
            str(path),
            dynamo=False,
            opset_version=OPSET,
            training=torch.onnx.TrainingMode.PRESERVE,
            input_names=["image"],
            output_names=["logits"],
            dynamic_axes={"image": {0: "batch"}, "logits": {0: "batch"}},
        )
    onnx.checker.check_model(onnx.load(path), full_check=True)


def write_images(images: np.ndarray, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{number:04d}.png", optimize=True)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    images, labels = pixels()
    x, y = scaled(images), labels
    model = train(torch.from_numpy(x[EVAL:]), torch.from_numpy(y[EVAL:]))
    with torch.no_grad():
        accuracy = (model(torch.from_numpy(x[:EVAL])).argmax(1).numpy() == y[:EVAL]).mean()
    export(model, HERE / "digits.onnx")
    write_images(images[EVAL : EVAL + CALIB], HERE / "digits_calib")
    np.savez_compressed(HERE / "digits_eval.npz", x=x[:EVAL], y=y[:EVAL])
    logging.info("held-out accuracy %.4f on %d images", accuracy, EVAL)


if __name__ == "__main__":
    main()
