"""Every setting of a run: one frozen record, checked once, on entry. The command line's options are its fields."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from onnx_eptq.errors import UsageError

BUDGETS = ("compression", "max_weight_bytes", "max_size", "max_activation_memory", "max_bops", "max_cost")
MOST_AMOUNT = 1e30  # solvers take some such number for infinity
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30}


def amount(text: str) -> float:
    """A number with a unit: 300KB, 1.5MiB, 2G; raises ValueError."""
    found = re.fullmatch(r"([0-9]*\.?[0-9]+(?:e[0-9]+)?)\s*([kmgt]i?)?b?", text.strip().lower())
    number = float(found[1]) * UNITS.get(found[2] or "", math.inf) if found else math.inf
    if number > MOST_AMOUNT:
        raise ValueError("input should be a number, such as 300000, 300KB, 293KiB or 1.5G")
    return number


def _single(value: Any) -> Any:
    """One thing where several may stand is a sequence of one."""
    return (value,) if isinstance(value, str | int | float) else value


def _numbers(value: Any) -> Any:
    return tuple(value.split(",")) if isinstance(value, str) else _single(value)


Size = Annotated[int, BeforeValidator(lambda value: int(amount(value)) if isinstance(value, str) else value)]
Amount = Annotated[float, BeforeValidator(lambda value: amount(value) if isinstance(value, str) else value)]
Names = Annotated[tuple[str, ...], BeforeValidator(_single)]
Numbers = Annotated[tuple[float, ...], BeforeValidator(_numbers)]
PathText = Annotated[str, BeforeValidator(lambda value: os.fspath(value) if isinstance(value, os.PathLike) else value)]


class Config(BaseModel):
    """Settings of `quantize`; see the README for what they do. Unknown names and impossible values are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: Literal["eptq", "rtn", "adaround", "adaquant", "brecq", "qdrop", "eptq-v1", "eptq-v2"] = Field(
        "eptq",
        description="How weights are rounded: rtn (to the nearest integer), or learned by one of the other methods",
    )
    effort: Literal["fast", "default", "thorough"] = Field("default", description="How long learning takes")
    steps: int | None = Field(None, ge=1, description="Steps of learning per piece; by the effort by default")
    views: int | None = Field(
        None,
        ge=1,
        description="Views of each colour image to learn from: parts, mirrored; 1 to 4 by the number of images",
    )
    cache_mb: int = Field(
        1024, ge=0, description="Memory for the float model's outputs, its gradients, and for solving layers, in MB"
    )
    compile: bool = Field(False, description="Compile the learning step with torch.compile")
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="Arithmetic of learning; never of the file"
    )
    weight_bits: int = Field(8, ge=2, le=8, description="Bits per weight, 2 to 8")
    act_bits: int = Field(8, ge=2, le=8, description="Bits per activation, 2 to 8; inputs and outputs: 8")
    target: str = Field("onnxruntime", description="What the file is for: onnxruntime, or onnx (portable)")
    storage: Literal["int8", "int4", "cast", "lut"] | None = Field(
        None, description="How weights of 4 bits and less are stored; the target's own choice by default"
    )
    opset: int = Field(
        21, ge=13, le=21, description="Opset of the file; 13 to 20 (IR 8 or 9) where no sub-byte type is in it"
    )
    calibration: Literal["hmse", "mse", "minmax", "percentile", "entropy"] = Field(
        "hmse", description="How activation ranges are chosen: hmse (squared error weighted by LFH) or another"
    )
    weight_calibration: Literal["output", "absmax", "mse", "hmse"] = Field(
        "output",
        description="How weight scales are chosen: by the layer's output error, absmax, mse, or hmse (weighted by LFH)",
    )
    strip_notes: bool = Field(False, description="Leave out what the exporter noted on nodes and values")
    bias_correction: bool = Field(True, description="Add the mean error of rounded weights to the biases")
    equalize: bool = Field(
        True, description="Even out channels between layers, where that lowers the error of the layers behind"
    )
    bits: dict[str, int | tuple[int, ...]] = Field(
        default_factory=dict, description="Bits for layers or tensors by name pattern; several, to choose from"
    )
    weight_choices: tuple[int, ...] = Field((), description="Bits that weights may have under a budget")
    act_choices: tuple[int, ...] = Field((), description="Bits that activations may have under a budget")
    compression: float | None = Field(None, gt=0, description="Budget: float32 bytes of the weights per stored byte")
    max_weight_bytes: Size | None = Field(None, gt=0, description="Budget: bytes of the stored weights")
    max_size: Size | None = Field(None, gt=0, description="Budget: bytes of the whole file")
    max_activation_memory: Size | None = Field(None, gt=0, description="Budget: bytes of activations alive at once")
    max_bops: Amount | None = Field(None, gt=0, description="Budget: bit operations of one sample")
    cost_table: PathText | None = Field(None, description="JSON file that says what layers cost at which bits")
    max_cost: float | None = Field(None, gt=0, description="Budget: sum of the costs in cost_table")
    sensitivity: Literal["local", "output"] = Field(
        "local", description="How the loss at each width is measured: local error weighted by LFH, or at the outputs"
    )
    sensitivity_cache: PathText | None = Field(
        None, description="Folder of measured sensitivities; the user's by default"
    )
    solver_seconds: float = Field(60.0, gt=0, description="How long the choice of widths may take")
    keep_float: Names = Field((), description="Layers, operators or tensors kept float, by name pattern")
    num_samples: int | None = Field(None, ge=1, lt=2**63, description="Calibration samples to use; all by default")
    random_calibration: bool = Field(False, description="Calibrate on random numbers when no data is given")
    random_shapes: dict[str, tuple[int, ...]] = Field(
        default_factory=dict, description="Shapes of random inputs, by name, where the model leaves sizes open"
    )
    batch_size: int | None = Field(
        None, ge=1, lt=2**31, description="Samples per batch; by the size of a sample by default"
    )
    preset: str = Field("unit", description="Image preprocessing by name")
    scale: float | None = Field(None, description="Factor on pixels of 0..255, before mean and std; 1/255 by default")
    mean: Numbers | None = Field(None, description="Mean per channel, after the scale")
    std: Numbers | None = Field(None, description="Standard deviation per channel, after the scale")
    resize: str | None = Field(None, description="Short side (256), or HxW to stretch")
    crop: str | None = Field(None, description="Centre crop: 224, or HxW")
    color: Literal["rgb", "bgr"] | None = Field(None, description="Channel order of the model")
    layout: Literal["nchw", "nhwc"] | None = Field(
        None, description="Axis order; read off the model's input by default"
    )
    seed: int = Field(0, ge=0, lt=2**63, description="Decides every random choice")
    threads: int = Field(
        0, ge=0, lt=2**15, description="CPU threads; 0: one per core, fewer for models too small for them"
    )
    device: str = Field("cpu", description="Where the simulation runs: cpu, cuda, cuda:1")

    @property
    def budgets(self) -> dict[str, float]:
        """The budgets that are set, by field."""
        found = {name: getattr(self, name) for name in BUDGETS}
        return {name: value for name, value in found.items() if value is not None}

    @classmethod
    def make(cls, **settings: Any) -> Config:
        """Build a Config; raises UsageError that names each wrong setting, what was found and what is wanted.

        Several `weight_bits` or `act_bits` are widths to choose from, as on the command line.
        """
        for name, choices in (("weight_bits", "weight_choices"), ("act_bits", "act_choices")):
            widths = settings.get(name)
            if isinstance(widths, list | tuple) and len(widths) == 1:
                settings[name] = widths[0]
            elif isinstance(widths, list | tuple):
                settings[choices] = tuple(settings.pop(name))
        try:
            return cls(**settings)
        except ValidationError as error:
            raise UsageError("; ".join(_complaint(item) for item in error.errors())) from None

    @classmethod
    def load(cls, path: str | Path, **overrides: Any) -> Config:
        """Read a YAML file as `save` writes it; `overrides` win over it."""
        try:
            settings = yaml.safe_load(Path(path).read_text()) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise UsageError(f"cannot read the config file {path}: {str(error).splitlines()[0]}") from None
        if not isinstance(settings, dict):
            raise UsageError(f"the config file {path} holds a {type(settings).__name__}, not `name: value` lines")
        return cls.make(**{**{str(name): value for name, value in settings.items()}, **overrides})

    def save(self, path: str | Path) -> None:
        """Write every setting as YAML."""
        try:
            Path(path).write_text(yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False))
        except OSError as error:
            raise UsageError(f"cannot write the config file {path}: {error.strerror}") from None


def _complaint(item: Any) -> str:
    name, problem = str(item["loc"][0]) if item["loc"] else "settings", str(item["msg"]).removeprefix("Value error, ")
    if item["type"] == "extra_forbidden":
        return f"there is no setting '{name}'"
    return f"{name}: {problem[0].lower()}{problem[1:]}, found {item['input']!r}"
