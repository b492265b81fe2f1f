"""Every measuring tool runs on the demo model with its smallest settings and prints a table."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

TOP = Path(__file__).parent.parent
sys.path.insert(0, str(TOP / "tools"))


def run(tool, *flags):
    """What the tool prints; the demo model is its default."""
    command = [sys.executable, str(TOP / "tools" / tool), *map(str, flags)]
    found = subprocess.run(command, cwd=TOP, capture_output=True, text=True, timeout=600)
    assert found.returncode == 0, found.stderr[-2000:]
    return found.stdout


def cells(table):
    """Rows of a Markdown table, as lists of cells, the header first."""
    lines = [line for line in table.splitlines() if line.startswith("|") and "---" not in line]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.mark.slow
def test_step_cost(tmp_path):
    path = tmp_path / "cost.json"
    printed = run("step_cost.py", "--batch=4", "--samples=16", "--repeat=2", "--profile", f"--json={path}")
    facts = json.loads(path.read_text())
    assert facts["cpu_ratio"] > 0
    assert 0 < facts["peak_mb"]["none"] <= min(facts["peak_mb"]["training"], facts["peak_mb"]["learning"]) * 1.1
    assert "learning: operator" in printed
    assert any("convolution" in row[0] for row in cells(printed))


@pytest.mark.slow
def test_lfh_ranks_layers_as_the_hessian_does(tmp_path):
    path = tmp_path / "lfh.json"
    run("study_lfh.py", "--samples=4", "--probes=8", "--seeds=1", f"--json={path}")
    facts = json.loads(path.read_text())
    layers = facts["layers"]
    assert {len(values) for values in layers["log"].values()} == {len(layers["layers"])}
    assert min(layers["rank"].values()) > 0.8
    # the error of the mean of m vectors falls with the square root of m; a factor of two in hand
    first, last = facts["convergence"]["LFH"][0], facts["convergence"]["LFH"][-1]
    assert last[1] < first[1] * 2 / 8**0.5


SMALL = ("--seeds=0,1", "--steps=4", "--samples=32", "--rounding=latent,off", "--weighting=none", "--kl=0.1")


@pytest.mark.slow
def test_ablation_goes_on_where_it_was_interrupted(tmp_path):
    out = tmp_path / "runs.jsonl"
    flags = [*SMALL, "--scope=network", "--start=rtn", f"--out={out}", "--eval=models/digits_eval.npz", "--limit=50"]
    printed = run("ablate.py", *flags)
    header, *rows = cells(printed)
    assert header == [
        "rounding",
        "kl",
        "steps",
        "held-out distance",
        "top-1 %",
        "agreement %",
        "CPU s",
        "kept",
    ]
    assert [row[0] for row in rows] == ["latent", "off"]
    lines = out.read_text().splitlines()
    assert len(lines) == 4
    out.write_text("\n".join(lines[:3]) + "\n" + lines[3][:20])  # killed in the middle of writing
    assert cells(run("ablate.py", *flags))[0] == header
    assert [line[:20] for line in out.read_text().splitlines()[:3]] == [line[:20] for line in lines[:3]]


def test_what_changes_nothing_is_run_once():
    import ablate

    setting = {"bits": "3/8", "scope": "layer", "rounding": "soft", "weighting": "sla", "kl": 1.0, "start": "rtn"}
    setting |= {"steps": 10, "samples": 32}
    plain = ablate.canonical(setting)
    assert (plain["weighting"], plain["kl"], plain["scope"]) == ("none", 0.0, "layer")
    off = ablate.canonical({**setting, "rounding": "off"})
    assert (off["scope"], off["steps"]) == ("network", 0)
    assert ablate.canonical({**setting, "rounding": "latent"})["kl"] == 1.0


def test_a_method_holds_the_setting():
    import ablate

    setting = {"scope": "block", "rounding": "flex", "weighting": "lfh", "kl": 1.0, "start": "rtn"}
    method = ablate.method(setting)
    first, second = method.stages
    assert (first.scope, first.rounding, first.weighting, first.kl, method.start) == (
        "block",
        "flex",
        "lfh",
        1.0,
        "rtn",
    )
    assert (second.scope, second.rounding, second.kl) == ("network", "frozen", 1.0)
    assert len(ablate.method({**setting, "rounding": "soft"}).stages) == 1
    assert ablate.method({**setting, "rounding": "off"}).stages == ()


FAKE_PEER = """
import json, shutil, sys
model, out = sys.argv[2], sys.argv[4]
shutil.copy(model, out)
print(json.dumps({"problem": "", "peak_mb": 1.0, "scoring_s": 0.0}))
"""


def test_compare_peer_scores_what_a_peer_writes(tmp_path):
    """With a peer that hands the float model back: the real one is not among the dependencies."""
    peer = tmp_path / "peer"
    peer.write_text(f"#!{sys.executable}\n{FAKE_PEER}")
    peer.chmod(0o755)
    flags = [f"--peer-python={peer}", "--samples=32", "--limit=50", "--method=rtn", f"--json={tmp_path / 'rows.json'}"]
    run("compare_peer.py", *flags)
    whole, ours, theirs = json.loads((tmp_path / "rows.json").read_text())
    assert (theirs["agreement"], theirs["top1"]) == (100, whole["top1"])
    assert ours["scored"] == theirs["scored"] == "written file"
    assert ours["bytes"] < theirs["bytes"]
