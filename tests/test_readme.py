"""The README's commands and examples do what it says."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

from onnx_eptq.data import PRESETS
from onnx_eptq.targets import TARGETS
from onnx_eptq.write import STORAGE

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder that looks like the checkout to commands that read the demo."""
    shutil.copytree(ROOT / "models", tmp_path / "models", ignore=shutil.ignore_patterns("*.py"))
    return tmp_path


def first_word(line: str) -> str:
    """Which line it is; one that starts with a count is known by that alone."""
    return re.sub(r"\d+", "0", line.split()[0])


def test_the_first_command_quantizes_the_demo_and_prints_what_is_shown(checkout: Path) -> None:
    command = blocks("sh")[0].split("&&")[-1]
    program, *arguments = shlex.split(command)
    assert program == "onnx-eptq"
    run = subprocess.run(
        [sys.executable, "-m", "onnx_eptq", *arguments], cwd=checkout, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    onnx.checker.check_model(checkout / "digits_int4.onnx", full_check=True)
    shown, printed = blocks("text")[0].splitlines(), run.stdout.splitlines()
    assert [first_word(line) for line in shown] == [first_word(line) for line in printed]
    assert shown[0] == printed[0]  # coverage; times and the last digits of the rest depend on the machine


def test_the_second_command_is_what_ci_runs() -> None:
    command = blocks("sh")[1].strip()
    script = (ROOT / ".ci" / "run").read_text()
    for part in (command.split("&&")[-1].strip(), '-c constraints.txt -e ".[test,models]"'):
        assert part in command
        assert part in script


def test_the_commands_for_mixed_precision_run(checkout: Path) -> None:
    for line in blocks("sh")[2].splitlines():
        program, *arguments = shlex.split(line)
        assert program == "onnx-eptq"
        more = ["--sensitivity-cache", checkout / "cache", "--num-samples", "32"]
        more += [] if arguments[0] == "sensitivity" else ["--method", "rtn"]
        command = [sys.executable, "-m", "onnx_eptq", *arguments, *more]
        run = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr
    assert (checkout / "digits_mixed.onnx").stat().st_size <= 60_000


@pytest.mark.slow
def test_the_example_of_mixed_precision_runs(checkout: Path) -> None:
    example = blocks("python")[0]
    home = {**os.environ, "XDG_CACHE_HOME": str(checkout / "cache")}
    command = [sys.executable, "-c", example]
    run = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False, env=home)
    assert run.returncode == 0, run.stderr
    assert len(run.stdout.splitlines()) >= 6
    assert (checkout / "digits_mixed.onnx").exists()


def test_the_python_example_runs(checkout: Path) -> None:
    example = blocks("python")[1]
    assert len([line for line in example.splitlines() if line.strip()]) <= 10
    run = subprocess.run([sys.executable, "-c", example], cwd=checkout, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "parity" in run.stdout
    assert (checkout / "digits_int4.onnx").exists()


def test_options_presets_storage_and_targets_exist() -> None:
    commands = [[], ["sensitivity"]]
    helps = [[sys.executable, "-m", "onnx_eptq", *words, "--help"] for words in commands]
    text = "".join(subprocess.run(words, capture_output=True, text=True, check=True).stdout for words in helps)
    options = set(re.findall(r"`(--[a-z-]+)", TEXT)) - {"--help", "--beds"}
    assert len(options) > 10
    assert not [name for name in options if name not in text]
    row = next(line for line in TEXT.splitlines() if line.startswith("| `--preset`"))
    assert set(re.findall(r"`([a-z0-9]+)`", row)) == set(PRESETS)
    assert set(re.findall(r"^\| `([a-z0-9]+)` \| (?:INT|packed)", TEXT, re.MULTILINE)) == set(STORAGE)
    assert all(f"`{name}`" in TEXT or f"--target {name}" in TEXT for name in TARGETS)


def test_every_module_is_on_the_map() -> None:
    folder = ROOT / "onnx_eptq"
    modules = {path.stem for path in (*folder.glob("*.py"), *(init.parent for init in folder.glob("*/__init__.py")))}
    modules -= {"__init__", "__main__"}
    assert not [name for name in modules if f"`{name}`" not in TEXT]
