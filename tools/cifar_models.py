"""Small networks of the method's table of architectures for images of 32 x 32, in plain PyTorch; `train_cifar.py` trains them.

Each keeps the blocks of its paper and is narrower, shallower and less strided. Reshapes leave the batch open as -1 and spell
the rest, so that the exported graph holds no arithmetic on shapes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

SIDE, CLASSES = 32, 10


def unit(inputs: int, outputs: int, kernel: int = 1, activation: Any = nn.ReLU, **settings: Any) -> nn.Sequential:
    """Convolution, BatchNormalization, activation."""
    settings = {"padding": kernel // 2 * settings.get("dilation", 1), "bias": False, **settings}
    return nn.Sequential(nn.Conv2d(inputs, outputs, kernel, **settings), nn.BatchNorm2d(outputs), activation())


class Inverted(nn.Module):
    """Expand, filter each channel alone, project; added to the input where the shapes agree (arXiv 1801.04381)."""

    def __init__(
        self, inputs: int, outputs: int, stride: int, expansion: int, kernel: int = 3, activation: Any = nn.ReLU
    ):
        super().__init__()
        hidden = inputs * expansion
        self.body = nn.Sequential(
            unit(inputs, hidden, 1, activation),
            unit(hidden, hidden, kernel, activation, stride=stride, groups=hidden),
            unit(hidden, outputs, 1, nn.Identity),
        )
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.residual else self.body(x)


class Head(nn.Sequential):
    """The mean over the places, then a linear classifier."""

    def __init__(self, channels: int):
        super().__init__(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES))


class MnasNet(nn.Sequential):
    """Inverted residuals with kernels of 3 and 5 (arXiv 1807.11626, the variant without squeeze and excitation)."""

    # kernel, expansion, channels, blocks, stride of the first block
    STAGES = (
        (3, 3, 24, 2, 1),
        (5, 3, 40, 2, 2),
        (5, 6, 64, 2, 2),
        (3, 6, 80, 1, 1),
        (5, 6, 128, 2, 2),
        (3, 6, 160, 1, 1),
    )

    def __init__(self) -> None:
        blocks: list[nn.Module] = [unit(3, 32, 3), unit(32, 32, 3, groups=32), unit(32, 16, 1, nn.Identity)]
        inputs = 16
        for kernel, expansion, channels, count, stride in self.STAGES:
            for number in range(count):
                blocks.append(Inverted(inputs, channels, 1 if number else stride, expansion, kernel))
                inputs = channels
        super().__init__(*blocks, unit(inputs, 512), Head(512))


class Grouped(nn.Module):
    """RegNet's X block: a residual bottleneck of ratio 1 around a 3 x 3 convolution in groups."""

    def __init__(self, inputs: int, outputs: int, stride: int, group_width: int):
        super().__init__()
        self.body = nn.Sequential(
            unit(inputs, outputs),
            unit(outputs, outputs, 3, stride=stride, groups=outputs // group_width),
            unit(outputs, outputs, 1, nn.Identity),
        )
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else unit(inputs, outputs, 1, nn.Identity, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.shortcut(x) + self.body(x))


class RegNetX(nn.Sequential):
    """Four stages that double the width (arXiv 2003.13678); the stem and the first stage keep the image's size."""

    def __init__(
        self, widths: Sequence[int] = (32, 64, 128, 256), depths: Sequence[int] = (1, 1, 4, 2), group_width: int = 16
    ):
        blocks: list[nn.Module] = [unit(3, widths[0], 3)]
        inputs = widths[0]
        for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            for number in range(depth):
                blocks.append(Grouped(inputs, width, 2 if stage and not number else 1, group_width))
                inputs = width
        super().__init__(*blocks, Head(inputs))


def perceptron(width: int, hidden: int, activation: Any) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden), activation(), nn.Linear(hidden, width))


class Mixing(nn.Module):
    """One perceptron across the tokens, one across the channels; x [samples, tokens, channels]."""

    def __init__(self, tokens: int, width: int):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.tokens = perceptron(tokens, 2 * tokens, nn.GELU)
        self.channels = perceptron(width, 4 * width, nn.GELU)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norms[0](x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norms[1](x))


