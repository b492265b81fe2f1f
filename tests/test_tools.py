"""Every measuring tool runs on the demo model with its smallest settings and prints a table."""

import json
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

import onnx_eptq

TOP = Path(__file__).parent.parent
DIGITS, CALIB = TOP / "models" / "digits.onnx", TOP / "models" / "digits_calib"
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


@pytest.mark.parametrize("storage", ["lut", "cast"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_census_counts_the_bits_that_weights_take(tmp_path, bits, storage):
    from census import describe

    settings = {"method": "rtn", "num_samples": 8, "weight_bits": bits, "storage": storage, "threads": 1}
    onnx_eptq.quantize(DIGITS, CALIB, tmp_path / "q.onnx", **settings)
    found = describe(tmp_path / "q.onnx", DIGITS, bits)
    stored = bits if storage == "lut" else 4
    assert found["bits_per_weight"] == pytest.approx(stored, abs=0.01)
    assert found["low_bit_share"] == (100 if stored == bits else 0)


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


# Fake CIFAR-10: the class of an image is its colour, so that a few steps teach something.

COLOURS = np.random.default_rng(7).integers(40, 216, (10, 3))
BATCHES = [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]


def coloured(count, seed):
    """Planes uint8 [count, 3072] and labels, every class among them."""
    draw = np.random.default_rng(seed)
    labels = draw.permutation(np.arange(count) % 10)
    noise = draw.integers(-30, 31, (count, 3, 1024))
    return (COLOURS[labels][..., None] + noise).astype(np.uint8).reshape(count, -1), labels


def python2_pickle(planes, labels):
    """Opcode by opcode what Python 2 and the NumPy of that time wrote, as in the published archive."""
    text = b"".join(struct.pack("<cB", b"U", len(word)) + word for word in (b"data",))
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    array += b"(K\x01" + b"".join(b"J" + struct.pack("<i", size) for size in planes.shape) + b"\x86"
    array += b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    array += b"\x89T" + struct.pack("<i", planes.nbytes) + planes.tobytes() + b"tb"
    classes = b"U\x06labels](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}(" + text + array + classes + b"u."


def write_cifar(folder, form, sizes=(20,) * 5 + (30,)):
    """The same images in one of the forms; what to give as --data."""
    parts = [coloured(size, seed) for seed, size in enumerate(sizes)]
    target = folder / form
    if form == "arrays.npz":
        train = [np.concatenate(arrays) for arrays in zip(*parts[:5], strict=True)]
        pictures = [planes.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1) for planes in (train[0], parts[5][0])]
        folder.mkdir(exist_ok=True)
        np.savez(target, x_train=pictures[0], y_train=train[1][:, None], x_test=pictures[1], y_test=parts[5][1])
        return target
    target.mkdir(parents=True)
    for name, (planes, labels) in zip(BATCHES, parts, strict=True):
        if form == "cifar-10-batches-py":
            (target / name).write_bytes(python2_pickle(planes, labels))
        else:
            rows = np.concatenate([labels[:, None].astype(np.uint8), planes], 1)
            (target / f"{name}.bin").write_bytes(rows.tobytes())
    return target


def test_cifar_is_the_same_in_every_form(tmp_path):
    import cifar_data

    wanted = [np.concatenate(arrays) for arrays in zip(*(coloured(20, seed) for seed in range(5)), strict=True)]
    for form in (*cifar_data.FOLDERS, "arrays.npz"):
        path = write_cifar(tmp_path / form, form)
        for source in (path, tmp_path / form) if path.is_dir() else (path,):
            found = cifar_data.read(source)
            assert (found.train.images.shape, found.test.images.shape) == ((100, 3, 32, 32), (30, 3, 32, 32))
            assert np.array_equal(found.train.images.reshape(100, -1), wanted[0])
            assert np.array_equal(found.train.labels, wanted[1])
            assert np.array_equal(found.test.labels, coloured(30, 5)[1])
    (tmp_path / "today").write_bytes(pickle.dumps({"data": wanted[0], "labels": wanted[1].tolist()}))
    assert np.array_equal(cifar_data.read_pickle(tmp_path / "today").images.reshape(100, -1), wanted[0])


class Harmful:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


FORMS = ("cifar-10-batches-py", "cifar-10-batches-bin", "arrays.npz")
PIXELS = np.zeros((4, 32, 32, 3), np.uint8)
ARRAYS = {"x_train": PIXELS, "y_train": np.arange(4), "x_test": PIXELS, "y_test": np.arange(4)}
WRONG_ARRAYS = {
    "wanted x_train, y_train, x_test, y_test": {"x": PIXELS},
    "images of float64": ARRAYS | {"x_train": PIXELS / 255},
    r"uint8 \[4, 28, 28\]": ARRAYS | {"x_test": PIXELS[:, :28, :28, 0]},
    "4 images and 3 labels": ARRAYS | {"y_train": np.arange(3)},
    "0 to 99; wanted integers, 0 to 9": ARRAYS | {"y_test": np.array([0, 1, 2, 99])},
    "plain arrays": ARRAYS | {"y_test": np.array([0, 1, 2, None])},
}


@pytest.mark.parametrize("complaint", WRONG_ARRAYS)
def test_cifar_says_what_is_wrong_with_arrays(tmp_path, complaint):
    import cifar_data

    np.savez(tmp_path / "a.npz", **WRONG_ARRAYS[complaint])
    with pytest.raises(SystemExit, match=complaint):
        cifar_data.read(tmp_path / "a.npz")


def test_cifar_says_what_is_wrong_with_a_folder(tmp_path):
    import cifar_data

    def refused(path, complaint):
        with pytest.raises(SystemExit, match=complaint):
            cifar_data.read(path)

    pickles, binary = (write_cifar(tmp_path, form, (1,) * 6) for form in FORMS[:2])
    refused(tmp_path / "none", "which does not exist.*wanted cifar-10-batches-py")
    (tmp_path / "other").mkdir()
    refused(tmp_path / "other", "an empty folder")
    (tmp_path / "other" / "cat.png").touch()
    refused(tmp_path / "other", "a folder with cat.png")
    refused(tmp_path / "other" / "cat.png", "a file")
    (binary / "test_batch.bin").write_bytes(bytes(3000))
    refused(binary, "3,000 bytes; wanted a multiple of 3,073")
    (binary / "data_batch_3.bin").unlink()
    refused(binary, "data_batch_3.bin is missing")
    (tmp_path / "not.npz").write_bytes(b"no archive")
    refused(tmp_path / "not.npz", "not an .npz file")
    for content, complaint in (
        (pickle.dumps({"data": [], "fine_labels": []}), "fine_labels; wanted data and labels"),
        (pickle.dumps([1]), "not a CIFAR-10 batch"),
        (pickle.dumps(Harmful(tmp_path / "harm")), "wanted a dictionary of arrays"),
        (b"\x80\x02}(U", "not a CIFAR-10 batch"),
    ):
        (pickles / "data_batch_2").write_bytes(content)
        refused(pickles, complaint)
    assert not (tmp_path / "harm").exists()


WRONG_OPTIONS = {
    "weights of 1 bits": ["--quantize=4,1"],
    "argument --steps: 0 is below 1": ["--steps=0"],
    "not a learning rate above 0": ["--lr=0"],
    "invalid choice": ["--model=resnet"],
    "method: input should be": ["--method=magic"],
    "effort: input should be": ["--effort=hours"],
    "--device moon cannot be used": ["--device=moon"],
    "needs images to calibrate with": ["--quantize=4", "--calibration=0"],
    "--batch-size 200: wanted 1 to 100, the number of training images": ["--batch-size=200"],
    "--calibration 101: wanted 0 to 100, the number of training images": ["--calibration=101", "--batch-size=10"],
}


@pytest.mark.parametrize("complaint", WRONG_OPTIONS)
def test_cifar_refuses_options_before_training(tmp_path, capsys, complaint):
    import train_cifar

    data = write_cifar(tmp_path, "arrays.npz")
    with pytest.raises(SystemExit) as stopped:
        train_cifar.main([f"--data={data}", f"--out={tmp_path / 'out'}", *WRONG_OPTIONS[complaint]])
    assert complaint in f"{stopped.value} {capsys.readouterr().err}"
    assert not (tmp_path / "out").exists()


def test_cifar_crops_and_mirrors():
    import train_cifar

    draw = np.random.default_rng(0)
    images = draw.normal(size=(12, 3, 32, 32)).astype(np.float32)
    top, left, mirrored = draw.integers(0, 9, 12), draw.integers(0, 9, 12), draw.random(12) < 0.5
    found = train_cifar.cropped(*map(torch.from_numpy, (images, top, left, mirrored))).numpy()
    padded = np.pad(images, ((0, 0), (0, 0), (4, 4), (4, 4)))
    for i in range(12):
        part = padded[i, :, top[i] : top[i] + 32, left[i] : left[i] + 32]
        assert np.array_equal(found[i], part[..., ::-1] if mirrored[i] else part)


def test_cifar_schedule_and_batches():
    import train_cifar

    rates = [train_cifar.factor(step, 100) for step in range(100)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1])
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[52] == pytest.approx(0.5, abs=0.02)
    assert 0 < rates[-1] < 1e-3
    assert train_cifar.factor(0, 1) == 1
    rows = list(train_cifar.batches(10, 3, 8, torch.Generator().manual_seed(0)))
    assert [len(part) for part in rows] == [3] * 8
    for epoch in (rows[:3], rows[3:6]):
        assert len(set(torch.cat(epoch).tolist())) == 9


