"""The networks of the zoo that no library has, or has without what a deployed file holds (heads alone, decoding)."""

import itertools
import math

import torch
import torch.nn.functional as F
from cifar_models import unit
from export_zoo import CLASSES, torchvision
from torch import Tensor, nn

torchvision()
import torchvision as tv  # noqa: E402


class DeepLabV3(nn.Module):
    """torchvision's, without the dictionary."""

    def __init__(self) -> None:
        super().__init__()
        make = tv.models.segmentation.deeplabv3_mobilenet_v3_large
        self.net = make(weights=None, weights_backbone=None, num_classes=CLASSES, aux_loss=False)

    def forward(self, image: Tensor) -> Tensor:
        return self.net(image)["out"]


class DeepLabV3Plus(nn.Module):
    """MobileNetV2 at stride 16, atrous separable pyramid, decoder with the features at stride 4 (arXiv 1802.02611)."""

    def __init__(self) -> None:
        super().__init__()
        layers = tv.models.mobilenet_v2(weights=None).features
        for block in layers[14:18]:
            for module in block.modules():
                if isinstance(module, nn.Conv2d) and module.groups > 1:
                    module.stride, module.dilation, module.padding = (1, 1), (2, 2), (2, 2)
        self.low, self.high = layers[:4], layers[4:18]
        self.pyramid = nn.ModuleList(
            [
                unit(320, 64),
                *(nn.Sequential(unit(320, 320, 3, groups=320, dilation=d), unit(320, 64)) for d in (2, 4, 6)),
            ]
        )
        self.pool, self.join, self.skip = unit(320, 64), unit(5 * 64, 64), unit(24, 16)
        self.decode = nn.Sequential(unit(80, 80, 3, groups=80), unit(80, 64), nn.Conv2d(64, CLASSES, 1))

    def forward(self, image: Tensor) -> Tensor:
        low = self.low(image)
        high = self.high(low)
        context = self.pool(F.adaptive_avg_pool2d(high, 1))
        context = F.interpolate(context, size=high.shape[-2:], mode="bilinear", align_corners=False)
        x = self.join(torch.cat([*(branch(high) for branch in self.pyramid), context], 1))
        x = F.interpolate(x, size=low.shape[-2:], mode="bilinear", align_corners=False)
        x = self.decode(torch.cat([x, self.skip(low)], 1))
        return F.interpolate(x, size=image.shape[-2:], mode="bilinear", align_corners=False)


