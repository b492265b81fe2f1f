"""What `--method` and `--effort` stand for: tables of plain data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class Stage:
    """One round of learning.

    Attributes:
        scope: What is learned at a time: layer, block, or network (`pieces.SCOPES`).
        rounding: How codes are parametrised: latent, soft, flex, or frozen (`rounding.ROUNDINGS`).
        share: Of the effort's steps; every piece of the scope gets as many.
        weighting: What an error at each compared value counts: none (its share of the value's power), mse (its plain square),
            lfh (its square times the log-normalised LFH), sla (Sample-Layer Attention).
        last: The output layer's attention under sla: keep, or cap at the largest other layer's.
        kl: Factor of the divergence between the outputs' distributions (network scope).
        features: Factor of the error at every linear layer's output (network scope).
        activations: How activations are quantized meanwhile: all, gradual (from none to all), or drop (a random half).
        weight_rate: Learning rate of roundings, in steps of the grid (latent), of alpha (soft) or of log divisors (flex).
        scale_rate, bias_rate, step_rate: Relative rates of weight scales, biases and activation steps; 0: not learned.
        finer: Whether these rates halve with every bit of the width above 4, as the steps of the grid do.
        constant: Whether rates stay constant; else they follow half a cosine.
        regularizer: Factor of the annealed regulariser (soft).
        optimizer: adam or radam.
    """

    scope: Literal["layer", "block", "network"]
    rounding: Literal["latent", "soft", "flex", "frozen"]
    share: float = 1.0
    weighting: Literal["none", "mse", "lfh", "sla"] = "none"
    last: Literal["keep", "cap"] = "cap"
    kl: float = 0.0
    features: float = 1.0
    activations: Literal["all", "gradual", "drop"] = "all"
    weight_rate: float = 0.003
    scale_rate: float = 0.003
    bias_rate: float = 0.003
    step_rate: float = 0.003
    finer: bool = False
    constant: bool = False
    regularizer: float = 0.01
    optimizer: Literal["adam", "radam"] = "adam"


@dataclass(frozen=True)
class Method:
    """A recipe.

    Attributes:
        stages: Rounds of learning, one after another; none: plain rounding.
        start: What the first stage starts from: rtn (plain rounding), float (biases uncorrected, as soft rounding starts at
            the float weights), or compensated (`compensate`).
        ranges: Weight ranges that learning begins with: as configured, or hmse. Plain rounding is judged as configured.
    """

    stages: tuple[Stage, ...] = ()
    start: Literal["rtn", "float", "compensated"] = "rtn"
    ranges: Literal["configured", "hmse"] = "configured"


@dataclass(frozen=True)
class Effort:
    """How much is spent.

    Attributes:
        steps: Of learning, per piece.
        samples: For the closed-form start.
        batch: Samples per step.
        starts: Closed-form starts that compete: with positions that count by their gradients, and with all alike.
    """

    steps: int
    samples: int
    batch: int = 32
    starts: int = 2


_ADAROUND = Stage(
    "layer", "soft", weighting="mse", weight_rate=0.03, scale_rate=0, bias_rate=0, step_rate=0, constant=True
)
_V1 = Stage(
    "network", "soft", weighting="lfh", last="keep", weight_rate=0.03, scale_rate=0.001, bias_rate=0.001, step_rate=0,
    constant=True, optimizer="radam",
)  # fmt: skip
METHODS: dict[str, Method] = {
    "rtn": Method(),
    "adaround": Method((_ADAROUND,), "float"),
    "adaquant": Method((Stage("layer", "latent", step_rate=0.001, weight_rate=0.01),), "rtn"),
    "brecq": Method((replace(_ADAROUND, scope="block", step_rate=0.001),), "float"),
    "qdrop": Method((replace(_ADAROUND, scope="block", step_rate=0.001, activations="drop"),), "float"),
    "eptq-v1": Method((_V1,), "float"),
    "eptq-v2": Method(
        (replace(_V1, weighting="sla", weight_rate=0.01, step_rate=0.001, activations="gradual", regularizer=10.0),),
        "float",
        "hmse",
    ),
    "eptq": Method(
        (
            Stage("network", "latent", share=0.5, kl=0.1, finer=True),
            Stage("network", "frozen", share=0.5, kl=0.1, finer=True),
        ),
        "compensated",
    ),
}
EFFORTS: dict[str, Effort] = {
    "fast": Effort(30, 256, starts=1),
    "default": Effort(240, 512),
    "thorough": Effort(2000, 1024),
}
