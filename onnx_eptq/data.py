"""Calibration data: whatever holds samples becomes a stream of batches that can be read again and again.

Images go through `Preprocess`; arrays are fed as they are. An array of the input's rank is a batch of samples, one of a
rank less is a single sample. One batch is in memory at a time.
"""

import itertools
import logging
import math
import os
import re
import shutil
import tempfile
import weakref
import zipfile
import zlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from onnx_eptq.errors import DataError, UsageError

logger = logging.getLogger(__name__)

Array = npt.NDArray[Any]
Feed = dict[str, Array]

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pnm")
CHANNEL_AXIS = {"nchw": 1, "nhwc": 3}
OFFSET = 3.0  # times its width that the range of an image may lie beside 0
LEAST_SIDE = 16  # of an image that comes without an axis of samples
FAR, FEW = 20.0, 0.1  # times the median by which a sample stands out, and the share of samples that can
ACCEPTED = "a folder of images, of .npy or .npz files or of ONNX test_data_set_* folders, an .npy file or an .npz file"


@dataclass(frozen=True)
class InputSpec:
    """A model input. Axis 0 counts the samples of a batch; `None` is a dimension that the model leaves open."""

    name: str
    shape: tuple[int | None, ...]
    dtype: np.dtype[Any]


def _size(option: str, value: str | int | None) -> tuple[int, ...] | None:
    """Return `(side,)` for "256", `(height, width)` for "240x320"."""
    if value is None:
        return None
    found = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", str(value).strip().lower())
    if not found:
        raise UsageError(f"{option} must be a number of pixels or HxW, such as 256 or 240x320; found {value!r}")
    return tuple(int(number) for number in found.groups() if number)


@dataclass(frozen=True)
class Preprocess:
    """What happens to an image: `resize`, `crop`, then `(pixel * scale - mean) / std` in float32, pixel in 0..255.

    `resize` is "256" (short side, aspect kept) or "HxW" (stretched), bilinear; `crop` is 224 or "HxW" (centre). Without
    either, an image is stretched to the model's input size. `mean` and `std` hold one number, or one per channel in the
    model's own channel order (after `color`). `layout` is read off the model's input when it is `None`. An integer
    input (uint8) gets the pixels themselves unless `scale`, `mean` or `std` differ from the defaults.
    """

    scale: float = 1 / 255
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    resize: str | int | None = None
    crop: str | int | None = None
    color: str = "rgb"
    layout: str | None = None

    def __post_init__(self) -> None:
        """Check every field, so that a wrong option is refused before any image is read."""
        for option in ("mean", "std"):
            object.__setattr__(self, option, tuple(float(value) for value in getattr(self, option)))
        numbers = (self.scale, *self.mean, *self.std)
        if not self.mean or not self.std or not all(math.isfinite(number) for number in numbers):
            raise UsageError(f"scale, mean and std must be finite numbers; found {self.scale}, {self.mean}, {self.std}")
        if 0 in (self.scale, *self.std):
            raise UsageError(f"scale and std must not be 0; found scale {self.scale}, std {self.std}")
        if self.color not in ("rgb", "bgr"):
            raise UsageError(f"color must be 'rgb' or 'bgr'; found {self.color!r}")
        if self.layout not in (None, *CHANNEL_AXIS):
            raise UsageError(f"layout must be 'nchw' or 'nhwc'; found {self.layout!r}")
        _size("resize", self.resize)
        _size("crop", self.crop)


_IMAGENET = Preprocess(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), resize="256", crop="224")
_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

PRESETS: dict[str, Preprocess] = {
    "unit": Preprocess(),
    "raw": Preprocess(scale=1.0),
    "imagenet": _IMAGENET,
    "tf": Preprocess(scale=1 / 127.5, mean=(1.0,)),
    "caffe": Preprocess(scale=1.0, mean=(104.0, 117.0, 123.0), color="bgr"),
    "clip": Preprocess(mean=_CLIP_MEAN, std=_CLIP_STD, resize="224", crop="224"),
    "cifar10": Preprocess(mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616)),
    "mnist": Preprocess(mean=(0.1307,), std=(0.3081,)),
    # Stretched, not letterboxed: the grey bars would only add a constant to what is observed.
    "yolo": Preprocess(),
}


# --- images ---


