"""Every option reaches its setting, and every setting what it is for."""

import inspect
import itertools
import logging
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from models import parse, weights
from onnx_eptq import Config, cli, front, pipeline, sensitivity
from onnx_eptq import graph as graphs
from onnx_eptq.errors import UsageError
from onnx_eptq.report import Phases

DIGITS = Path(__file__).parent.parent / "models" / "digits.onnx"
CALIB = DIGITS.parent / "digits_calib"

# Per parameter of the command: arguments, and the settings that they make.
OPTIONS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "weight_bits": [("-w 4", {"weight_bits": 4}), ("-w 2,4 --compression 9", {"weight_choices": (2, 4)})],
    "act_bits": [("-a 5", {"act_bits": 5}), ("--act-bits 4,8 --max-bops 1G", {"act_choices": (4, 8)})],
    "method": [("--method adaround", {"method": "adaround"})],
    "effort": [("--effort fast", {"effort": "fast"})],
    "steps": [("--steps 7", {"steps": 7})],
    "target": [("--target onnx", {"target": "onnx"})],
    "storage": [("--storage lut", {"storage": "lut"})],
    "opset": [("--opset 17", {"opset": 17})],
    "strip_notes": [("--strip-notes", {"strip_notes": True}), ("--keep-notes", {"strip_notes": False})],
    "calibration": [("--calibration mse", {"calibration": "mse"})],
    "weight_calibration": [("--weight-calibration absmax", {"weight_calibration": "absmax"})],
    "bias_correction": [
        ("--no-bias-correction", {"bias_correction": False}),
        ("--bias-correction", {"bias_correction": True}),
    ],
    "equalize": [("--no-equalize", {"equalize": False}), ("--equalize", {"equalize": True})],
    "bits": [("--bits conv*=8 --bits fc=4", {"bits": {"conv*": 8, "fc": 4}}), ("--bits 3", {"weight_bits": 3})],
    "keep_float": [("--keep-float Gemm --keep-float a*", {"keep_float": ("Gemm", "a*")})],
    "compression": [("--compression 8", {"compression": 8.0})],
    "max_weight_bytes": [("--max-weight-bytes 60KB", {"max_weight_bytes": 60_000})],
    "max_size": [("--max-size 58KiB", {"max_size": 59_392})],
    "max_activation_memory": [("--max-activation-memory 1.5MB", {"max_activation_memory": 1_500_000})],
    "max_bops": [("--max-bops 1.5G", {"max_bops": 1.5e9})],
    "cost_table": [("--cost-table costs.json --max-cost 3", {"cost_table": "costs.json"})],
    "max_cost": [("--cost-table costs.json --max-cost 3", {"max_cost": 3.0})],
    "sensitivity": [("--sensitivity output", {"sensitivity": "output"})],
    "sensitivity_cache": [("--sensitivity-cache folder", {"sensitivity_cache": "folder"})],
    "solver_seconds": [("--solver-seconds 5", {"solver_seconds": 5.0})],
    "num_samples": [("--num-samples 12", {"num_samples": 12})],
    "batch_size": [("--batch-size 3", {"batch_size": 3})],
    "preset": [("--preset imagenet", {"preset": "imagenet"})],
    "scale": [("--scale 1", {"scale": 1.0})],
    "mean": [("--mean 1,2,3", {"mean": (1.0, 2.0, 3.0)})],
    "std": [("--std 4,5,6", {"std": (4.0, 5.0, 6.0)})],
    "resize": [("--resize 20x30", {"resize": "20x30"})],
    "crop": [("--crop 24", {"crop": "24"})],
    "color": [("--color bgr", {"color": "bgr"})],
    "layout": [("--layout nhwc", {"layout": "nhwc"})],
    "views": [("--views 2", {"views": 2})],
    "cache_mb": [("--cache-mb 5", {"cache_mb": 5})],
    "compile": [("--compile", {"compile": True})],
    "precision": [("--precision bfloat16", {"precision": "bfloat16"})],
    "random_calibration": [("--random-calibration", {"random_calibration": True})],
    "random_shapes": [("--random-calibration --random-shape x=1x2", {"random_shapes": {"x": (1, 2)}})],
    "seed": [("--seed 9", {"seed": 9})],
    "threads": [("--threads 1", {"threads": 1})],
    "device": [("--device cuda", {"device": "cuda"})],
}
OF_THE_RUN = {  # which the other tests of the command line are about
    *(
        "model",
        "data",
        "output",
        "plan_in",
        "plan_out",
        "resume",
        "dry_run",
        "strict",
        "config",
        "save_config",
        "as_json",
    ),
    *("verbose", "quiet", "version"),
}


