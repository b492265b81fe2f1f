"""Budgets in, files out: mixed precision from the API and from the command line, on the demo model."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from test_cli import cli
from test_equalize import PLACES

import onnx_eptq
from models import feeds
from onnx_eptq import front, pipeline, sensitivity
from onnx_eptq.config import Config
from onnx_eptq.errors import UsageError
from onnx_eptq.mixed import BUDGETS, Mixed
from onnx_eptq.plan import Plan
from onnx_eptq.targets import TARGETS

ROOT = Path(__file__).parents[1]
DIGITS, CALIB = ROOT / "models" / "digits.onnx", ROOT / "models" / "digits_calib"
QUICK = {"method": "rtn", "num_samples": 32, "threads": 1}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sensitivities that all tests share."""
    return tmp_path_factory.mktemp("sensitivities")


@pytest.fixture(scope="module")
def mixed(folder: Path) -> Mixed:
    return onnx_eptq.explore(DIGITS, CALIB, act_choices=(4, 8), sensitivity_cache=str(folder), **QUICK)


def uniform(mixed: Mixed, bits: int) -> dict[str, int]:
    return {group.name: bits for group in mixed.groups if bits in group.widths and group.role == "weight"}


@pytest.mark.parametrize(
    "budget",
    [
        {"max_size": 60_000},
        {"max_size": 58_250, "act_choices": (4, 8)},
        {"compression": 9.5},
        {"max_weight_bytes": 15_000, "max_activation_memory": 25_000, "act_choices": (4, 6, 8)},
        {"max_bops": 2e8, "act_choices": (4, 8), "weight_choices": (2, 4, 8)},
    ],
    ids=str,
)
def test_the_file_meets_the_budget_and_is_as_large_as_computed(tmp_path: Path, folder: Path, budget: dict) -> None:
    output = tmp_path / "q.onnx"
    result = onnx_eptq.quantize(DIGITS, CALIB, output, sensitivity_cache=str(folder), **QUICK, **budget)
    found = result.report.allocation
    assert found is not None
    assert all(use.used <= use.limit for use in found.budgets.values())
    assert len(set(found.weights.values())) > 1
    assert len(str(result.report).splitlines()) <= 40
    assert "budget     " in str(result.report)
    assert json.loads(result.report.to_json())["allocation"]["weights"] == found.weights
    if "max_size" in budget:
        assert found.budgets["file size"].used == output.stat().st_size == result.report.bytes
    codes = [t for t in onnx.load(output).graph.initializer if t.data_type in (2, 3, 22) and len(t.dims) != 0]
    weights = {p.value for p in result.plan.values() if p.role == "weight"}
    codes = [t for t in codes if not t.name.endswith("_zero_point")]
    stored = sum(len(t.raw_data) for t in codes if any(t.name.startswith(name) for name in weights))
    if "weight memory" in found.budgets:
        assert found.budgets["weight memory"].used == stored
    for name, bits in found.activations.items():
        assert result.plan[name].grid.bits == bits


def test_a_larger_budget_never_loses_more_and_no_run_is_needed(mixed: Mixed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline.calibrate, "observe", lambda *_: pytest.fail("samples were run"))
    losses = [mixed.choose(compression=ratio)[1].expected_loss for ratio in (15, 12, 8, 4.5)]
    assert losses == sorted(losses, reverse=True)
    points = mixed.front(6)
    assert [p.file_bytes for p in points] == sorted({p.file_bytes for p in points})
    found = [p.allocation.expected_loss for p in points]
    assert found == sorted(found, reverse=True)


def test_it_expects_less_loss_than_one_width_of_as_many_bytes(mixed: Mixed) -> None:
    for bits in (3, 4):
        _, even = mixed.evaluate(uniform(mixed, bits))
        _, found = mixed.choose(compression=32 / bits)
        assert found.expected_loss < even.expected_loss
        assert found.average_bits <= bits + 1e-9
        assert even.average_bits == bits
        assert not even.optimal