class _Frame(NamedTuple):
    """What an image has to become for one model input."""

    spec: InputSpec
    layout: str
    channels: int
    size: tuple[int | None, int | None]


def _frame(spec: InputSpec, preprocess: Preprocess) -> _Frame:
    layout, shape = preprocess.layout, spec.shape
    if layout is None and len(shape) == 4:
        layout = next((name for name, axis in CHANNEL_AXIS.items() if shape[axis] in (1, 3)), None)
    if len(shape) != 4 or layout is None or shape[CHANNEL_AXIS[layout]] not in (1, 3, None):
        raise DataError(
            f"images cannot feed input {spec.name!r} {_dims(shape)}: wanted [N,C,H,W] or [N,H,W,C] with 1 or 3 "
            "channels; give arrays (.npy, .npz), or --layout nchw or nhwc where the channel count is open"
        )
    channels = shape[CHANNEL_AXIS[layout]] or 3
    for option, values in (("mean", preprocess.mean), ("std", preprocess.std)):
        if len(values) not in (1, channels):
            raise DataError(
                f"{option} has {len(values)} numbers, but input {spec.name!r} {_dims(shape)} takes {channels}-channel "
                f"images; give --{option} one number or {channels}"
            )
    return _Frame(spec, layout, channels, (shape[2], shape[3]) if layout == "nchw" else (shape[1], shape[2]))


def _read_image(path: Path, frame: _Frame, preprocess: Preprocess) -> Feed:
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                raise DataError(
                    f"{path} has {image.mode} pixels; wanted 8 bits per channel: convert it, or give .npy arrays"
                )
            picture = image.convert("L" if frame.channels == 1 else "RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} cannot be read as an image ({error}); replace or remove it") from error
    pixels = np.asarray(_fit_size(picture, path, frame, preprocess)).astype(np.float32)
    pixels = pixels.reshape(*pixels.shape[:2], frame.channels)
    if preprocess.color == "bgr":
        pixels = pixels[..., ::-1]
    values = _normalise(pixels, frame.spec.dtype, preprocess)
    return {frame.spec.name: (values.transpose(2, 0, 1) if frame.layout == "nchw" else values)[None]}


