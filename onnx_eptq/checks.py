"""What can be found wrong before any long work: arguments, settings, places to write to, and what a model holds."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import torch

from onnx_eptq import graph as graphs
from onnx_eptq.config import Config
from onnx_eptq.errors import ModelError, OutputError, UsageError
from onnx_eptq.plan import Plan, linear_layers
from onnx_eptq.prepare.precision import is_other_float, is_turned


def check_kinds(**given: tuple[Any, type | tuple[type, ...]]) -> None:
    """Raise UsageError for an argument that is of another kind than what belongs there."""
    for name, (value, kinds) in given.items():
        if value is not None and not isinstance(value, kinds):
            wanted = " or ".join(kind.__name__ for kind in (kinds if isinstance(kinds, tuple) else (kinds,)))
            raise UsageError(f"{name} is a {type(value).__name__}; give a {wanted}")


def check_budgets(config: Config, plan: Plan | None, explore: bool) -> bool:
    """Whether widths are to be chosen; raises UsageError for settings that do not go together."""
    choices = bool(config.weight_choices or config.act_choices) or any(
        isinstance(widths, tuple) for widths in config.bits.values()
    )
    if plan is not None and (config.budgets or choices):
        raise UsageError(
            "the plan that is given says every width already; leave out the budgets and the widths to choose from"
        )
    if plan is not None and (config.bits or config.keep_float):
        raise UsageError(
            "the plan that is given says what is quantized at which width; edit it instead of giving --bits or --keep-float"
        )
    if choices and not config.budgets and not explore:
        raise UsageError(
            "several widths need a budget to choose by: --compression, --max-weight-bytes, --max-size, "
            "--max-activation-memory, --max-bops or --max-cost (`onnx-eptq sensitivity` shows what they would cost)"
        )
    if config.cost_table is not None and config.max_cost is None and not explore:
        raise UsageError("--cost-table needs --max-cost, the sum of costs that is allowed")
    return bool(config.budgets) or explore


def check_device(config: Config) -> None:
    """Raise UsageError when torch cannot use the device."""
    try:
        torch.zeros(1, device=config.device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(f"device '{config.device}' cannot be used ({reason}); use --device cpu") from None


def check_output(output: str | os.PathLike[str], model: Any, data: Any = None) -> None:
    """Raise OutputError when the file could not be written at the end, or would replace what it is made from."""
    path = Path(os.path.realpath(output))  # of a link, what it leads to is replaced
    folder = path.parent
    kind = onnx.serialization.registry.get_format_from_file_extension(path.suffix)
    if kind not in (None, "protobuf"):
        raise OutputError(
            f"the output {path} has the name of a {kind} file, but a binary ONNX file is written; let its name end in .onnx"
        )
    if path.is_dir():
        raise OutputError(f"the output {path} is a folder; give a file name")
    if not folder.is_dir():
        raise OutputError(f"the output's folder {folder} does not exist; make it first")
    try:
        with tempfile.TemporaryFile(dir=folder):
            writable = not path.exists() or os.access(path, os.W_OK)
        path.with_name(f"{path.name}.checkpoint.{os.getpid()}.part").exists()  # raises for a name that is too long
    except OSError:
        writable = False
    if not writable:
        raise OutputError(f"the output {path} cannot be written; choose another place")
    if path.exists() and not path.is_file():
        raise OutputError(f"the output {path} is no regular file; give a file name")
    for source, what in ((model, "the input model itself"), (data, "the calibration data itself")):
        if isinstance(source, str | os.PathLike) and path.exists() and Path(source).exists() and path.samefile(source):
            raise OutputError(f"the output {path} is {what}; choose another name")


def check_weights_kept(output: str | os.PathLike[str], model: str | os.PathLike[str]) -> None:
    """Raise OutputError when the output would replace a file that holds the model's weights."""
    for held in graphs.data_files(Path(model)):
        written = (Path(output), Path(f"{os.fspath(output)}.data"))
        if any(path.exists() and held.exists() and path.samefile(held) for path in written):
            raise OutputError(
                f"the output {output} would replace {held}, which holds the model's weights; choose another name"
            )


def check_values(graph: gs.Graph) -> None:
    """Raise ModelError for what the simulation does not cover: other precisions than float32, weights that are no numbers."""
    ends = {id(tensor) for tensor in (*graph.inputs, *graph.outputs)}  # of other precisions, they lie beside a Cast
    for tensor in [*graph.inputs, *graph.tensors().values()]:
        turned = id(tensor) in ends and is_turned(tensor)
        if tensor.dtype == onnx.TensorProto.BFLOAT16:  # an input or output: nothing else is left so
            raise ModelError(f"'{tensor.name}' is bfloat16; give the model inputs and outputs of float32")
        if is_other_float(tensor) and not turned:
            raise ModelError(f"'{tensor.name}' is {tensor.dtype}; convert the model to float32, or export it again so")
        if isinstance(tensor, gs.Constant) and tensor.dtype == np.float32 and np.isnan(tensor.values).any():
            raise ModelError(f"the constant '{tensor.name}' holds NaN; export the model again from sound weights")
    for tensor in (each for each in graph.outputs if isinstance(each, gs.Variable)):
        numbers = tensor.dtype is None or (not isinstance(tensor.dtype, int) and np.dtype(tensor.dtype).kind in "biuf")
        if tensor.type != "tensor_type" or not numbers:
            what = "a tensor of text" if tensor.type == "tensor_type" else f"a {tensor.type.removesuffix('_type')}"
            raise ModelError(
                f"the output '{tensor.name}' is {what}, and only tensors of numbers can be compared; cut the model before it, "
                "or export it otherwise (skl2onnx: options={'zipmap': False}, and classes as integers)"
            )
    for layer in linear_layers(graph):
        if not np.isfinite(layer.weight.values).all():
            raise ModelError(
                f"the weight '{layer.weight.name}' holds infinities; export the model again from sound weights"
            )
    for tensor in graph.inputs:
        if 0 in (tensor.shape or ()):
            raise ModelError(f"the input '{tensor.name}' has a dimension of size 0; leave it open or give it a size")