@pytest.mark.parametrize("bits", [4, 8])
def test_as_many_bytes_as_a_file_of_one_width_has_allow_that_width(tmp_path: Path, folder: Path, bits: int) -> None:
    settings = {**QUICK, "seed": 1, "num_samples": 32}
    even = onnx_eptq.quantize(DIGITS, CALIB, tmp_path / "even.onnx", weight_bits=bits, **settings).report
    settings |= {"sensitivity_cache": str(folder), "weight_choices": (2, 3, 4, 6, 8), "max_size": even.bytes}
    mixed = onnx_eptq.explore(DIGITS, CALIB, **settings)
    _, found = mixed.choose(max_size=even.bytes)
    assert mixed.evaluate(uniform(mixed, bits))[1].expected_loss >= found.expected_loss
    assert found.budgets["file size"].used <= even.bytes
    mixed_file = onnx_eptq.quantize(DIGITS, CALIB, tmp_path / "mixed.onnx", **settings)
    assert mixed_file.report.bytes <= even.bytes
    words = {p.key: p.value for p in onnx.load(tmp_path / "mixed.onnx").metadata_props}
    assert str(folder) not in words["onnx_eptq.settings"]
    assert json.loads(words["onnx_eptq.settings"])["seed"] == 1
    as_even = {n.name: n.widest if n.role != "weight" else bits for n in mixed.groups}
    assert mixed.sizes.file.use(as_even) == even.bytes


@pytest.mark.parametrize("name", ["conv", "depthwise"])
def test_channels_are_evened_out_for_the_widths_that_were_chosen(tmp_path: Path, name: str) -> None:
    """Where the budget leaves 3 bits alone, the file is the one that 3 bits everywhere give; 8 bits even out otherwise."""
    model = PLACES[name]
    data = {key: np.concatenate([feed[key] for feed in feeds(model, batch=32)]) for key in feeds(model)[0]}
    settings = {"method": "rtn", "threads": 1, "sensitivity_cache": tmp_path}
    even = onnx_eptq.quantize(model, data, weight_bits=3, **settings)
    wide = onnx_eptq.quantize(model, data, weight_bits=8, **settings).report.equalized
    found = onnx_eptq.explore(model, data, weight_choices=(3, 8), **settings)
    _, least = found.evaluate(uniform(found, 3), max_weight_bytes=1e9)
    budget = least.budgets["weight memory"].used
    mixed = onnx_eptq.quantize(model, data, weight_choices=(3, 8), max_weight_bytes=budget, **settings)
    assert set(mixed.report.allocation.weights.values()) == {3}
    assert mixed.report.equalized == even.report.equalized != wide
    assert mixed.model.graph.SerializeToString() == even.model.graph.SerializeToString()


