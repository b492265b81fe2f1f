"""Read CIFAR-10 in the forms that it is distributed in; what is wrong with the data ends the program with what was wanted."""

import pickle
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from cifar_models import CLASSES, SIDE


class Part(NamedTuple):
    """Images uint8 [n, 3, 32, 32] and labels int64 [n]."""

    images: np.ndarray
    labels: np.ndarray


class Data(NamedTuple):
    train: Part
    test: Part


def _dtype(code: Any, align: Any = False, copy: Any = False) -> np.dtype[Any]:
    """A dtype from a pickle of Python 2, whose flags are integers."""
    return np.dtype(code.decode() if isinstance(code, bytes) else code, align=bool(align), copy=bool(copy))


class ArraysOnly(pickle.Unpickler):
    """Reads what the batches are made of and runs no other code that a pickle may name."""

    HELPERS = {("numpy", "ndarray"), ("_codecs", "encode")} | {
        (f"numpy.{core}.{module}", name)
        for core in ("core", "_core")  # before and since NumPy 2
        for module, name in (("multiarray", "_reconstruct"), ("numeric", "_frombuffer"))
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("numpy", "dtype"):
            return _dtype
        if (module, name) in self.HELPERS:
            return super().find_class(module.replace("numpy.core", "numpy._core"), name)
        raise pickle.UnpicklingError(f"it holds a {module}.{name}; wanted a dictionary of arrays and lists")


def read_pickle(path: Path) -> Part:
    try:
        with path.open("rb") as file:
            found = dict(ArraysOnly(file, encoding="bytes").load())
    except Exception as error:  # what a damaged pickle raises is anything
        sys.exit(f"{path} is not a CIFAR-10 batch in Python's pickle format: {error}")
    named = {key.decode() if isinstance(key, bytes) else key: value for key, value in found.items()}
    missing = {"data", "labels"} - named.keys()
    if missing:
        sys.exit(
            f"{path} holds {', '.join(map(str, named)) or 'nothing'}; wanted data and labels (CIFAR-10, not CIFAR-100)"
        )
    return part(named["data"], named["labels"], path)


def read_binary(path: Path) -> Part:
    raw = np.fromfile(path, np.uint8)
    record = 1 + 3 * SIDE * SIDE
    if not len(raw) or len(raw) % record:
        sys.exit(
            f"{path} has {len(raw):,} bytes; wanted a multiple of {record:,}: a label and 3 x {SIDE} x {SIDE} pixels"
        )
    rows = raw.reshape(-1, record)
    return part(rows[:, 1:], rows[:, 0], path)


def read_arrays(path: Path) -> Data:
    wanted = [f"{letter}_{half}" for half in ("train", "test") for letter in "xy"]
    try:
        with np.load(path) as held:
            missing = [name for name in wanted if name not in held]
            if missing:
                sys.exit(f"{path} holds {', '.join(held) or 'nothing'}; wanted {', '.join(wanted)}")
            arrays = [held[name] for name in wanted]
    except (OSError, TypeError, ValueError, EOFError, zipfile.BadZipFile) as error:
        sys.exit(f"{path} is not an .npz file of plain arrays: {error}")
    return Data(part(*arrays[:2], path), part(*arrays[2:], path))


def part(images: Any, labels: Any, path: Path) -> Part:
    """The arrays of one file in the form that is used here; planes [n, 3072], NHWC and NCHW are taken."""
    images, labels = np.asarray(images), np.asarray(labels).reshape(-1)
    if images.ndim == 2 and images.shape[1] == 3 * SIDE * SIDE:
        images = images.reshape(-1, 3, SIDE, SIDE)
    if images.shape[1:] == (SIDE, SIDE, 3):
        images = images.transpose(0, 3, 1, 2)
    if images.shape[1:] != (3, SIDE, SIDE) or images.dtype != np.uint8 or not len(images):
        sys.exit(f"{path} has images of {images.dtype} {list(images.shape)}; wanted uint8 [n, {SIDE}, {SIDE}, 3]")
    if len(labels) != len(images):
        sys.exit(f"{path} has {len(images):,} images and {len(labels):,} labels; wanted one label per image")
    if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= CLASSES:
        sys.exit(
            f"{path} has labels of {labels.dtype}, {labels.min()} to {labels.max()}; wanted integers, 0 to {CLASSES - 1}"
        )
    return Part(np.ascontiguousarray(images), labels.astype(np.int64))


# Names of the files of training and test, and what reads one of them.
FOLDERS: dict[str, tuple[list[str], str, Callable[[Path], Part]]] = {
    "cifar-10-batches-py": ([f"data_batch_{n}" for n in range(1, 6)], "test_batch", read_pickle),
    "cifar-10-batches-bin": ([f"data_batch_{n}.bin" for n in range(1, 6)], "test_batch.bin", read_binary),
}


def read(path: Path) -> Data:
    """CIFAR-10 in any of its forms; ends the program with what was found and what was wanted otherwise."""
    if path.is_file() and path.suffix == ".npz":
        return read_arrays(path)
    for folder in (path, *(path / name for name in FOLDERS)):
        for train, test, read_one in FOLDERS.values():
            held = [name for name in (*train, test) if (folder / name).is_file()]
            if held and len(held) < len(train) + 1:
                missing = [name for name in (*train, test) if name not in held]
                sys.exit(f"{folder} holds {', '.join(held)}; {', '.join(missing)} is missing: unpack the archive again")
            if held:
                return Data(joined([read_one(folder / name) for name in train]), read_one(folder / test))
    sys.exit(f"no CIFAR-10 in {path} ({_seen(path)}); wanted {', '.join(FOLDERS)} or an .npz file with x_train, y_train, "
             "x_test and y_test")  # fmt: skip


def joined(parts: list[Part]) -> Part:
    return Part(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def _seen(path: Path) -> str:
    if not path.is_dir():
        return "a file" if path.exists() else "which does not exist"
    names = sorted(item.name for item in path.iterdir())
    return f"a folder with {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}" if names else "an empty folder"
