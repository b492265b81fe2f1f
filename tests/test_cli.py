"""The command line in a subprocess: what it prints, what it writes, its exit codes, one sentence per mistake."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import yaml

from models import parse

ROOT = Path(__file__).parents[1]
DIGITS, CALIB = ROOT / "models" / "digits.onnx", ROOT / "models" / "digits_calib"
Run = subprocess.CompletedProcess[str]


def cli(*arguments: object, cwd: Path | None = None) -> Run:
    """Run the command line, without learning unless a method is given."""
    plain = () if "--method" in arguments or arguments[0] == "sensitivity" else ("--method", "rtn")
    command = [sys.executable, "-m", "onnx_eptq", *map(str, arguments), *plain]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, timeout=300)


def test_quantizes_and_reports(tmp_path: Path) -> None:
    output, plan, config = tmp_path / "q.onnx", tmp_path / "plan.json", tmp_path / "run.yaml"
    run = cli(
        DIGITS, CALIB, "-o", output, "-w", 4, "-a", 8, "--plan-out", plan, "--save-config", config, "--threads", 1
    )
    assert run.returncode == 0, run.stderr
    onnx.checker.check_model(output, full_check=True)
    lines = run.stdout.splitlines()
    assert len(lines) + len(run.stderr.splitlines()) <= 40
    for word in ("coverage", "data", "time", "size", "parity", "fidelity", "written"):
        assert any(line.startswith(word) for line in lines), word
    assert re.search(r"coverage +(\d+) of \1 layers \(\1 x 4 bit\)", run.stdout)
    phases = [line.split()[0] for line in run.stderr.splitlines()]
    assert phases == ["prepare", "plan", "equalize", "calibrate", "ranges", "weights", "verify", "compare"]
    assert json.loads(plan.read_text())["points"]
    assert yaml.safe_load(config.read_text())["weight_bits"] == 4

    again = tmp_path / "again.onnx"
    run = cli(DIGITS, CALIB, "-o", again, "--config", config, "--plan-in", plan, "-q")
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
    assert again.read_bytes() == output.read_bytes()


def test_json_report(tmp_path: Path) -> None:
    run = cli(DIGITS, CALIB, "-o", tmp_path / "q.onnx", "--json", "--num-samples", 32)
    report = json.loads(run.stdout)
    assert report["coverage"]["quantized_layers"] == report["coverage"]["layers"]
    assert report["parity"]["basic_equals_off"] is True
    assert report["samples"] == 32
    quiet = cli(DIGITS, CALIB, "-o", tmp_path / "q.onnx", "--json", "-q", "--num-samples", 32)
    assert quiet.stderr == ""
    assert json.loads(quiet.stdout)["coverage"] == report["coverage"]


def test_dry_run_writes_nothing(tmp_path: Path) -> None:
    run = cli(DIGITS, CALIB, "-o", tmp_path / "q.onnx", "--dry-run", "-w", 4)
    assert run.returncode == 0, run.stderr
    assert re.search(r"^estimate +\d+ s, \d+ MB", run.stdout, re.MULTILINE)
    assert re.search(r"^weight +int4", run.stdout, re.MULTILINE)
    assert list(tmp_path.iterdir()) == []


def test_default_output_lies_beside_the_model(tmp_path: Path) -> None:
    (tmp_path / "net.onnx").write_bytes(DIGITS.read_bytes())
    assert cli("net.onnx", CALIB, "-w", 4, "-q", "--num-samples", 16, cwd=tmp_path).returncode == 0
    assert (tmp_path / "net_int4.onnx").exists()


def test_strict_and_kept_layers(tmp_path: Path) -> None:
    run = cli(DIGITS, CALIB, "-o", tmp_path / "q.onnx", "--keep-float", "Gemm", "--strict")
    assert run.returncode == 7
    assert "kept float as asked" in run.stderr
    run = cli(DIGITS, CALIB, "-o", tmp_path / "q.onnx", "--keep-float", "Gemm", "--num-samples", 16)
    assert run.returncode == 0
    assert re.search(r"float +.*: kept float as asked", run.stdout)


def test_version_and_help_answer_without_torch() -> None:
    assert cli("--version").stdout.startswith("onnx-eptq ")
    text = cli("--help").stdout
    assert "Exit codes" in text
    code = "import sys, onnx_eptq.cli; sys.exit('torch' in sys.modules or 'onnxruntime' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def _truncated(folder: Path) -> tuple[object, ...]:
    (folder / "t.onnx").write_bytes(DIGITS.read_bytes()[:9000])
    return folder / "t.onnx", CALIB


def _text(folder: Path) -> tuple[object, ...]:
    (folder / "t.onnx").write_text("this is no model")
    return folder / "t.onnx", CALIB


def _no_weights(folder: Path) -> tuple[object, ...]:
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[N,1,4,4] x) => (float[N,1,4,4] y) {y = Relu(x)}'
    )
    onnx.save(model, folder / "t.onnx")
    return folder / "t.onnx", CALIB


def _empty_folder(folder: Path) -> tuple[object, ...]:
    (folder / "empty").mkdir()
    return DIGITS, folder / "empty"


def _wrong_shape(folder: Path) -> tuple[object, ...]:
    np.save(folder / "x.npy", np.zeros((8, 3, 16, 16), np.float32))
    return DIGITS, folder / "x.npy"


def _wrong_dtype(folder: Path) -> tuple[object, ...]:
    np.save(folder / "x.npy", np.full((8, 1, 16, 16), "a"))
    return DIGITS, folder / "x.npy"


def _wrong_name(folder: Path) -> tuple[object, ...]:
    np.savez(folder / "x.npz", a=np.zeros((8, 1, 16, 16), np.float32), b=np.zeros(8))
    return DIGITS, folder / "x.npz"


@pytest.mark.parametrize(
    ("make", "code", "message"),
    [
        (lambda folder: (folder / "none.onnx", CALIB), 3, "none.onnx"),
        (_truncated, 3, "t.onnx"),
        (_text, 3, "t.onnx"),
        (_no_weights, 3, "no Conv, ConvTranspose, Gemm or MatMul with constant weights"),
        (lambda folder: (folder, CALIB), 3, "folder|director"),
        (lambda folder: (DIGITS, folder / "none"), 4, "none"),
        (_empty_folder, 4, "empty"),
        (_wrong_shape, 4, "3"),
        (_wrong_dtype, 4, "x.npy|dtype|type"),
        (_wrong_name, 4, "image"),
        (lambda folder: (DIGITS,), 2, "--random-calibration"),
        (lambda folder: (DIGITS, CALIB, "--random-calibration"), 2, "exclude each other"),
        (lambda folder: (DIGITS, CALIB, "-w", 1), 2, "weight_bits"),
        (lambda folder: (DIGITS, CALIB, "-w", "four"), 2, "--weight-bits"),
        (lambda folder: (DIGITS, CALIB, "--method", "magic"), 2, "magic"),
        (lambda folder: (DIGITS, CALIB, "--mean", "a,b"), 2, "--mean"),
        (lambda folder: (DIGITS, CALIB, "--mean", "1,2,3"), 4, "mean|3|channel"),
        (lambda folder: (DIGITS, CALIB, "--std", "0"), 2, "std"),
        (lambda folder: (DIGITS, CALIB, "--crop", "8"), 4, "8"),
        (lambda folder: (DIGITS, CALIB, "--bits", "conv1"), 2, "PATTERN=BITS"),
        (lambda folder: (DIGITS, CALIB, "--plan-in", folder / "none"), 2, "cannot read"),
        (lambda folder: (DIGITS, CALIB, "--config", folder / "none"), 2, "cannot read"),
        (lambda folder: (DIGITS, CALIB, "--no-such-option"), 2, "no-such-option"),
        (lambda folder: (DIGITS, CALIB, "-o", folder / "no" / "q.onnx"), 5, "does not exist"),
        (lambda folder: (DIGITS, CALIB, "-o", DIGITS), 5, "input model itself"),
        (lambda folder: (DIGITS, CALIB, "-o", folder), 5, "folder"),
    ],
)
def test_one_sentence_and_an_exit_code_per_mistake(tmp_path: Path, make: object, code: int, message: str) -> None:
    arguments = make(tmp_path)  # type: ignore[operator]
    if "-o" not in arguments:
        arguments = (*arguments, "-o", tmp_path / "q.onnx")
    run = cli(*arguments)
    assert run.returncode == code, run.stderr
    assert "Traceback" not in run.stderr
    assert re.search(message, run.stderr), run.stderr
    assert not (tmp_path / "q.onnx").exists()
    if code != 2:
        (line,) = [line for line in run.stderr.splitlines() if line.startswith("error: ")]
        assert len(line) < 500


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_folder_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert cli(DIGITS, CALIB, "-o", tmp_path / "q.onnx").returncode == 5


QUICK = ("--method", "rtn", "--num-samples", 16, "--threads", 1)


def test_a_plan_says_the_widths_alone(tmp_path: Path) -> None:
    plan, out = tmp_path / "plan.json", tmp_path / "q.onnx"
    assert cli(DIGITS, CALIB, "-o", out, "-w", 4, "--plan-out", plan, *QUICK).returncode == 0
    for wrong in (("-w", 8), ("-a", 4), ("--bits", "stem*=8"), ("--keep-float", "Conv")):
        run = cli(DIGITS, CALIB, "-o", out, "--plan-in", plan, *wrong, *QUICK)
        assert run.returncode == 2
        assert "edit it instead" in run.stderr
    (tmp_path / "net.onnx").write_bytes(DIGITS.read_bytes())
    run = cli("net.onnx", CALIB, "--plan-in", plan, *QUICK, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "net_quantized.onnx").exists()


def test_a_plan_without_a_bias_is_refused(tmp_path: Path) -> None:
    plan, out = tmp_path / "plan.json", tmp_path / "q.onnx"
    assert cli(DIGITS, CALIB, "-o", out, "--dry-run", "--plan-out", plan, *QUICK).returncode == 0
    edited = json.loads(plan.read_text())
    bias = next(row for row in edited["points"] if row["role"] == "bias")
    edited["points"].remove(bias)
    plan.write_text(json.dumps(edited))
    run = cli(DIGITS, CALIB, "-o", out, "--plan-in", plan, *QUICK)
    assert run.returncode == 2
    assert f"'{bias['value']}' is the bias of" in run.stderr
    assert not out.exists()


def test_widths_win_over_those_of_a_config_with_a_budget(tmp_path: Path) -> None:
    config, out = tmp_path / "run.yaml", tmp_path / "q.onnx"
    config.write_text("compression: 3\nweight_choices: [2, 4]\n")
    run = cli(DIGITS, CALIB, "-o", out, "--config", config, "-w", 8, *QUICK)
    assert run.returncode == 0, run.stderr
    assert "14 x 8 bit" in run.stdout


def test_widths_of_layers_come_on_top_of_those_in_a_config(tmp_path: Path) -> None:
    config, plan = tmp_path / "run.yaml", tmp_path / "plan.json"
    config.write_text("bits: {'/blocks*': 4, '/stem*': 3}\nweight_bits: 8\n")
    run = cli(
        DIGITS, CALIB, "-o", tmp_path / "q.onnx", "--config", config, "--bits", "/stem*=5", "--plan-out", plan, *QUICK
    )
    assert run.returncode == 0, run.stderr
    assert "(9 x 4 bit, 1 x 5 bit, 4 x 8 bit)" in run.stdout


def test_random_calibration_can_come_from_a_config(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    first = cli(DIGITS, "-o", tmp_path / "a.onnx", "--random-calibration", "--save-config", config, *QUICK)
    second = cli(DIGITS, "-o", tmp_path / "b.onnx", "--config", config)
    assert first.returncode == second.returncode == 0, second.stderr
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_random_samples_take_the_sizes_that_the_model_leaves_open(tmp_path: Path) -> None:
    conv = parse(
        "(float[N,1,H,W] image) => (float[N,2,P,Q] y) { y = Conv(image, w) }", w=np.ones((2, 1, 3, 3), np.float32)
    )
    onnx.save(conv, tmp_path / "m.onnx")
    run = cli("m.onnx", "--random-calibration", *QUICK, cwd=tmp_path)
    assert run.returncode == 4
    assert "--random-shape image=1x" in run.stderr
    run = cli("m.onnx", "--random-calibration", "--random-shape", "image=1x1x9x7", *QUICK, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert " of 560 in integer kernels" in run.stdout  # the 8 samples of verification, 2 x 7 x 5 numbers each
    for shapes, message in ((["image=1x1xH"], "takes INPUT=DIMS"), (["img=1x1x9x7"], "no input of the model")):
        run = cli("m.onnx", "--random-calibration", "--random-shape", *shapes, *QUICK, cwd=tmp_path)
        assert run.returncode == 2
        assert message in run.stderr
    run = cli(DIGITS, CALIB, "-o", tmp_path / "q.onnx", "--random-shape", "image=1x1x9x7", *QUICK)
    assert run.returncode == 2
    assert "beside calibration data" in run.stderr


def test_sensitivity_heeds_the_default_width_too(tmp_path: Path) -> None:
    run = cli(
        "sensitivity", DIGITS, CALIB, "-w", 8, "--points", 2, "--sensitivity-cache", tmp_path, "--num-samples", 16
    )
    assert run.returncode == 0, run.stderr
    assert "8 bit" in run.stdout
    assert "4 bit" not in run.stdout


def test_rounding_leaves_the_checkpoint_of_learning_alone(tmp_path: Path) -> None:
    out, checkpoint = tmp_path / "q.onnx", tmp_path / "q.onnx.checkpoint"
    checkpoint.write_bytes(b"of another run")
    run = cli(DIGITS, CALIB, "-o", out, "--resume", *QUICK)
    assert run.returncode == 2
    assert "--method rtn learns nothing" in run.stderr
    assert cli(DIGITS, CALIB, "-o", out, *QUICK).returncode == 0
    assert checkpoint.read_bytes() == b"of another run"


def test_what_cannot_be_written_is_said_first(tmp_path: Path) -> None:
    run = cli(DIGITS, CALIB, "-o", tmp_path / "q.onnx", "--plan-out", tmp_path, *QUICK)
    assert run.returncode == 2
    assert "it is a folder" in run.stderr
    assert not (tmp_path / "q.onnx").exists()


@pytest.mark.parametrize("wrong", ["²", "٤", "4,²"])
def test_digits_are_ascii(wrong: str) -> None:
    run = cli(DIGITS, CALIB, "-w", wrong)
    assert run.returncode == 2
    assert "takes a number of bits" in run.stderr


@pytest.mark.parametrize("cost", ["NaN", "-1", "Infinity"])
def test_costs_are_amounts(tmp_path: Path, cost: str) -> None:
    table = tmp_path / "costs.json"
    table.write_text('{"rows": [{"op": "Conv", "weight_bits": 4, "act_bits": 8, "cost": ' + cost + "}]}")
    run = cli(DIGITS, CALIB, "--cost-table", table, "--max-cost", 5, *QUICK)
    assert run.returncode == 2
    assert "which is no amount" in run.stderr


def test_a_config_with_numbers_for_names(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("1: 2\n")
    run = cli(DIGITS, CALIB, "--config", config)
    assert run.returncode == 2
    assert "there is no setting '1'" in run.stderr


def test_files_of_a_run_never_replace_one_another(tmp_path: Path) -> None:
    model, out, data = tmp_path / "m.onnx", tmp_path / "q.onnx", tmp_path / "x.npy"
    plan, config, table = (tmp_path / name for name in ("plan.json", "run.yaml", "costs.json"))
    shutil.copy(DIGITS, model)
    np.save(data, np.zeros((2, 1, 8, 8), np.float32))
    plan.write_text("{}")
    config.write_text("seed: 1\n")
    table.write_text('{"rows": []}')
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    asked = ["--plan-in", plan, "--config", config, "--cost-table", table, "--max-cost", 5]
    for option in ("--plan-out", "--save-config"):
        others = {"the model": model, "-o": out, "the data": data}
        for other, path in {**others, "--plan-in": plan, "--config": config, "--cost-table": table}.items():
            run = cli(model, data, "-o", out, option, path, *asked)
            assert run.returncode == 2
            assert f"{option} and {other} name the same file" in run.stderr
    for other, path in (("--plan-in", plan), ("--config", config), ("--cost-table", table)):
        run = cli(model, data, "-o", path, *asked)
        assert run.returncode == 2
        assert f"-o and {other} name the same file" in run.stderr
    run = cli(model, data, "--plan-out", tmp_path / "m_int8.onnx", *QUICK)
    assert "--plan-out and -o name the same file" in run.stderr
    run = cli(model, CALIB, "-o", out, "--plan-out", tmp_path / "p", "--save-config", tmp_path / "p", *QUICK)
    assert "--save-config and --plan-out name the same file" in run.stderr
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_weights_beside_a_model_are_kept(tmp_path: Path) -> None:
    model, weights = tmp_path / "m.onnx", tmp_path / "weights.bin"
    outside = {"save_as_external_data": True, "location": weights.name, "size_threshold": 16}
    onnx.save(onnx.load(DIGITS), model, **outside)
    before = weights.read_bytes()
    for option in ("--plan-out", "--save-config"):
        run = cli(model, CALIB, "-o", tmp_path / "q.onnx", option, weights, *QUICK)
        assert run.returncode == 2
        assert f"{option} and the model's weights weights.bin name the same file" in run.stderr
    assert weights.read_bytes() == before
    (tmp_path / "no.onnx").write_bytes(b"no model")
    assert cli(tmp_path / "no.onnx", CALIB, "--save-config", tmp_path / "c", *QUICK).returncode == 3


@pytest.mark.parametrize("part", ["checkpoint", "data"])
def test_files_beside_the_output_are_no_place_for_others(tmp_path: Path, part: str) -> None:
    run = cli(DIGITS, CALIB, "-o", tmp_path / "q.onnx", "--save-config", tmp_path / f"q.onnx.{part}", *QUICK)
    assert run.returncode == 2
    assert f"--save-config and -o's {part} name the same file" in run.stderr


def test_a_run_that_is_terminated_leaves_nothing_behind(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "onnx_eptq",
        str(DIGITS),
        str(CALIB),
        "-o",
        "q.onnx",
        "--steps",
        "5000",
        "--threads",
        "1",
    ]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    while not process.stderr.readline().startswith("weights"):
        assert process.poll() is None
    process.terminate()
    _, text = process.communicate(timeout=60)
    assert process.returncode in (130, -signal.SIGTERM)
    assert "Traceback" not in text
    assert {path.name for path in tmp_path.iterdir()} <= {"q.onnx.checkpoint"}


def test_a_name_that_is_too_long_is_said(tmp_path: Path) -> None:
    run = cli(DIGITS, CALIB, "--plan-out", tmp_path / ("p" * 300), *QUICK)
    assert run.returncode == 2
    assert "File name too long" in run.stderr
    assert "Traceback" not in run.stderr


def test_an_output_that_is_no_regular_file_is_refused_and_a_link_is_followed(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    run = cli(DIGITS, CALIB, "-o", tmp_path / "pipe", *QUICK)
    assert run.returncode == 5
    assert "no regular file" in run.stderr
    (tmp_path / "there").mkdir()
    target, link = tmp_path / "there" / "q.onnx", tmp_path / "link.onnx"
    link.symlink_to(target)
    for _ in range(2):  # a link that leads nowhere yet, and one to an older file
        assert cli(DIGITS, CALIB, "-o", link, *QUICK).returncode == 0
        assert link.is_symlink()
        onnx.checker.check_model(target)
    assert [path.name for path in target.parent.iterdir()] == ["q.onnx"]
