"""How many of ONNX's own single-node cases the simulation computes right, by operator.

node_cases.py [--failing]

Every case (a model of one node, inputs and expected outputs; they come with the package `onnx`) is built as a mirror and run.
`by function` are those that a function of `onnx_eptq/ops.py` computes, `by runtime` those left to ONNX Runtime (`islands`);
`not run` those with a reason, listed below the table. A case that gives something else than expected is `wrong`.
"""

import argparse
import sys
import warnings
from collections import Counter, defaultdict
from typing import Any

import numpy as np
import onnx
import torch
from common import markdown
from onnx import numpy_helper

from onnx_eptq import graph as graphs
from onnx_eptq import mirror
from onnx_eptq.calibrate import feed
from onnx_eptq.errors import EptqError
from onnx_eptq.ops import op_of

ABSOLUTE = 1e-5  # beside ONNX's own relative tolerance of each case
NEWEST = 25  # opset that models may have
COMPUTED = {"bool", "uint8", *(f"int{bits}" for bits in (8, 16, 32, 64)), *(f"float{bits}" for bits in (16, 32, 64))}
KNOWN = {  # part of a case's name: why the simulation is not expected to compute it as ONNX does
    "spacetodepth_dcr_mode": "the attribute `mode` is younger than the newest opset of models",
    "spacetodepth_crd_mode": "the attribute `mode` is younger than the newest opset of models",
    "_training_mode": "quantization is about inference",
    "attention_4d_causal_fp16": "one step of float16 aside, where ONNX Runtime's result is, too",
    "training_dropout": "quantization is about inference",
    "linear_align_corners": "unlike ONNX Runtime, divides by an unrounded length",
    "cubic_align_corners": "unlike ONNX Runtime, divides by an unrounded length",
}


def arrays(values: Any) -> list[Any]:
    """A case's data; what is no tensor stays as it is."""
    return [numpy_helper.to_array(v) if isinstance(v, onnx.TensorProto) else v for v in values]


def outcome(case: Any) -> tuple[str, str]:
    """Where a case ends up, and why."""
    for part, why in KNOWN.items():
        if part in case.name and ("downsample" in case.name or "align" not in part):
            return "not run", why
    inputs, wanted = (arrays(part) for part in case.data_sets[0])
    kinds = {str(getattr(a, "dtype", "no tensor")) for a in [*inputs, *wanted]}
    if foreign := kinds - COMPUTED:
        return "not run", f"torch does not compute with {', '.join(sorted(foreign))}"
    for entry in case.model.opset_import:  # newer ones changed none of these operators
        entry.version = min(entry.version, NEWEST)
    try:
        graph = graphs.load(case.model)
        island = any(op_of(node).island for node in graph.nodes)
        with torch.no_grad():
            net = mirror.build(graph)
            found = net(*feed(net, dict(zip(net.input_names, inputs, strict=False))))
    except EptqError as error:
        return "not run", "ONNX Runtime does not run it" if "cannot run" in str(error) else str(error)[:90]
    except (NotImplementedError, RuntimeError, TypeError) as error:
        return "wrong", f"{type(error).__name__}: {str(error).strip().splitlines()[0][:90]}"
    for ours, theirs in zip(found, wanted, strict=True):
        same_kind = str(ours.dtype).removeprefix("torch.") == str(theirs.dtype) and tuple(ours.shape) == theirs.shape
        if not same_kind or not np.allclose(ours.numpy(), theirs, case.rtol, ABSOLUTE, equal_nan=True):
            return ("not run", "ONNX Runtime computes something else") if island else ("wrong", "another result")
    return ("by runtime" if island else "by function"), ""


def cases() -> dict[str, list[Any]]:
    """ONNX's cases of one node of the standard domain, by operator."""
    from onnx.backend.test.case.node import collect_testcases

    found = defaultdict(list)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy's, about the overflows that are the point of some cases
        for case in collect_testcases(None):
            nodes = case.model.graph.node
            if len(nodes) == 1 and nodes[0].domain in ("", "ai.onnx"):
                found[nodes[0].op_type].append(case)
    return dict(sorted(found.items()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--failing", action="store_true", help="list every case that is not computed right")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    kinds = ("by function", "by runtime", "not run", "wrong")
    rows, reasons, failing = [], Counter[tuple[str, str]](), []
    for name, group in cases().items():
        found = [(case.name, *outcome(case)) for case in group]
        counts = Counter(kind for _, kind, _ in found)
        rows.append([name, len(group), *(counts[kind] or "" for kind in kinds)])
        reasons.update((kind, why) for _, kind, why in found if why)
        failing += [f"{case}: {kind}, {why}" for case, kind, why in found if why]
    totals = [sum(int(row[i] or 0) for row in rows) for i in range(1, 6)]
    print(markdown(["operator", "cases", *kinds], [*rows, ["all", *totals]]))
    print("\n" + "\n".join(f"{count} {kind}: {why}" for (kind, why), count in reasons.most_common()))
    if options.failing:
        print("\n" + "\n".join(failing))
    return 0


if __name__ == "__main__":
    sys.exit(main())