def test_samples_are_run_once_where_the_chosen_widths_change_no_channel(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []
    original = pipeline.calibrate.observe
    monkeypatch.setattr(pipeline.calibrate, "observe", lambda *args: runs.append(1) or original(*args))
    settings = {**QUICK, "seed": 9, "compression": 8, "sensitivity_cache": str(folder)}
    assert not onnx_eptq.quantize(DIGITS, CALIB, **settings).report.equalized
    assert len(runs) == 1


@pytest.mark.parametrize(("gain", "even"), [(1.1, True), (1.5, False)])
def test_one_width_for_all_where_others_promise_too_little_to_tell(mixed: Mixed, gain: float, even: bool) -> None:
    """A small layer may have 4 bits for what a large one loses at 2, nothing; all others need 3."""
    sizes = {layer.weight.name: layer.weight.values.size for layer in pipeline.linear_layers(mixed.graph)}
    small, *others, _ = sorted(sizes, key=sizes.__getitem__)
    losses = {group.name: dict.fromkeys(group.widths, 0.0) for group in mixed.groups}
    losses[small] |= {2: 10.0, 3: gain - 1}
    losses[others[0]] = dict.fromkeys(losses[small], 1.0)
    for name in others:
        losses[name][2] = 10.0
    known = replace(mixed, losses=losses)
    _, found = known.choose(compression=32 / 3)
    assert (set(found.weights.values()) == {3}) == even
    assert found.least_loss <= found.expected_loss <= 1.2 * found.least_loss
    assert (found.least_loss < found.expected_loss) == even
    report = replace(onnx_eptq.quantize(DIGITS, CALIB, **QUICK).report, allocation=found)
    assert ("one width for all" in str(report)) == even


def test_two_budgets_hold_together(mixed: Mixed) -> None:
    _, found = mixed.choose(compression=8, max_bops=2e8)
    assert set(found.budgets) == {"weight memory", "bit operations"}
    assert all(use.used <= use.limit for use in found.budgets.values())


def test_the_plan_says_the_choice_and_takes_edits(tmp_path: Path, mixed: Mixed) -> None:
    plan, found = mixed.choose(compression=10)
    rows = json.loads(plan.to_json())["points"]
    by_value = {row["value"]: row for row in rows}
    layers = {layer.node.name: layer.weight.name for layer in pipeline.linear_layers(mixed.graph)}
    assert {name: by_value[layers[name]]["bits"] for name in layers} == found.weights
    first = layers[next(iter(layers))]
    by_value[first]["bits"] = 5
    edited = Plan.from_json(json.dumps({"version": 1, "points": rows}))
    result = onnx_eptq.quantize(DIGITS, CALIB, plan=edited, **QUICK)
    assert result.report.coverage.layers_by_bits[5] == 1
    assert result.report.allocation is None


def test_learning_runs_on_the_chosen_plan(tmp_path: Path, folder: Path) -> None:
    settings = {**QUICK, "method": "eptq", "steps": 2, "num_samples": 32, "sensitivity_cache": str(folder)}
    result = onnx_eptq.quantize(DIGITS, CALIB, tmp_path / "q.onnx", compression=12, **settings)
    assert result.report.learning is not None
    assert result.report.learning.steps > 0
    session = ort.InferenceSession(tmp_path / "q.onnx", providers=["CPUExecutionProvider"])
    data = np.load(ROOT / "models" / "digits_eval.npz")
    (logits,) = session.run(None, {"image": data["x"]})
    assert np.mean(logits.argmax(1) == data["y"]) > 0.9


def test_a_file_does_not_depend_on_what_was_measured_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranges are judged at the widths that are chosen, not at those that were looked at."""
    leanings, judged = [], pipeline.choose_leaning

    def recorded(job: pipeline.Job, *others: Any) -> None:
        judged(job, *others)
        leanings.append(sum(point.grid.bits for point in job.plan.values()))

    monkeypatch.setattr(pipeline, "choose_leaning", recorded)
    settings = {**QUICK, "sensitivity_cache": str(tmp_path), "act_choices": (4, 8), "max_activation_memory": 25_000}
    first, second = (onnx_eptq.quantize(DIGITS, CALIB, **settings) for _ in range(2))
    assert len(leanings) == 3
    assert leanings[0] > leanings[1] == leanings[2]
    values = [[t.raw_data for t in result.model.graph.initializer] for result in (first, second)]
    assert values[0] == values[1]


def test_what_was_measured_is_kept_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {**QUICK, "sensitivity_cache": str(tmp_path), "compression": 8}
    measured = []
    original = sensitivity.MEASURES["local"]

    def counted(setting, groups):
        for name, row in original(setting, groups):
            measured.append(name)
            if len(measured) == 5:
                raise KeyboardInterrupt
            yield name, row

    monkeypatch.setitem(sensitivity.MEASURES, "local", counted)
    with pytest.raises(KeyboardInterrupt):
        onnx_eptq.quantize(DIGITS, CALIB, **settings)
    done = measured[:4]  # and the fifth was not finished
    onnx_eptq.quantize(DIGITS, CALIB, **settings)
    assert not set(done) & set(measured[5:])
    count = len(measured)
    first = onnx_eptq.quantize(DIGITS, CALIB, **settings)
    assert len(measured) == count
    onnx_eptq.explore(DIGITS, CALIB, **{**settings, "compression": None, "weight_choices": (5, 8)})
    assert len(measured) > count  # five bits are new
    count = len(measured)
    for other in ({"num_samples": 31}, {"seed": 1}, {"calibration": "minmax"}):
        onnx_eptq.explore(DIGITS, CALIB, **{**settings, **other})
        assert len(measured) > count
        count = len(measured)
    assert first.report.allocation is not None


def test_several_bits_are_widths_to_choose_from() -> None:
    listed = Config.make(weight_bits=[2, 4], act_bits=(4, 8), compression=9)
    assert listed == Config.make(weight_choices=(2, 4), act_choices=(4, 8), compression=9)
    assert Config.make(weight_bits=[4]) == Config.make(weight_bits=4)
    with pytest.raises(UsageError, match="several widths need a budget"):
        onnx_eptq.quantize(DIGITS, CALIB, weight_bits=[4, 8])


def test_the_thorough_measure_is_its_own(folder: Path, mixed: Mixed) -> None:
    settings = {**QUICK, "num_samples": 16, "weight_choices": (2, 8), "sensitivity_cache": str(folder)}
    found = onnx_eptq.explore(DIGITS, CALIB, sensitivity="output", **settings)
    assert found.sensitivity == "output"
    rows = [found.losses[group.name] for group in found.groups if group.role == "weight"]
    assert all(row[2] > row[8] for row in rows)


REFUSED = {
    "widths without a budget": ({"weight_choices": (2, 4)}, "need a budget"),
    "a pattern of several widths without a budget": ({"bits": {"*": (2, 4)}}, "need a budget"),
    "a table without a limit": ({"cost_table": "x.json", "compression": 8}, "--cost-table needs --max-cost"),
    "a limit without a table": ({"max_cost": 3.0}, "needs a --cost-table"),
    "a table that is not there": ({"cost_table": "none.json", "max_cost": 3.0}, "cannot read the cost table"),
    "too small a file": (
        {"max_size": 3000},
        r"file size can be no less than 5\d,\d\d\d bytes, and 3,000 bytes are asked for",
    ),
    "too strong a compression": ({"compression": 17}, r"weight memory can be no less than 9,762 bytes"),
    "one width of activations": ({"max_activation_memory": 5000}, "activation memory can be no less than 43,008 bytes"),
    "a width the target lacks": ({"weight_choices": (2, 9), "compression": 8}, "not 9"),
    "a negative ratio": ({"compression": -1}, "compression"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_said_before_any_sample_is_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, message = REFUSED[name]
    monkeypatch.setattr(pipeline.calibrate, "observe", lambda *_: pytest.fail("samples were run"))
    with pytest.raises(UsageError, match=message):
        onnx_eptq.quantize(DIGITS, CALIB, **QUICK, **settings)


def test_a_plan_and_a_budget_exclude_each_other(mixed: Mixed) -> None:
    with pytest.raises(UsageError, match="says every width already"):
        onnx_eptq.quantize(DIGITS, CALIB, plan=mixed.plan, compression=8, **QUICK)
    with pytest.raises(UsageError, match="no budget 'max_weight'; known: compression"):
        mixed.choose(max_weight=3)
    assert set(BUDGETS) == set(pipeline.Config.make().model_dump()) & set(BUDGETS)


def test_the_target_is_obeyed(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    chip = replace(TARGETS["onnxruntime"], name="chip", op_bits={"Conv": (4, 8)})
    monkeypatch.setitem(TARGETS, "chip", chip)
    settings = {**QUICK, "target": "chip", "sensitivity_cache": str(folder)}
    result = onnx_eptq.quantize(DIGITS, CALIB, compression=7.5, **settings)
    assert result.report.allocation is not None
    assert set(result.report.coverage.layers_by_bits) <= {2, 3, 4, 8}
    convolutions = {n for n, b in result.report.allocation.weights.items() if "Conv" in n or "conv" in n}
    assert convolutions
    assert {result.report.allocation.weights[name] for name in convolutions} <= {4, 8}


def test_costs_of_a_table_are_met(tmp_path: Path, folder: Path) -> None:
    table = tmp_path / "costs.json"
    table.write_text(json.dumps({"unit": "us", "rows": [{"weight_bits": 8, "cost": 3}, {"cost": 1}]}))
    settings = {**QUICK, "sensitivity_cache": str(folder), "cost_table": str(table)}
    result = onnx_eptq.quantize(DIGITS, CALIB, max_cost=20, weight_choices=(4, 8), **settings)
    assert result.report.allocation is not None
    widths = list(result.report.allocation.weights.values())
    assert widths.count(8) == (20 - len(widths)) // 2
    assert "budget     cost: 20 of 20 us" in str(result.report)


# ---- the command line


def test_command_line_with_budgets(tmp_path: Path, folder: Path) -> None:
    output, plan = tmp_path / "q.onnx", tmp_path / "plan.json"
    budget = ["--bits", "2,4,8", "--act-bits", "4,8", "--max-size", "59.5KB", "--max-activation-memory", "25KB"]
    run = cli(
        DIGITS, CALIB, "-o", output, *budget, "--sensitivity-cache", folder, "--plan-out", plan, "--num-samples", 32
    )
    assert run.returncode == 0, run.stderr
    assert output.stat().st_size <= 59_500
    size = f"{output.stat().st_size:,}"
    assert re.search(rf"^budget +file size: {size} of 59,500 bytes$", run.stdout, re.MULTILINE)
    assert re.search(r"^widths +weights( [248])+ \(average", run.stdout, re.MULTILINE)
    bits = {row["bits"] for row in json.loads(plan.read_text())["points"] if row["role"] == "weight"}
    assert bits <= {2, 4, 8}
    assert len(bits) > 1
    again = tmp_path / "again.onnx"
    run = cli(DIGITS, CALIB, "-o", again, "--plan-in", plan, "--num-samples", 32, "-q")
    assert run.returncode == 0, run.stderr
    a, b = (onnx.load(path) for path in (output, again))
    assert [t.raw_data for t in a.graph.initializer] == [t.raw_data for t in b.graph.initializer]


def test_command_line_shows_the_front(tmp_path: Path, folder: Path) -> None:
    options = ["--points", 4, "--sensitivity-cache", folder, "--num-samples", 32, "--bits", "2,4,8"]
    run = cli("sensitivity", DIGITS, CALIB, *options)
    assert run.returncode == 0, run.stderr
    assert "stem.0.weight" in run.stdout
    assert "size against expected loss" in run.stdout
    assert re.search(r"file\W+weights\W+average", run.stdout)
    run = cli("sensitivity", DIGITS, CALIB, *options, "--json", "-q", "--max-size", "75000")
    found = json.loads(run.stdout)
    assert len(found["front"]) >= 3
    assert all(point["file_bytes"] <= 75_000 for point in found["front"])
    assert {int(bits) for row in found["quantizers"] for bits in row["loss"]} == {2, 4, 8}


def test_a_chart_is_drawn_where_matplotlib_is_and_asked_for_where_it_is_not(tmp_path: Path, mixed: Mixed) -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        with pytest.raises(UsageError, match="pip install matplotlib"):
            front.check_chart(tmp_path / "front.png")
        return
    front.check_chart(tmp_path / "front.png")
    front.chart(mixed.front(3), tmp_path / "front.png")
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UsageError, match="folder does not exist"):
        front.check_chart(tmp_path / "none" / "front.png")


def test_several_widths_by_pattern(folder: Path) -> None:
    bits = ["--bits", "stem*=8", "--bits", "/stem/stem.0/Conv=8", "-w", "2,4", "--compression", 9]
    run = cli(DIGITS, CALIB, "--dry-run", "--json", *bits, "--sensitivity-cache", folder)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found["coverage"]["layers_by_bits"] == {"4": 13, "8": 1}
    assert any("widest bits allowed" in warning for warning in found["warnings"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bits", "2,x", "--compression", 8], "takes a number of bits"),
        (["--bits", "2,4", "-w", "2,8", "--compression", 8], "given twice"),
        (["--max-size", "many"], "300KB"),
        (["--max-bops", "1Q"], "1.5G"),
    ],
    ids=str,
)
def test_wrong_budgets_are_one_sentence(tmp_path: Path, arguments: list[object], message: str) -> None:
    run = cli(DIGITS, CALIB, "-o", tmp_path / "q.onnx", *arguments)
    assert run.returncode == 2, run.stderr
    assert "Traceback" not in run.stderr
    assert message in run.stderr


def test_a_budget_where_everything_is_kept_float_is_refused() -> None:
    with pytest.raises(UsageError, match="no bits to choose"):
        onnx_eptq.quantize(DIGITS, CALIB, compression=2, keep_float=("*",), **QUICK)