class Stopped(Exception):
    """Raised where a run would begin."""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A function from arguments to the `Config` that the command would run with."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "costs.json").write_text('{"rows": []}')
    seen: list[Config] = []

    def stop(*_: Any, config: Config, **__: Any) -> None:
        seen.append(config)
        raise Stopped

    monkeypatch.setattr(pipeline, "quantize", stop)
    monkeypatch.setattr(pipeline, "explore", stop)

    def run(arguments: list[str], app: Any = cli.app) -> Config:
        data = [] if "--random-calibration" in arguments else [str(CALIB)]
        result = CliRunner().invoke(app, [str(DIGITS), *data, *arguments])
        assert isinstance(result.exception, Stopped), result.output
        return seen.pop()

    return run


def test_every_option_is_looked_at() -> None:
    assert set(inspect.signature(cli.quantize).parameters) == set(OPTIONS) | OF_THE_RUN


@pytest.mark.parametrize(
    ("arguments", "settings"), [pytest.param(*row, id=row[0]) for rows in OPTIONS.values() for row in rows]
)
def test_options_reach_their_settings(asked: Any, arguments: str, settings: dict[str, Any]) -> None:
    config = asked(arguments.split())
    assert {name: getattr(config, name) for name in settings} == settings


@pytest.mark.parametrize("option", ["--keep-notes", "--bias-correction", "--equalize"])
def test_switches_win_over_the_config(asked: Any, tmp_path: Path, option: str) -> None:
    (tmp_path / "run.yaml").write_text("strip_notes: true\nbias_correction: false\nequalize: false\n")
    usual = {"strip_notes": False, "bias_correction": True, "equalize": True}
    config = asked(["--config", "run.yaml", option])
    changed = {name for name, value in usual.items() if getattr(config, name) == value}
    assert changed == {"--keep-notes": {"strip_notes"}}.get(option, {option[2:].replace("-", "_")})


def test_settings_of_a_file_may_be_written_as_options_are() -> None:
    config = Config.make(max_size="60KB", max_bops="1.5G", mean=0.5, std="0.1, 0.2, 0.3", keep_float="Gemm")
    assert (config.max_size, config.max_bops) == (60_000, 1.5e9)
    assert (config.mean, config.std, config.keep_float) == ((0.5,), (0.1, 0.2, 0.3), ("Gemm",))
    for wrong, message in (({"max_size": "60XB"}, "max_size: .* such as 300000"), ({"mean": "a,b"}, "mean: .*number")):
        with pytest.raises(UsageError, match=message):
            Config.make(**wrong)


@pytest.mark.parametrize("size", ["1e400", "6XB", "-3"])
def test_sizes_that_are_none_are_refused(size: str) -> None:
    result = CliRunner().invoke(cli.app, [str(DIGITS), str(CALIB), f"--max-size={size}"])
    assert isinstance(result.exception, UsageError)
    assert f"--max-size: input should be a number, such as 300000, 300KB, 293KiB or 1.5G, not '{size}'" in str(
        result.exception
    )


# ---- what the settings do


def image_model(shape: str) -> Any:
    text = f"(float[{shape}] x) => (float y) {{ h = Conv(x, w) y = Relu(h) }}"
    return parse(text, w=weights(0)(2, 3, 1, 1))


def fed(folder: Path, shape: str, **settings: Any) -> np.ndarray:
    batches = pipeline.open_batches(graphs.load(image_model(shape)), folder, Config.make(**settings))
    return next(iter(batches))["x"]