def trained(tmp_path, capsys, model, *flags):
    """The table's cells for one model trained on fake data, and the folder that was written."""
    import train_cifar

    data, out = write_cifar(tmp_path, "cifar-10-batches-py", (40,) * 5 + (60,)), tmp_path / "out"
    given = [f"--data={data}", f"--out={out}", f"--model={model}", "--batch-size=20", "--threads=1", *flags]
    assert train_cifar.main(given) == 0
    header, found = cells(capsys.readouterr().out)
    return dict(zip(header, found, strict=True)), out


def test_cifar_trains_exports_and_quantizes(tmp_path, capsys):
    found, out = trained(tmp_path, capsys, "mixer", "--steps=3", "--calibration=8", "--quantize=4", "--method=rtn")
    assert list(found) == ["model", "parameters", "float top-1 %", "W4A8 top-1 %"]
    assert found["model"] == "mixer"
    mean, std = np.float32([0.4914, 0.4822, 0.4465])[:, None, None], np.float32([0.247, 0.2435, 0.2616])[:, None, None]
    calibration = np.load(out / "calibration.npy")
    assert (calibration.shape, calibration.dtype) == ((8, 3, 32, 32), np.float32)
    pixels = ((calibration * std + mean) * 255).round().astype(np.uint8)
    train = np.concatenate([coloured(40, seed)[0] for seed in range(5)])
    assert {image.tobytes() for image in pixels} <= {image.tobytes() for image in train}
    planes, labels = coloured(60, 5)
    x = (planes.reshape(-1, 3, 32, 32).astype(np.float32) / 255 - mean) / std
    for name, column in (("mixer", "float top-1 %"), ("mixer_w4", "W4A8 top-1 %")):
        model = onnx.load(out / f"{name}.onnx")
        assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param  # any number of images
        (logits,) = ort.InferenceSession(model.SerializeToString()).run(None, {"image": x})
        assert float(found[column]) == pytest.approx(100 * (logits.argmax(1) == labels).mean(), abs=0.01)
    assert (out / "mixer_w4.onnx").stat().st_size < 0.3 * (out / "mixer.onnx").stat().st_size