class UNet(nn.Module):
    """Encoder and decoder joined at every resolution; upsampling by transposed convolution (arXiv 1505.04597)."""

    def __init__(self, widths: tuple[int, ...] = (16, 32, 64, 128)) -> None:
        super().__init__()
        pairs = list(itertools.pairwise(widths))
        self.first = self.double(3, widths[0])
        self.down = nn.ModuleList(self.double(a, b) for a, b in pairs)
        self.up = nn.ModuleList(nn.ConvTranspose2d(b, a, 2, 2) for a, b in reversed(pairs))
        self.after = nn.ModuleList(self.double(2 * a, a) for a, _ in reversed(pairs))
        self.last = nn.Conv2d(widths[0], CLASSES, 1)

    @staticmethod
    def double(inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(unit(inputs, outputs, 3), unit(outputs, outputs, 3))

    def forward(self, image: Tensor) -> Tensor:
        levels = [self.first(image)]
        for down in self.down:
            levels.append(down(F.max_pool2d(levels[-1], 2)))
        x = levels.pop()
        for up, after in zip(self.up, self.after, strict=True):
            x = after(torch.cat([levels.pop(), up(x)], 1))
        return self.last(x)


class RetinaHeads(nn.Module):
    """RetinaNet with ResNet-50 and its feature pyramid: class scores before Sigmoid and box offsets of all anchors."""

    def __init__(self) -> None:
        super().__init__()
        make = tv.models.detection.retinanet_resnet50_fpn
        net = make(weights=None, weights_backbone=None, num_classes=CLASSES)
        self.backbone, self.head, self.anchors = net.backbone, net.head, net.anchor_generator
        classes, boxes = net.head.classification_head.cls_logits, net.head.regression_head.bbox_reg
        self.tempered = [(classes, 4.0), (boxes, 1.0)]

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        found = self.head(list(self.backbone(image).values()))
        return found["cls_logits"], found["bbox_regression"]


def best_boxes(scores: Tensor, boxes: Tensor, count: int = 100, threshold: float = 0.5) -> tuple[Tensor, ...]:
    """The best boxes (corners) of one picture that do not overlap, their scores and classes; scores [anchors, classes]."""
    top, index = scores.flatten().topk(count)
    anchors, classes = index // scores.shape[1], index % scores.shape[1]
    boxes = boxes[anchors]
    apart = boxes + 1e4 * classes[:, None].to(boxes.dtype)  # boxes of different classes do not compete
    kept = torch.ops.torchvision.nms(apart, top, threshold)
    return boxes[kept], top[kept], classes[kept]


class RetinaBoxes(nn.Module):
    """RetinaNet with its decoding, for one picture of a known size."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.body = RetinaHeads()
        levels = [size // 2**level for level in range(3, 8)]
        picture = tv.models.detection.image_list.ImageList(torch.zeros(1, 3, size, size), [(size, size)])
        (anchors,) = self.body.anchors(picture, [torch.zeros(1, 1, max(n, 1), max(n, 1)) for n in levels])
        self.register_buffer("centre", (anchors[:, :2] + anchors[:, 2:]) / 2)
        self.register_buffer("extent", anchors[:, 2:] - anchors[:, :2])

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        scores, offsets = self.body(image)
        centre = self.centre + offsets[0, :, :2] * self.extent
        extent = self.extent * offsets[0, :, 2:].clamp(max=math.log(1000 / 16)).exp()
        return best_boxes(scores[0].sigmoid(), torch.cat([centre - extent / 2, centre + extent / 2], 1))


class Split(nn.Module):
    """Half of the channels through bottlenecks, then all joined: the block of a YOLO."""

    def __init__(self, channels: int, depth: int) -> None:
        super().__init__()
        half = channels // 2
        self.enter, self.leave = unit(channels, channels, activation=nn.SiLU), None
        self.steps = nn.ModuleList(
            nn.Sequential(unit(half, half, 3, nn.SiLU), unit(half, half, 3, nn.SiLU)) for _ in range(depth)
        )
        self.leave = unit((2 + depth) * half, channels, activation=nn.SiLU)

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.enter(x).chunk(2, 1))
        for step in self.steps:
            parts.append(parts[-1] + step(parts[-1]))
        return self.leave(torch.cat(parts, 1))


class Yolo(nn.Module):
    """Three heads on a feature pyramid that goes up and down again, nearest upsampling, SiLU."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        w = [width * 2**level for level in range(5)]

        def down(a: int, b: int) -> nn.Sequential:
            return unit(a, b, 3, nn.SiLU, stride=2)

        self.stem = nn.Sequential(down(3, w[0]), down(w[0], w[1]), Split(w[1], 1))
        self.c3 = nn.Sequential(down(w[1], w[2]), Split(w[2], 2))
        self.c4 = nn.Sequential(down(w[2], w[3]), Split(w[3], 2))
        self.c5 = nn.Sequential(down(w[3], w[4]), Split(w[4], 1))
        self.squeeze, self.spread = unit(w[4], w[3], activation=nn.SiLU), unit(4 * w[3], w[4], activation=nn.SiLU)
        self.up4, self.up3 = unit(w[4] + w[3], w[3], activation=nn.SiLU), unit(w[3] + w[2], w[2], activation=nn.SiLU)
        self.down4, self.down5 = down(w[2], w[2]), down(w[3], w[3])
        self.n4, self.n5 = unit(w[2] + w[3], w[3], activation=nn.SiLU), unit(w[3] + w[4], w[4], activation=nn.SiLU)
        self.heads = nn.ModuleList(nn.Conv2d(w[i], 3 * (5 + CLASSES), 1) for i in (2, 3, 4))
        self.tempered = [(head, 4.0) for head in self.heads]

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        c3 = self.c3(self.stem(image))
        c4 = self.c4(c3)
        pooled = [self.squeeze(self.c5(c4))]
        for _ in range(3):
            pooled.append(F.max_pool2d(pooled[-1], 5, 1, 2))
        p5 = self.spread(torch.cat(pooled, 1))
        p4 = self.up4(torch.cat([F.interpolate(p5, scale_factor=2.0, mode="nearest"), c4], 1))
        p3 = self.up3(torch.cat([F.interpolate(p4, scale_factor=2.0, mode="nearest"), c3], 1))
        n4 = self.n4(torch.cat([self.down4(p3), p4], 1))
        n5 = self.n5(torch.cat([self.down5(n4), p5], 1))
        return tuple(head(x) for head, x in zip(self.heads, (p3, n4, n5), strict=True))


class YoloBoxes(nn.Module):
    """The same with its decoding, for one picture."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Yolo()
        self.register_buffer("anchors", torch.tensor([[[8.0, 8], [16, 12], [12, 20]], [[24, 24], [40, 24], [24, 48]],
                                                      [[64, 48], [48, 64], [64, 64]]]))  # fmt: skip

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        boxes, scores = [], []
        for head, anchors, stride in zip(self.body(image), self.anchors, (8, 16, 32), strict=True):
            _, _, height, width = head.shape
            y = head.reshape(3, 5 + CLASSES, height, width).permute(0, 2, 3, 1).sigmoid()
            rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
            grid = torch.stack([columns, rows], -1).to(y.dtype)
            centre = (2 * y[..., :2] - 0.5 + grid) * stride
            extent = (2 * y[..., 2:4]) ** 2 * anchors[:, None, None]
            boxes.append(torch.cat([centre - extent / 2, centre + extent / 2], -1).reshape(-1, 4))
            scores.append((y[..., 4:5] * y[..., 5:]).reshape(-1, CLASSES))
        return best_boxes(torch.cat(scores), torch.cat(boxes))


def vision_transformer() -> nn.Module:
    """torchvision's transformer, small: attention in one module, the class token taken by Gather."""
    make = tv.models.VisionTransformer
    return make(image_size=64, patch_size=8, num_layers=4, num_heads=4, hidden_dim=128, mlp_dim=512, num_classes=100)


class Bert(nn.Module):
    """An encoder of text: three embeddings, masked attention, tanh pooler (arXiv 1810.04805, small)."""

    def __init__(self, vocabulary: int, width: int = 128, depth: int = 3, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.words, self.places, self.types = (nn.Embedding(n, width) for n in (vocabulary, 64, 2))
        self.norm = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    **{name: nn.Linear(width, width) for name in ("query", "key", "value", "out")},
                    "up": nn.Linear(width, 4 * width),
                    "down": nn.Linear(4 * width, width),
                    **{name: nn.LayerNorm(width) for name in ("norm1", "norm2")},
                }
            )
            for _ in range(depth)
        )
        self.pool, self.classify = nn.Linear(width, width), nn.Linear(width, 5)

    def split(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], x.shape[1], self.heads, -1).transpose(1, 2)

    def forward(self, ids: Tensor, types: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        places = torch.arange(ids.shape[1], device=ids.device)[None]
        x = self.norm(self.words(ids) + self.types(types) + self.places(places))
        bias = (1.0 - mask[:, None, None].to(x.dtype)) * -10000.0
        for block in self.blocks:
            q, k, v = (self.split(block[name](x)) for name in ("query", "key", "value"))
            scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + bias
            mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
            x = block["norm1"](x + block["out"](mixed))
            x = block["norm2"](x + block["down"](F.gelu(block["up"](x))))
        return x, self.classify(self.pool(x[:, 0]).tanh())


class Speech(nn.Module):
    """Convolution over time, a GRU, a classifier of its last state."""

    def __init__(self, features: int = 16, width: int = 64) -> None:
        super().__init__()
        self.enter = nn.Sequential(
            nn.Conv1d(features, width, 5, padding=2, bias=False), nn.BatchNorm1d(width), nn.ReLU(),
            nn.Conv1d(width, 4 * width, 5, padding=2), nn.ReLU(), nn.Conv1d(4 * width, 4 * width, 5, stride=2), nn.ReLU(),
        )  # fmt: skip
        self.narrow = nn.Linear(4 * width, 16)
        self.memory = nn.GRU(16, 16, batch_first=True)
        self.classify = nn.Linear(16, 12)

    def forward(self, features: Tensor) -> Tensor:
        x = self.narrow(self.enter(features.transpose(1, 2)).transpose(1, 2))
        return self.classify(self.memory(x)[0][:, -1])