def _normalise(pixels: Array, dtype: np.dtype[Any], preprocess: Preprocess) -> Array:
    scale, mean, std = preprocess.scale, preprocess.mean, preprocess.std
    if dtype.kind != "f" and (scale, mean, std) == (Preprocess.scale, Preprocess.mean, Preprocess.std):
        return pixels.astype(np.uint8)
    values: Array = (pixels * np.float32(scale) - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
    # An integer input takes whole steps; whether they fit its range is checked where every array is cast.
    return values if dtype.kind == "f" else np.rint(values).astype(np.int64)


def _fit_size(image: Image.Image, path: Path, frame: _Frame, preprocess: Preprocess) -> Image.Image:
    """Resize and crop as asked, or stretch to the model's size when nothing is asked."""
    resize, crop = _size("resize", preprocess.resize), _size("crop", preprocess.crop)
    if resize is None and crop is None:
        return _stretch(image, frame.size[0] or image.height, frame.size[1] or image.width)
    if resize is not None:
        image = _stretch(image, *(_short_side(image, resize[0]) if len(resize) == 1 else resize))
    if crop is not None:
        image = _centre(image, path, crop[0], crop[-1])
    if any(wanted not in (None, found) for wanted, found in zip(frame.size, (image.height, image.width), strict=True)):
        raise DataError(
            f"{path} becomes {image.height}x{image.width} (resize {preprocess.resize}, crop {preprocess.crop}), but "
            f"input {frame.spec.name!r} wants {_dims(frame.size)}; change --resize or --crop"
        )
    return image


def _short_side(image: Image.Image, side: int) -> tuple[int, int]:
    short = min(image.size)
    return max(1, side * image.height // short), max(1, side * image.width // short)


def _stretch(image: Image.Image, height: int, width: int) -> Image.Image:
    return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.BILINEAR)


def _centre(image: Image.Image, path: Path, height: int, width: int) -> Image.Image:
    if image.height < height or image.width < width:
        raise DataError(
            f"{path} is {image.height}x{image.width} after resizing, too small for "
            f"--crop {height}x{width}; give a larger --resize"
        )
    top, left = round((image.height - height) / 2), round((image.width - width) / 2)
    return image.crop((left, top, left + width, top + height))


# --- arrays ---


def _dims(shape: Sequence[int | None]) -> str:
    return "[" + ",".join("?" if size is None else str(size) for size in shape) + "]"


def _keys(held: Iterable[str], inputs: Sequence[InputSpec], where: str) -> dict[str, str]:
    """Return, per input, the key of its array: its name, or the only key where there is one input and one array."""
    held, names = sorted(held), [spec.name for spec in inputs]
    if len(names) == len(held) == 1:
        return {names[0]: held[0]}
    if not set(names) <= set(held):
        raise DataError(f"{where} holds {held}, but the model's inputs are {names}; name one array after each input")
    return {name: name for name in names}


def _match(raw: Mapping[str, Array], inputs: Sequence[InputSpec], where: str) -> Feed:
    """Return the arrays by input name, each with a leading sample axis; whatever else `raw` holds is left out."""
    keys = _keys(raw, inputs, where)
    feed = {spec.name: _match_one(raw[keys[spec.name]], spec, where) for spec in inputs}
    counts = {name: len(array) for name, array in feed.items()}
    if len(set(counts.values())) > 1:
        raise DataError(f"{where} has unequal sample counts {counts}; give every input the same number of samples")
    return feed


def _match_one(array: Array, spec: InputSpec, where: str) -> Array:
    if not _castable(array.dtype, spec.dtype):
        raise DataError(
            f"input {spec.name!r} of {where} is {array.dtype}, but the model takes {spec.dtype}; "
            f"convert the data to {spec.dtype}"
        )
    batch = array[None] if array.ndim == len(spec.shape) - 1 else array
    found, wanted = batch.shape[1:], spec.shape[1:]
    if batch.ndim != len(spec.shape) or any(w not in (None, f) for f, w in zip(found, wanted, strict=True)):
        hint = "transpose the data" if sorted(found) == sorted(w or 0 for w in wanted) else "reshape or resize the data"
        raise DataError(
            f"input {spec.name!r} of {where} has shape {_dims(array.shape)}, but the model takes {_dims(spec.shape)} "
            f"(a batch) or {_dims(wanted)} (one sample); {hint}"
        )
    return batch


def _castable(found: np.dtype[Any], wanted: np.dtype[Any]) -> bool:
    """Tell whether values may pass from one kind to the other; whether each value survives is for `_cast` to say."""
    rank = {"b": 0, "u": 1, "i": 1, "f": 2}
    return found.kind in rank and wanted.kind in rank and rank[found.kind] <= rank[wanted.kind]


def _cast(array: Array, dtype: np.dtype[Any], what: str) -> Array:
    """Return the values in the input's dtype; a float may lose precision, other values must not change."""
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise DataError(f"{what} has NaN or infinite values; remove that sample or repair the data")
    with np.errstate(over="ignore"):
        cast = array.astype(dtype)
    if not (np.isfinite(cast).all() if array.dtype.kind == "f" else np.array_equal(cast, array)):
        raise DataError(f"{what} has values in {array.min()}..{array.max()} that do not fit {dtype}; convert the data")
    return cast


# --- records: one file, one item or one array each, read when its samples are due ---


@dataclass(frozen=True)
class _Record:
    name: str
    rows: int
    read: Callable[[], Feed]


class _Found(NamedTuple):
    """The records of a source; `what` completes "12 ..." in messages; of a stream, the first samples are taken."""

    records: list[_Record]
    what: str
    stream: bool = False
    images: bool = False


def _record(name: str, read: Callable[[], Mapping[str, Array]], inputs: Sequence[InputSpec]) -> _Record:
    """Return a record of `read`'s arrays; reads them once, to check them and to count the samples."""

    def matched() -> Feed:
        try:
            return _match(read(), inputs, name)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise DataError(f"{name} cannot be read ({error}); save it again with numpy, as plain numbers") from error

    return _Record(name, len(next(iter(matched().values()))), matched)


def _read_npy(path: Path) -> Feed:
    # Mapped, not loaded: only the rows of a batch come into memory.
    return {path.stem: np.load(path, mmap_mode="r", allow_pickle=False)}


def _read_npz(path: Path) -> Feed:
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


def _read_test_set(folder: Path, inputs: Sequence[InputSpec]) -> Feed:
    """Read `input_<i>.pb`: by the tensors' names where these are the model's, by `i` otherwise."""
    import onnx
    from onnx import numpy_helper

    numbered = {str(i): spec.name for i, spec in enumerate(inputs)}
    by_number, by_name = {}, {}
    for path in sorted(folder.glob("input_*.pb")):
        try:
            tensor = onnx.load_tensor(str(path))
            array = numpy_helper.to_array(tensor)
        except Exception as error:  # protobuf's DecodeError derives from nothing narrower
            raise DataError(f"{path} cannot be read as an ONNX tensor ({error}); replace or remove it") from error
        by_number[numbered.get(path.stem.removeprefix("input_"), path.name)] = array
        by_name[tensor.name or path.name] = array
    return by_name if all(spec.name in by_name for spec in inputs) else by_number


class _Scratch:
    """A temporary folder that lives as long as this object, so as long as a record that reads from it."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="onnx-eptq-"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)

    def file(self, item: int, axis: int) -> Path:
        return self.path / f"{item}-{axis}.npy"

    def read(self, item: int, inputs: Sequence[InputSpec]) -> Feed:
        return {spec.name: np.load(self.file(item, axis), mmap_mode="r") for axis, spec in enumerate(inputs)}


def _unpack_npz(path: Path, inputs: Sequence[InputSpec]) -> _Record:
    """Unpack an .npz on disk, because its rows cannot be mapped while they are compressed."""
    scratch = _Scratch()
    try:
        with zipfile.ZipFile(path) as archive:
            keys = _keys([name.removesuffix(".npy") for name in archive.namelist()], inputs, str(path))
            for axis, spec in enumerate(inputs):
                with archive.open(f"{keys[spec.name]}.npy") as packed, scratch.file(0, axis).open("wb") as plain:
                    shutil.copyfileobj(packed, plain)
    except (OSError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path} cannot be read ({error}); save it again with numpy.savez") from error
    return _record(str(path), partial(scratch.read, 0, inputs), inputs)


def _as_feed(item: Any, where: str) -> Feed:
    """Return what a Python source holds or yields (a dict of arrays, or one array) as arrays by name."""
    if item is None or isinstance(item, str | bytes | list | tuple):
        raise DataError(
            f"{where} is a {type(item).__name__}; wanted an array or a dict {{input name: array}}, without labels"
        )
    try:
        if isinstance(item, Mapping):
            return {str(name): np.asarray(value) for name, value in item.items()}
        return {"an unnamed array": np.asarray(item)}
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{where} cannot be read as a NumPy array ({error}); convert it first") from error


def _spool(items: Iterable[Any], inputs: Sequence[InputSpec], limit: int | None) -> Iterator[_Record]:
    """Write what can be drawn only once into a temporary folder, item by item, until `limit` samples are there."""
    scratch, rows = _Scratch(), 0
    for number, item in enumerate(items):
        name = f"item {number}"
        feed = _match(_as_feed(item, name), inputs, name)
        for axis, spec in enumerate(inputs):
            np.save(scratch.file(number, axis), feed[spec.name])
        yield _Record(name, len(feed[inputs[0].name]), partial(scratch.read, number, inputs))
        rows += len(feed[inputs[0].name])
        if limit is not None and rows >= limit:
            return


# --- sources ---


def _find(source: Any, inputs: Sequence[InputSpec], preprocess: Preprocess, limit: int | None) -> _Found:
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        if not path.exists():
            raise DataError(f"{path} does not exist; give {ACCEPTED}")
        return _find_in_folder(path, inputs, preprocess) if path.is_dir() else _find_file(path, inputs)
    if isinstance(source, list | tuple):
        items = [(f"item {number}", item) for number, item in enumerate(source)]
        records = [_record(name, partial(_as_feed, item, name), inputs) for name, item in items]
        return _Found(records, f"samples in a {type(source).__name__} of {len(source)} items")
    kind = f"a {type(source).__name__}"
    if isinstance(source, Mapping) or hasattr(source, "__array__"):
        return _Found([_record(kind, partial(_as_feed, source, kind), inputs)], f"samples in {kind}")
    if hasattr(source, "get_next"):
        if hasattr(source, "rewind"):
            source.rewind()
        source = iter(source.get_next, None)
    if not isinstance(source, Iterable):
        raise DataError(
            f"calibration data cannot be {kind}; give {ACCEPTED}, or arrays, dicts of arrays or a data reader"
        )
    return _Found(list(_spool(source, inputs, limit)), f"samples from {kind}", stream=True)


def _find_file(path: Path, inputs: Sequence[InputSpec]) -> _Found:
    suffix = path.suffix.lower()
    if suffix == ".npy":
        return _Found([_record(str(path), partial(_read_npy, path), inputs)], f"samples in {path}")
    if suffix == ".npz":
        return _Found([_unpack_npz(path, inputs)], f"samples in {path}")
    kind = "a single image" if suffix in IMAGE_SUFFIXES else f"a {suffix or 'nameless'} file"
    raise DataError(f"{path} is {kind}; give {ACCEPTED}")


def _kind(path: Path) -> str | None:
    suffix = path.suffix.lower()
    if suffix == ".pb":
        return "ONNX test set" if path.name.startswith("input_") else None
    return "image" if suffix in IMAGE_SUFFIXES else suffix if suffix in (".npy", ".npz") else None


def _files_below(folder: Path) -> Iterator[Path]:
    """All files in a folder and those below, linked ones too; each folder once, under its own name if it has one there."""
    seen: set[str] = set()
    waiting = [folder]
    while waiting:
        linked: list[Path] = []
        for start in waiting:
            for root, folders, names in os.walk(start):
                if os.path.realpath(root) in seen:
                    folders.clear()
                    continue
                seen.add(os.path.realpath(root))
                linked += [path for name in folders if (path := Path(root, name)).is_symlink()]
                yield from (path for name in names if (path := Path(root, name)).is_file())
        waiting = sorted(path for path in linked if not path.name.startswith("."))


def _find_in_folder(folder: Path, inputs: Sequence[InputSpec], preprocess: Preprocess) -> _Found:
    files = sorted(_files_below(folder))
    usable = [path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    kinds = Counter(kind for path in usable if (kind := _kind(path)))
    if not kinds:
        found = ", ".join(
            f"{count} {suffix or 'nameless'}" for suffix, count in Counter(p.suffix for p in files).items()
        )
        raise DataError(f"{folder} holds no calibration data (found: {found or 'nothing'}); give {ACCEPTED}")
    if len(kinds) > 1:
        found = ", ".join(f"{count} {kind} files" for kind, count in sorted(kinds.items()))
        raise DataError(f"{folder} mixes kinds of data ({found}); keep one kind in the folder")
    kind = next(iter(kinds))
    chosen = [path for path in usable if _kind(path) == kind]
    others = len(files) - len(chosen)
    records, what = _folder_records(kind, chosen, inputs, preprocess)
    ignored = f" ({others} other files ignored)" if others else ""
    return _Found(records, f"{what} in {folder}{ignored}", images=kind == "image")


def _folder_records(
    kind: str, files: list[Path], inputs: Sequence[InputSpec], preprocess: Preprocess
) -> tuple[list[_Record], str]:
    if kind == "image":
        if len(inputs) > 1:
            names = [spec.name for spec in inputs]
            raise DataError(
                f"images feed one input, but the model's inputs are {names}; give .npz files with these keys"
            )
        frame = _frame(inputs[0], preprocess)
        formats = Counter(path.suffix[1:].upper().replace("JPG", "JPEG") for path in files).most_common()
        counts = ", ".join(f"{count} {name}" for name, count in formats)
        what = f"{formats[0][0]} images" if len(formats) == 1 else f"images ({counts})"
        return [_Record(str(path), 1, partial(_read_image, path, frame, preprocess)) for path in files], what
    if kind == "ONNX test set":
        sets = sorted({path.parent for path in files})
        records = [_record(str(path), partial(_read_test_set, path, inputs), inputs) for path in sets]
        return records, f"samples in {len(sets)} ONNX test sets"
    read = _read_npy if kind == ".npy" else _read_npz
    return [_record(str(path), partial(read, path), inputs) for path in files], f"samples in {len(files)} {kind} files"


# --- batches ---


class Batches:
    """Batches `{input name: array}` of the chosen samples; every `iter()` starts again and reads them anew.

    Samples come in a fixed order. Where the model leaves dimensions open, a batch ends when the next sample has another
    shape. Where it fixes the batch size, every batch has it, and samples that fill none are dropped with a warning.
    """

    def __init__(
        self, found: _Found, chosen: npt.NDArray[np.int64], inputs: Sequence[InputSpec], batch_size: int, whole: bool
    ):
        self.batch_size = batch_size
        self.num_samples = len(chosen)
        self._found, self._chosen, self._inputs, self._whole = found, chosen, inputs, whole
        self._ends = list(itertools.accumulate(record.rows for record in found.records))

    @property
    def are_images(self) -> bool:
        """Whether the samples come from image files, and through the preprocessing."""
        return self._found.images

    def describe(self) -> str:
        """Return what was found and how much of it is used, such as "256 of 1024 PNG images in calib"."""
        total = self._ends[-1]
        return f"{self.num_samples} {'' if self.num_samples == total else f'of {total} '}{self._found.what}"

    def subset(self, count: int, seed: int = 0) -> "Batches":
        """Return at most `count` of the samples, spread at random over all of them; `seed` decides which."""
        fixed = self._inputs[0].shape[0] or 1
        count = min(max(count // fixed, 1) * fixed, self.num_samples)
        chosen = np.sort(np.random.default_rng(seed).choice(self.num_samples, count, replace=False))
        return Batches(self._found, self._chosen[chosen], self._inputs, self.batch_size, self._whole)

    def with_batch_size(self, batch_size: int) -> "Batches":
        """Return the same samples in batches of another size, unless the model fixes it."""
        fixed = self._inputs[0].shape[0]
        return Batches(self._found, self._chosen, self._inputs, fixed or batch_size, self._whole)

    def by_item(self, count: int | None = None, seed: int = 0) -> "Batches":
        """Return the same data with every array, as it was given, for one sample that is fed whole; at most `count` of them."""
        records = [_Record(record.name, 1, partial(_as_one, record.read)) for record in self._found.records]
        batches = Batches(
            self._found._replace(records=records), np.arange(len(records)), _behind_one(self._inputs), 1, True
        )
        return batches if count is None else batches.subset(count, seed)

    def samples(self) -> Iterator[Feed]:
        """Yield the samples one by one, in the inputs' dtypes, without a batch axis."""
        for index, group in itertools.groupby(self._chosen.tolist(), key=partial(bisect_right, self._ends)):
            record = self._found.records[index]
            feed = record.read()
            for row in (sample - self._ends[index] + record.rows for sample in group):
                where = record.name if record.rows == 1 else f"{record.name}, sample {row}"
                yield {
                    spec.name: _cast(feed[spec.name][row], spec.dtype, f"input {spec.name!r} of {where}")
                    for spec in self._inputs
                }

    def __iter__(self) -> Iterator[Feed]:
        """Yield the batches from the first one on; raise `DataError` naming a sample that cannot be used."""
        fixed, dropped = self._inputs[0].shape[0], 0
        for _, alike in itertools.groupby(self.samples(), key=_shapes):
            while samples := list(itertools.islice(alike, self.batch_size)):
                if fixed is None or len(samples) == fixed:
                    batch = {spec.name: np.stack([sample[spec.name] for sample in samples]) for spec in self._inputs}
                    yield {name: array[0] for name, array in batch.items()} if self._whole else batch
                else:
                    dropped += len(samples)
        if dropped:
            _dropped(dropped, self.num_samples, self.batch_size)


def _as_one(read: Callable[[], Feed]) -> Feed:
    return {name: array[None] for name, array in read().items()}


def _shapes(sample: Feed) -> list[tuple[int, ...]]:
    return [array.shape for array in sample.values()]


def _dropped(dropped: int, total: int, batch_size: int) -> None:
    if dropped == total:
        raise DataError(
            f"the model takes batches of exactly {batch_size}, but {total} samples fill none; give more samples"
        )
    logger.warning("dropped %d of %d samples: the model takes batches of exactly %d", dropped, total, batch_size)


def no_batch_axis(shapes: Iterable[Sequence[Any]]) -> bool:
    """Whether inputs of these shapes have no first axis in common, which could count samples.

    The first of [3, height, width] counts the colours of the one image that detectors often take.
    """
    known = [tuple(shape) for shape in shapes]
    if len(known) == 1 and len(known[0]) == 3 and known[0][0] == 3:
        return not any(isinstance(size, int) and size < LEAST_SIDE for size in known[0][1:])
    return not all(known) or len({shape[0] if isinstance(shape[0], int) else None for shape in known}) > 1


def _whole(inputs: Sequence[InputSpec]) -> bool:
    return no_batch_axis(spec.shape for spec in inputs)


def _specs(inputs: Sequence[InputSpec]) -> tuple[InputSpec, ...]:
    if not inputs:
        raise DataError("the model has no inputs, so it cannot be calibrated; give a model with at least one input")
    return _behind_one(inputs) if _whole(inputs) else tuple(inputs)


def _behind_one(inputs: Sequence[InputSpec]) -> tuple[InputSpec, ...]:
    return tuple(replace(spec, shape=(1, *spec.shape)) for spec in inputs)


def _positive(**options: int | None) -> None:
    for option, value in options.items():
        if value is not None and value < 1:
            raise UsageError(f"{option} must be at least 1; found {value}")


def _batches(
    found: _Found, inputs: Sequence[InputSpec], batch_size: int, num_samples: int | None, seed: int
) -> Batches:
    total, fixed = sum(record.rows for record in found.records), _specs(inputs)[0].shape[0]
    if not total:
        raise DataError(f"found no {found.what}; give at least one sample")
    if num_samples is not None and num_samples > total:
        logger.warning("asked for %d samples, found %d %s: using all", num_samples, total, found.what)
    wanted = total if num_samples is None else min(num_samples, total)
    if fixed and wanted % fixed:
        _dropped(wanted % fixed, wanted, fixed)
        wanted -= wanted % fixed
    chosen = np.arange(wanted)
    if wanted < total and not found.stream:
        chosen = np.sort(np.random.default_rng(seed).choice(total, wanted, replace=False))
    return Batches(found, chosen, _specs(inputs), fixed or batch_size, _whole(inputs))


def open_data(
    source: Any,
    inputs: Sequence[InputSpec],
    preprocess: Preprocess = PRESETS["unit"],
    *,
    batch_size: int = 32,
    num_samples: int | None = None,
    seed: int = 0,
) -> Batches:
    """Return the batches of a source, having checked that it exists and that its first sample fits the model's inputs.

    Args:
        source: a folder of images (class folders too), of .npy or .npz files, or of ONNX `test_data_set_*` folders; an
            .npy or .npz file; an array; a dict of arrays by input name; a list of either; an ONNX Runtime
            `CalibrationDataReader`; or any iterable of arrays or dicts, which is drawn once and kept on disk.
        inputs: the model's inputs. Without a common batch axis, each sample holds whole inputs and is fed alone.
        preprocess: for images only; arrays are fed as they are, cast to the input's dtype where that keeps the values.
        batch_size: samples per batch, unless the model fixes the number.
        num_samples: how many to use: a random subset that `seed` decides, or the first ones of a stream. `None`: all.
        seed: decides the subset.

    Raises:
        DataError: the source is missing, empty, unreadable, of mixed kinds, or does not fit the model's inputs.
        UsageError: `batch_size` or `num_samples` is below 1.
    """
    _positive(batch_size=batch_size, num_samples=num_samples)
    found = _find(source, _specs(inputs), preprocess, num_samples)
    batches = _batches(found, inputs, batch_size, num_samples, seed)
    if preprocess != PRESETS["unit"] and not found.images:
        logger.warning("preprocessing applies to images only; the %s are fed as they are", found.what)
    next(batches.samples())
    return batches


def random_data(
    inputs: Sequence[InputSpec],
    num_samples: int = 32,
    seed: int = 0,
    *,
    batch_size: int = 32,
    shapes: Mapping[str, Sequence[int]] | None = None,
) -> Batches:
    """Return random samples: standard normal floats, uint8 in 0..255, other integers and booleans 0 or 1.

    `shapes` gives, per input with open dimensions, a whole shape, such as `{"image": (1, 3, 224, 224)}`; its first number is not
    used where it counts samples. Raises `DataError` for an input whose dimensions stay open.
    """
    _positive(batch_size=batch_size, num_samples=num_samples)
    sizes = {spec.name: _closed(spec, (shapes or {}).get(spec.name, spec.shape)) for spec in inputs}
    whole = _whole(inputs)
    first = {spec.name: [sizes[spec.name][0] or 1] if whole and spec.shape else spec.shape[:1] for spec in inputs}
    specs = [replace(spec, shape=(*first[spec.name], *sizes[spec.name][1:])) for spec in inputs]
    records = [_Record(f"random {i}", 1, partial(_random, _specs(specs), seed, i)) for i in range(num_samples)]
    return _batches(_Found(records, "random samples", stream=True), specs, batch_size, None, seed)


def _closed(spec: InputSpec, shape: Sequence[int | None]) -> Sequence[int | None]:
    fits = len(shape) == len(spec.shape) and all(w in (None, f) for f, w in zip(shape[1:], spec.shape[1:], strict=True))
    if not fits or None in shape[1:]:
        raise DataError(
            f"random data for input {spec.name!r} {_dims(spec.shape)} needs a size for every dimension; found "
            f"{_dims(shape)}: give its whole shape (--random-shape {spec.name}=1x...)"
        )
    return shape


def _random(inputs: Sequence[InputSpec], seed: int, sample: int) -> Feed:
    generator = np.random.default_rng([seed, sample])
    return {spec.name: _random_array(generator, (1, *spec.shape[1:]), spec.dtype) for spec in inputs}


def _random_array(generator: np.random.Generator, shape: Any, dtype: np.dtype[Any]) -> Array:
    if dtype.kind == "f":
        values: Array = generator.standard_normal(shape, np.float32)
        return values
    integers: Array = generator.integers(256 if dtype == np.uint8 else 2, size=shape)
    return integers.astype(dtype)


# --- what was fed ---


class FeedRange(NamedTuple):
    """The values of one input in one batch."""

    min: float
    max: float
    mean: float
    std: float


class Magnitudes:
    """The largest magnitude of each sample, per float input, taken while batches go by."""

    def __init__(self) -> None:
        self.largest: dict[str, list[float]] = {}

    def watch(self, batches: Iterable[Feed], whole: bool) -> Iterator[Feed]:
        """Yield the batches; with `whole` each of them is one sample."""
        for batch in batches:
            for name, array in batch.items():
                if array.dtype.kind == "f" and array.size:
                    rows = np.abs(array).reshape(1 if whole else len(array), -1)
                    self.largest.setdefault(name, []).extend(rows.max(1).tolist())
            yield batch

    def outliers(self) -> dict[str, tuple[int, float]]:
        """Per input: how many samples reach `FAR` times as far as most, if they are few, and how far the largest one does."""
        found = {}
        for name, largest in self.largest.items():
            usual = float(np.median(largest))
            count = sum(size > FAR * usual for size in largest)
            if usual and 0 < count <= len(largest) * FEW:
                found[name] = count, max(largest) / usual
        return found


def feed_range(batch: Mapping[str, Array]) -> dict[str, FeedRange]:
    """Return the range of every input in a batch, by input name."""
    wide = {name: array.astype(np.float64) for name, array in batch.items()}
    return {
        name: FeedRange(float(x.min()), float(x.max()), float(x.mean()), float(x.std())) for name, x in wide.items()
    }


def implausible(spec: InputSpec, fed: FeedRange, *, raw: bool = False, arrays: bool = False) -> str | None:
    """Return a hint when a float image input is fed what no usual preprocessing gives, `None` when it is plausible.

    `raw`: the user asked for unscaled pixels, so that their range is no surprise. `arrays`: what no preprocessing touches.
    """
    if spec.dtype.kind != "f" or len(spec.shape) != 4 or not {spec.shape[1], spec.shape[3]} & {1, 3}:
        return None
    seen = f"input {spec.name!r} was fed values in {fed.min:.4g}..{fed.max:.4g}"
    # A range up to 1/255 is what scaling twice leaves; 20 is far outside every normalised range.
    if fed.max - fed.min <= 1e-6 * max(abs(fed.min), abs(fed.max)):
        return f"{seen}: all equal; check the data"
    if not arrays and min(abs(fed.min), abs(fed.max)) > OFFSET * (fed.max - fed.min) and fed.min * fed.max > 0:
        return f"{seen}, far from 0 beside how much they vary; check --mean and --std, which apply after the scale"
    if fed.max - fed.min < 5e-3:
        return f"{seen}, which looks scaled twice; check --scale and --std"
    if max(abs(fed.min), abs(fed.max)) > 300:
        return f"{seen}, beyond any pixel; check --scale, --mean and --std (mean and std apply after the scale)"
    if fed.min >= 0 and fed.max > 20 and not raw:
        how = "normalise the arrays" if arrays else "pass --preset imagenet or unit"
        return f"{seen}, which looks like raw pixels; if the model expects normalised input {how}"
    return None
