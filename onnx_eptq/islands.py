"""Operators that no torch function stands for: ONNX Runtime computes them, constant with respect to gradients.

GRU, If, Loop, vendor operators, ...: what the table of `ops` lacks and the runtime has. Besides `verify`, the only module
that imports onnxruntime.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort
import torch
from onnxruntime.capi import onnxruntime_pybind11_state as runtime
from torch import Tensor, nn

from onnx_eptq import graph as graphs
from onnx_eptq.errors import ModelError

_RANDOM = ("Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike")

_TYPES: dict[str, type[np.generic]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
    "tensor(uint8)": np.uint8,
    "tensor(int8)": np.int8,
    "tensor(bool)": np.bool_,
}


@cache
def _kernels() -> frozenset[tuple[str, str]]:
    """Domain and name of every operator that the runtime has a CPU kernel for."""
    found = runtime.get_all_opkernel_def()
    return frozenset((kernel.domain, kernel.op_name) for kernel in found if kernel.provider == "CPUExecutionProvider")


def can_run(node: gs.Node) -> bool:
    """Whether ONNX Runtime has the node's operator, as far as its name tells; what draws numbers cannot be simulated."""
    if node.op in _RANDOM:
        return False
    domain = "" if node.domain in graphs.STANDARD_DOMAINS else node.domain
    if (domain, node.op) in _kernels():
        return True
    if domain or not onnx.defs.has(node.op):
        return False
    schema = onnx.defs.get_schema(node.op)
    return bool(schema.has_function or schema.has_context_dependent_function)  # the runtime takes it apart


def _session(model: onnx.ModelProto) -> ort.InferenceSession:
    """A session that computes the nodes as they are."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def declare(graph: gs.Graph) -> int:
    """Fill in the types and shapes that ONNX Runtime infers of what vendor operators make, and return of how many values.

    ONNX's own inference knows nothing of them, nor of all that is behind them.
    """
    unknown = {
        tensor.name: tensor
        for node in graph.nodes
        if node.domain not in graphs.STANDARD_DOMAINS
        for tensor in node.outputs
        if tensor.name and tensor.dtype is None
    }
    if not unknown:
        return 0
    model = graphs.skeleton(graph)
    known = {value.name for value in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in unknown if name not in known)
    try:
        session = _session(model)
    except Exception:  # onnxruntime raises a dozen unrelated classes; what it cannot tell stays unknown
        return 0
    count = 0
    for value in session.get_outputs():
        kind = _TYPES.get(value.type)
        if value.name in unknown and kind is not None:
            unknown[value.name].dtype = kind
            if value.shape:  # empty is said of scalars, and of what the runtime infers no shape of
                dims = enumerate(value.shape)
                unknown[value.name].shape = [n if n is not None else f"{value.name}_dim_{i}" for i, n in dims]
            count += 1
    return count


class Island(nn.Module):
    """One node, run by ONNX Runtime on the CPU. Takes tensors in the order of `names`, returns a tuple of tensors."""

    def __init__(self, node: gs.Node, graph: gs.Graph) -> None:
        super().__init__()
        self.label = f"'{node.name}' {node.op}"
        self.names = [tensor.name for tensor in graphs.variables_read(node)]
        self.model = graphs.node_model(node, graph)
        self.session: ort.InferenceSession | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Copies make sessions of their own."""
        return {**self.__dict__, "session": None}

    def _open(self, arrays: list[np.ndarray]) -> ort.InferenceSession:
        """The session; which types go in is known at the first run."""
        del self.model.graph.input[:]
        for name, array in zip(self.names, arrays, strict=True):
            kind = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
            self.model.graph.input.append(onnx.helper.make_tensor_value_info(name, kind, None))
        return _session(self.model)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The node's outputs, on the device of the inputs."""
        whole = [x.detach().float() if x.dtype == torch.bfloat16 else x.detach() for x in inputs]
        arrays = [np.ascontiguousarray(x.cpu().numpy()).reshape(x.shape) for x in whole]
        try:
            self.session = self.session or self._open(arrays)
            found = self.session.run(None, dict(zip(self.names, arrays, strict=True)))
        except Exception as error:  # onnxruntime raises a dozen unrelated classes
            reason = str(error).strip().splitlines()[0][:300]
            raise ModelError(f"ONNX Runtime cannot run the node {self.label} by itself: {reason}") from error
        if not all(isinstance(array, np.ndarray) and array.dtype.kind in "biuf" for array in found):
            raise ModelError(f"the node {self.label} makes what is no tensor of numbers; cut the model before it")
        device = inputs[0].device if inputs else torch.device("cpu")
        return tuple(torch.from_numpy(array).to(device) for array in found)


@cache
def keep_from_compiling() -> None:
    """Let torch.compile call islands instead of tracing them; said when it is used, as torch takes seconds to import it."""
    Island.forward = torch.compiler.disable(Island.forward)  # type: ignore[method-assign, no-untyped-call]