def test_colour_order_and_layout_are_heeded(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 4, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    (rgb,) = fed(tmp_path, "N,3,3,4")
    (bgr,) = fed(tmp_path, "N,3,3,4", color="bgr")
    np.testing.assert_array_equal(bgr, rgb[::-1])
    (last,) = fed(tmp_path, "N,A,B,C", layout="nhwc", resize="3x4")
    np.testing.assert_array_equal(last, rgb.transpose(1, 2, 0))


def test_settings_of_the_search_are_heeded() -> None:
    job = pipeline.begin(DIGITS, CALIB, compression=8, solver_seconds=7.0, sensitivity="output", threads=1)
    mixed = pipeline.unmeasured(job)
    assert (mixed.solver_seconds, mixed.sensitivity) == (7.0, "output")


def test_settings_of_learning_are_heeded() -> None:
    chosen = {"compile": True, "precision": "bfloat16", "views": 3, "cache_mb": 7, "seed": 5, "steps": 11, "threads": 1}
    job = pipeline.begin(DIGITS, CALIB, calibration="minmax", num_samples=8, method="adaquant", **chosen)
    problem = pipeline.learning_problem(job, pipeline.calibrated(job, Phases()))
    assert (problem.compile, problem.bf16, problem.views, problem.seed) == (True, True, 3, 5)
    assert (problem.cache_bytes, problem.effort.steps) == (7 * 2**20, 11)


def test_settings_of_learning_without_learning_are_warned_about() -> None:
    chosen = {"method": "rtn", "threads": 1}
    assert pipeline.begin(DIGITS, CALIB, **chosen).report.warnings == []
    (warning,) = pipeline.begin(DIGITS, CALIB, steps=9, compile=True, **chosen).report.warnings
    assert warning == "steps, compile: settings of learning, and --method rtn learns nothing"


def test_what_is_kept_for_the_next_budget_has_a_place_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", fail)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert sensitivity.default_folder() == Path(tempfile.gettempdir()) / ".cache" / "onnx-eptq"


def test_the_estimate_knows_how_long_learning_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = [pipeline.begin(DIGITS, CALIB, steps=steps, threads=1) for steps in (10, 110, 1010)]
    monkeypatch.setattr(pipeline.time, "perf_counter", itertools.count().__next__)  # a batch takes one second
    few, some, many = (pipeline.estimate(job)["seconds"] for job in jobs)
    assert many - few == pytest.approx(10 * (some - few))
    assert some - few > 100  # a step is dearer than a run of the batch


def test_verbose_runs_say_more(caplog: pytest.LogCaptureFixture) -> None:
    model = parse("(float[N,4] x) => (float[N,3] y) { t = Transpose(w) y = MatMul(x, t) }", w=weights(0)(3, 4))
    with caplog.at_level(logging.INFO, "onnx_eptq"):
        pipeline.begin(model, {"x": np.random.default_rng(0).random((40, 4), np.float32)}, method="rtn")
    assert "fold_constants: 1" in caplog.text


@pytest.mark.parametrize(("flags", "level"), [([], "WARNING"), (["-v"], "INFO"), (["-vv"], "DEBUG"), (["-q"], "ERROR")])
def test_how_much_is_said_can_be_chosen(asked: Any, flags: list[str], level: str) -> None:
    logger = logging.getLogger("onnx_eptq")
    before = logger.level
    try:
        asked(flags)
        assert logging.getLevelName(logger.level) == level
    finally:
        logger.setLevel(before)


def test_the_chart_of_the_other_command_is_drawn_where_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    drawn: list[Any] = []
    found = pipeline.explore(DIGITS, CALIB, num_samples=8, calibration="minmax", threads=1, sensitivity_cache=tmp_path)
    monkeypatch.setattr(pipeline, "explore", lambda *_, **__: found)
    monkeypatch.setattr(front, "check_chart", lambda path: drawn.append(path))
    monkeypatch.setattr(front, "chart", lambda rows, path: drawn.append((len(rows) > 1, path)))
    result = CliRunner().invoke(cli.explorer, [str(DIGITS), str(CALIB), "--chart", "front.svg", "--points", "4"])
    assert result.exit_code == 0, result.output
    assert drawn == [Path("front.svg"), (True, Path("front.svg"))]
