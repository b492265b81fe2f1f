"""What a run warns of, and what its file says of itself."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable

import onnx

from onnx_eptq import verify
from onnx_eptq.config import Config
from onnx_eptq.eptq import Learning
from onnx_eptq.methods import METHODS
from onnx_eptq.mixed import BUDGETS
from onnx_eptq.report import Report

MANY_NOTES = 0.1  # of the file
RUNTIME_MARGIN = 3.0  # dB above the whole error: half of it is then the runtime's own
RUNTIME_LOSS = 1.0  # dB that the error grows by
HARMLESS_SQNR = 40.0  # dB; above, an error is as small as that of one rounding to 8 bits, whoever makes it
LOW_AGREEMENT = 75.0  # %; below, the largest score is another one too often
AT_MOST = "try to keep the first or last layers float (--keep-float)"  # where all have 8 bits
LOW_COLUMN, HIDDEN = 6.0, 30.0  # dB of one column that are low, and how many more of the whole output hide it
REPEATED = 0.75  # share of samples that are different from all others; below, it is said
LOW_SQNR = 6.0  # dB; below, outputs differ from the float model's by half their size
PARITY_TEXT = 128  # characters of the file's word on its verification: its size is known before it is verified
# The file's other words on itself fill multiples of so many characters: equal plans give files of one size, however asked for.
METADATA_UNIT = 128
SEARCH_SETTINGS = (  # that widths are found by; the file holds what was found
    *BUDGETS, "weight_choices", "act_choices", "cost_table", "sensitivity", "sensitivity_cache", "solver_seconds",
)  # fmt: skip


def idle_settings(config: Config) -> list[str]:
    """A warning for settings of learning where nothing is learned."""
    learning = ("effort", "steps", "views", "compile", "precision")
    idle = [name for name in learning if getattr(config, name) != Config.model_fields[name].default]
    if METHODS[config.method].stages or not idle:
        return []
    return [f"{', '.join(idle)}: settings of learning, and --method {config.method} learns nothing"]


def low_fidelity(fidelity: verify.Fidelity, advice: str, floats: Collection[str] = ()) -> list[str]:
    """A warning for every output that is far from the float model's, as a whole or in one of its columns.

    `floats` names the values that are float already, so that to keep them so helps no one.
    """
    found = [
        f"output '{name}' of the written file is NaN or infinite in {count:,} elements where the float model's is a number; "
        f"{advice}, or keep what leads to it float (--keep-float)"
        for name, count in fidelity.broken.items()
    ]
    found += [
        f"output '{name}' is {decibel} dB from the float model's: expect a loss; {advice}"
        for name, decibel in fidelity.sqnr_db.items()
        if decibel < LOW_SQNR
    ]
    found += [
        f"output '{name}' is {decibel} dB from the float model's even where both select the same: expect a loss; {advice}"
        for name, decibel in fidelity.selected_db.items()
        if decibel < LOW_SQNR
    ]
    found += [
        f"output '{name}' agrees with the float model's in {share} % only: expect a loss; {advice} or other samples"
        for name, share in fidelity.agreement.items()
        if share < LOW_AGREEMENT and fidelity.sqnr_db.get(name, LOW_SQNR) >= LOW_SQNR
    ]
    for name, (index, decibel) in fidelity.worst.items():
        whole = fidelity.sqnr_db.get(name, 0.0)
        if decibel < LOW_COLUMN and whole > max(LOW_SQNR, decibel + HIDDEN):
            cure = advice if name in floats else f"keep '{name}' float, or give the column an output of its own"
            found.append(
                f"output '{name}': what varies in column {index} is only {decibel} dB from the float model's, which the "
                f"{whole} dB of all columns hide; {cure}"
            )
    return found


def judged_on_little(learning: Learning, samples: int) -> list[str]:
    """A warning where what was learned could hardly be judged: of too few samples, or of copies."""
    found = []
    if learning.different < REPEATED * samples:
        found.append(
            f"of {samples} samples only {learning.different} are different, the others being copies of them or nearly: learning "
            "needs what the model meets in use"
        )
    if not learning.held_out:
        found.append(
            f"{samples} samples are too few to hold some out: nothing says that what was learned is better than plain rounding "
            "on others; give more, or --method rtn"
        )
    return found


def deviating(parity: verify.Parity, fidelity: verify.Fidelity) -> list[str]:
    """The outputs that the runtime's optimisations change as much as quantization does, to the better or to the worse."""
    return [
        name
        for name, decibel in parity.optimized_db.items()
        if decibel < min(fidelity.sqnr_db.get(name, -math.inf) + RUNTIME_MARGIN, HARMLESS_SQNR)
    ]


def runtime_losses(names: Iterable[str], fidelity: verify.Fidelity, exact: verify.Fidelity) -> list[str]:
    """A warning for every output that is farther from the float model's at full optimisation than it is at `exact`.

    Where single steps tip many others (in recurrences, before a Softmax), the two may differ much and be as good as each other.
    """
    return [
        f"output '{name}': {fidelity.sqnr_db[name]} dB at full optimisation, where ONNX Runtime's kernels compute other numbers "
        f"than the file says; {exact.sqnr_db[name]} dB at basic optimisation, where they do not"
        for name in names
        if fidelity.sqnr_db[name] < exact.sqnr_db.get(name, -math.inf) - RUNTIME_LOSS
    ]


def notes_of(report: Report) -> str:
    """What to do about a file that is full of notes."""
    return (
        f"{report.notes_bytes:,} bytes of the file are what the exporter noted on nodes; --strip-notes leaves them out"
    )


def properties(model: onnx.ModelProto) -> dict[str, str]:
    """The entries of a model's metadata."""
    return {entry.key: entry.value for entry in model.metadata_props}


def padded(text: str, unit: int) -> str:
    """The text with spaces behind it, up to the next multiple of so many characters."""
    return text.ljust(-(-len(text) // unit) * unit)


def metadata(report: Report) -> dict[str, str]:
    """What the file says of itself; as long before as after its verification."""
    parity = report.parity
    verified = (
        f"float kernels {parity.float_differences}/{parity.float_elements}, integer kernels "
        f"{parity.integer_differences}/{parity.integer_elements}, onnxruntime {verify.RUNTIME}"
        if parity
        else ""
    )
    return {
        "onnx_eptq.version": report.version,
        "onnx_eptq.settings": padded(
            json.dumps({k: v for k, v in report.settings.items() if k not in SEARCH_SETTINGS}), 2 * METADATA_UNIT
        ),
        "onnx_eptq.coverage": padded(str(report.coverage), METADATA_UNIT),
        "onnx_eptq.parity": verified.ljust(PARITY_TEXT),
    }