class Mixer(nn.Module):
    """MLP-Mixer on patches of 4 x 4 (arXiv 2105.01601)."""

    def __init__(self, width: int = 128, depth: int = 6, patch: int = 4):
        super().__init__()
        self.width, self.tokens = width, (SIDE // patch) ** 2
        self.embed = nn.Conv2d(3, width, patch, patch)
        self.blocks = nn.Sequential(*(Mixing(self.tokens, width) for _ in range(depth)))
        self.norm, self.classify = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        x = self.embed(image).reshape(-1, self.width, self.tokens).transpose(1, 2)
        return self.classify(self.norm(self.blocks(x)).mean(1))


class Encoder(nn.Module):
    """A transformer's layer, normalised first; x [sequences, tokens, channels]."""

    def __init__(self, tokens: int, width: int, heads: int = 4):
        super().__init__()
        self.shape = (-1, tokens, 3, heads, width // heads)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.project, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.after = perceptron(width, 2 * width, nn.SiLU)

    def attention(self, x: Tensor) -> Tensor:
        _, tokens, _, heads, size = self.shape
        query, key, value = self.project(x).reshape(self.shape).permute(2, 0, 3, 1, 4).unbind(0)
        weights = (query * size**-0.5 @ key.transpose(-2, -1)).softmax(-1)
        return self.out((weights @ value).transpose(1, 2).reshape(-1, tokens, heads * size))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norms[0](x))
        return x + self.after(self.norms[1](x))


class MobileViTBlock(nn.Module):
    """Convolutions, then a transformer over the places that pixels have in common within their patches, then both joined."""

    def __init__(self, channels: int, side: int, width: int, depth: int, patch: int = 2):
        super().__init__()
        self.width, self.count, self.patch = width, side // patch, patch
        self.near = nn.Sequential(unit(channels, channels, 3, nn.SiLU), nn.Conv2d(channels, width, 1, bias=False))
        self.far = nn.Sequential(*(Encoder(self.count**2, width) for _ in range(depth)), nn.LayerNorm(width))
        self.back, self.join = unit(width, channels, 1, nn.SiLU), unit(2 * channels, channels, 3, nn.SiLU)

    def unfold(self, x: Tensor) -> Tensor:
        """[samples, channels, height, width] to [samples * pixels of a patch, patches, channels]."""
        x = x.reshape(-1, self.width, self.count, self.patch, self.count, self.patch)
        return x.permute(0, 3, 5, 2, 4, 1).reshape(-1, self.count**2, self.width)

    def fold(self, x: Tensor) -> Tensor:
        """The way back."""
        x = x.reshape(-1, self.patch, self.patch, self.count, self.count, self.width)
        side = self.count * self.patch
        return x.permute(0, 5, 3, 1, 4, 2).reshape(-1, self.width, side, side)

    def forward(self, x: Tensor) -> Tensor:
        far = self.fold(self.far(self.unfold(self.near(x))))
        return self.join(torch.cat([x, self.back(far)], 1))


class MobileViT(nn.Sequential):
    """Inverted residuals and two MobileViT blocks, at strides 2 and 4 (arXiv 2110.02178)."""

    def __init__(self) -> None:
        def step(inputs: int, outputs: int, stride: int) -> Inverted:
            return Inverted(inputs, outputs, stride, 2, activation=nn.SiLU)

        super().__init__(
            unit(3, 16, 3, nn.SiLU), step(16, 24, 1),
            step(24, 48, 2), step(48, 48, 1), MobileViTBlock(48, SIDE // 2, 64, 2),
            step(48, 64, 2), MobileViTBlock(64, SIDE // 4, 96, 3),
            unit(64, 256, 1, nn.SiLU), Head(256),
        )  # fmt: skip


@dataclass(frozen=True)
class Model:
    """An architecture and what it is trained with: a key of `train_cifar.OPTIMIZERS`, learning rate at batches of 128."""

    build: Callable[[], nn.Module]
    optimizer: str
    rate: float
    decay: float


MODELS = {
    "mobilevit": Model(MobileViT, "adamw", 2e-3, 0.05),
    "mixer": Model(Mixer, "adamw", 1e-3, 0.1),
    "regnetx": Model(RegNetX, "sgd", 0.1, 5e-4),
    "mnasnet": Model(MnasNet, "sgd", 0.1, 2e-4),
}