def test_cifar_keeps_the_table_where_a_network_fails(tmp_path, capsys):
    import train_cifar

    data = write_cifar(tmp_path, "arrays.npz")
    given = [f"--data={data}", f"--out={tmp_path / 'out'}", "--batch-size=4", "--calibration=0", "--threads=1"]
    assert train_cifar.main([*given, "--model", "mixer", "--steps=3", "--lr=1e30"]) == 1
    printed = capsys.readouterr()
    assert "mixer: training diverged" in printed.err
    assert cells(printed.out)[1:] == [["mixer", "-", "-"]]
    assert list((tmp_path / "out").iterdir()) == []


def test_cifar_notices_a_file_that_is_not_the_network(tmp_path):
    import train_cifar

    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 10))
    x = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)).numpy()
    train_cifar.export(network, tmp_path / "a.onnx")
    train_cifar.check(network, tmp_path / "a.onnx", x)
    with torch.no_grad():
        network[1].weight[0, 0] += 0.1
    with pytest.raises(train_cifar.FailedError, match="not what was trained"):
        train_cifar.check(network, tmp_path / "a.onnx", x)
    assert not (tmp_path / "a.onnx").exists()


@pytest.mark.slow
@pytest.mark.parametrize("model", ["mobilevit", "mixer", "regnetx", "mnasnet"])
def test_cifar_models_learn(tmp_path, capsys, model):
    """Colours are learned in a few steps, and 8-bit weights keep what was learned."""
    method = ("--method=eptq", "--effort=fast") if model == "mixer" else ("--method=rtn",)
    flags = ("--steps=40", "--calibration=32", "--quantize=8,2", *method)
    found, out = trained(tmp_path, capsys, model, *flags)
    assert float(found["float top-1 %"]) > 30  # 10 by chance, with a deviation of 4
    # images of a class are alike, so that a narrow decision turns 10 % at once
    assert float(found["W8A8 top-1 %"]) >= float(found["float top-1 %"]) - 20
    assert {path.name for path in out.iterdir()} == {
        "calibration.npy",
        *(f"{model}{end}.onnx" for end in ("", "_w8", "_w2")),
    }
