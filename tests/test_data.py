import dataclasses
import gc
import itertools
import subprocess
import sys
import tempfile
import tracemalloc
import weakref
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from PIL import Image

from onnx_eptq.data import PRESETS, FeedRange, InputSpec, Preprocess, feed_range, implausible, open_data, random_data
from onnx_eptq.errors import DataError, UsageError

F32 = np.dtype(np.float32)
VECTOR = [InputSpec("x", (None, 3), F32)]
PAIR = [InputSpec("a", (None, 2), F32), InputSpec("b", (None,), np.dtype(np.int64))]


def image_input(*shape, dtype=np.float32):
    return [InputSpec("image", shape, np.dtype(dtype))]


def rows(count, width=3):
    return np.arange(count * width, dtype=np.float32).reshape(count, width)


def pair(count):
    return {"a": rows(count, 2), "b": np.arange(count)}


def picture(path, height=4, width=4, channels=3, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels[..., 0] if channels == 1 else pixels).save(path)
    return pixels


def everything(batches, name="x"):
    return np.concatenate([batch[name] for batch in batches])


class Reader:
    def __init__(self, items):
        self.items, self.left = items, iter(items)

    def get_next(self):
        return next(self.left, None)


class Rewinding(Reader):
    def rewind(self):
        self.left = iter(self.items)


# --- arrays: every source gives the same samples ---


def as_npy(folder, x):
    np.save(folder / "x.npy", x)
    return folder / "x.npy"


def as_npz(folder, x):
    np.savez_compressed(folder / "x.npz", x=x, labels=np.arange(2))
    return str(folder / "x.npz")


def as_npz_of_another_name(folder, x):
    np.savez(folder / "x.npz", anything=x)
    return folder / "x.npz"


def as_npy_samples(folder, x):
    for number, row in enumerate(x):
        np.save(folder / f"{number:03d}.npy", row)
    return folder


def as_npy_batches(folder, x):
    for number, part in enumerate(np.array_split(x, 3)):
        np.save(folder / f"{number:03d}.npy", part)
    return folder


def as_npz_files(folder, x):
    for number, part in enumerate(np.array_split(x, 3)):
        np.savez(folder / f"{number:03d}.npz", x=part)
    return folder


def as_test_sets(folder, x):
    for number, part in enumerate(np.array_split(x, 3)):
        data_set = folder / f"test_data_set_{number}"
        data_set.mkdir()
        onnx.save_tensor(numpy_helper.from_array(part, "not_the_input"), str(data_set / "input_0.pb"))
        onnx.save_tensor(numpy_helper.from_array(part, "y"), str(data_set / "output_0.pb"))
    return folder


SOURCES = [
    *(as_npy, as_npz, as_npz_of_another_name, as_npy_samples, as_npy_batches, as_npz_files, as_test_sets),
    lambda folder, x: x,
    lambda folder, x: {"x": x},
    lambda folder, x: list(x),
    lambda folder, x: tuple(np.array_split(x, 3)),
    lambda folder, x: [{"x": row} for row in x],
    lambda folder, x: (row for row in x),
    lambda folder, x: ({"x": part, "label": 1} for part in np.array_split(x, 3)),
    lambda folder, x: Reader([{"x": row[None]} for row in x]),
    lambda folder, x: Rewinding([{"x": row[None]} for row in x]),
]


@pytest.mark.parametrize("make", SOURCES)
def test_every_array_source_gives_its_samples_in_order_again_and_again(tmp_path, make):
    batches = open_data(make(tmp_path, rows(10)), VECTOR, batch_size=4)
    assert (batches.num_samples, batches.batch_size) == (10, 4)
    assert batches.describe().startswith("10 samples ")
    for _ in range(3):
        assert [len(batch["x"]) for batch in batches] == [4, 4, 2]
        assert everything(batches).dtype == np.float32
        np.testing.assert_array_equal(everything(batches), rows(10))


def test_two_passes_may_run_at_the_same_time():
    batches = open_data((row for row in rows(6)), VECTOR, batch_size=2)
    for one, other in zip(batches, batches, strict=True):
        np.testing.assert_array_equal(one["x"], other["x"])


def test_a_single_sample_is_an_array_of_one_rank_less(tmp_path):
    np.save(tmp_path / "x.npy", rows(1)[0])
    for source in (tmp_path / "x.npy", rows(1)[0]):
        assert everything(open_data(source, VECTOR)).shape == (1, 3)


def test_a_read_reader_is_rewound_first():
    reader = Rewinding([{"x": row} for row in rows(4)])
    reader.get_next()
    assert open_data(reader, VECTOR).num_samples == 4


def several_npz(folder):
    np.savez(folder / "data.npz", **pair(5))
    return folder / "data.npz"


def several_test_sets_by_name(folder):
    for number in range(5):
        data_set = folder / "model" / f"test_data_set_{number}"
        data_set.mkdir(parents=True)
        for index, name in enumerate(("b", "a")):
            onnx.save_tensor(
                numpy_helper.from_array(pair(5)[name][number : number + 1], name), data_set / f"input_{index}.pb"
            )
    return folder


def several_test_sets_by_number(folder):
    for index, name in enumerate(("a", "b")):
        onnx.save_tensor(numpy_helper.from_array(pair(5)[name], f"t{index}"), folder / f"input_{index}.pb")
    return folder


@pytest.mark.parametrize(
    "make",
    [
        *(several_npz, several_test_sets_by_name, several_test_sets_by_number),
        lambda folder: pair(5),
        lambda folder: [{"a": a, "b": b} for a, b in zip(*pair(5).values(), strict=True)],
        lambda folder: ({"a": a, "b": b} for a, b in zip(*pair(5).values(), strict=True)),
    ],
)
def test_every_source_feeds_several_inputs(tmp_path, make):
    batches = open_data(make(tmp_path), PAIR, batch_size=2)
    for name, wanted in pair(5).items():
        np.testing.assert_array_equal(everything(batches, name), wanted)
        assert everything(batches, name).dtype == next(spec.dtype for spec in PAIR if spec.name == name)


def test_inputs_without_a_common_batch_axis_are_fed_whole():
    inputs = [InputSpec("x", (2, 3), F32), InputSpec("limit", (), np.dtype(np.int64))]
    batches = open_data([{"x": rows(2) + i, "limit": np.int64(i)} for i in range(3)], inputs, batch_size=8)
    assert (batches.num_samples, batches.batch_size) == (3, 1)
    assert [(batch["x"].shape, batch["limit"].shape) for batch in batches] == [((2, 3), ())] * 3
    assert [int(batch["limit"]) for batch in batches] == [0, 1, 2]


def test_samples_of_different_shapes_are_batched_with_their_like():
    samples = [np.zeros((length, 2), np.float32) for length in (3, 3, 3, 5, 5, 3)]
    batches = open_data(samples, [InputSpec("x", (None, None, 2), F32)], batch_size=2)
    assert [batch["x"].shape for batch in batches] == [(2, 3, 2), (1, 3, 2), (2, 5, 2), (1, 3, 2)]


# --- how many samples, and which ---


def test_num_samples_draws_a_subset_that_the_seed_decides():
    def draw(seed):
        return everything(open_data(rows(100), VECTOR, num_samples=10, seed=seed))[:, 0].tolist()

    assert draw(0) == draw(0) == sorted(set(draw(0)))
    assert len(draw(0)) == 10
    assert draw(0) != draw(1)
    assert max(draw(0)) > 30  # not just the first ones


def test_num_samples_takes_the_first_of_a_stream_and_draws_no_more():
    source = itertools.count()
    batches = open_data((np.full(3, value, np.float32) for value in source), VECTOR, num_samples=5)
    assert everything(batches)[:, 0].tolist() == [0, 1, 2, 3, 4]
    assert next(source) == 5
    assert batches.num_samples == 5


def test_num_samples_cuts_inside_the_last_item_of_a_stream():
    batches = open_data(iter(np.array_split(rows(12), 3)), VECTOR, num_samples=5)
    np.testing.assert_array_equal(everything(batches), rows(5))
    assert batches.describe() == "5 of 8 samples from a list_iterator"


def test_asking_for_more_than_there_is_warns_and_uses_all(caplog):
    assert open_data(rows(4), VECTOR, num_samples=9).num_samples == 4
    assert "asked for 9 samples, found 4 samples in a ndarray: using all" in caplog.text


def test_a_fixed_batch_is_filled_or_dropped(caplog):
    batches = open_data(rows(10), [InputSpec("x", (4, 3), F32)], batch_size=32)
    assert (batches.num_samples, batches.batch_size) == (8, 4)
    assert [len(batch["x"]) for batch in batches] == [4, 4]
    assert "dropped 2 of 10 samples: the model takes batches of exactly 4" in caplog.text


def test_a_fixed_batch_of_open_shapes_drops_what_does_not_fill(caplog):
    samples = [np.zeros(length, np.float32) for length in (3, 3, 5, 5)]
    batches = open_data(samples, [InputSpec("x", (2, None), F32)])
    assert [batch["x"].shape for batch in batches] == [(2, 3), (2, 5)]
    batches = open_data([samples[0], *samples[2:], samples[0]], [InputSpec("x", (2, None), F32)])
    assert [batch["x"].shape for batch in batches] == [(2, 5)]
    assert "dropped 2 of 4 samples" in caplog.text
    with pytest.raises(DataError, match="exactly 2, but 2 samples fill none; give more"):
        list(open_data(samples[1:3], [InputSpec("x", (2, None), F32)]))


# --- dtypes of arrays ---


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        (np.float64, np.float32),
        (np.float32, np.float16),
        (np.uint8, np.float32),
        (np.int64, np.float32),
        (np.int64, np.int32),
        (np.int64, np.uint8),
        (np.bool_, np.float32),
    ],
)
def test_arrays_are_cast_where_their_values_survive(found, wanted):
    (batch,) = open_data(np.ones((2, 3), found), [InputSpec("x", (None, 3), np.dtype(wanted))])
    assert batch["x"].dtype == wanted
    assert (batch["x"] == 1).all()


@pytest.mark.parametrize(
    ("array", "wanted", "message"),
    [
        (np.ones((2, 3)), np.int64, "input 'x' of a ndarray is float64, but the model takes int64; convert the data"),
        (np.full((2, 3), "a"), np.float32, "is <U1, but the model takes float32"),
        (np.full((2, 3), None), np.float32, "is object, but the model takes float32"),
        (np.ones((2, 3), np.int64), np.bool_, "is int64, but the model takes bool"),
        (
            np.full((2, 3), 2**24 + 1),
            np.float32,
            r"sample 0 has values in 16777217\.\.16777217 that do not fit float32",
        ),
        (np.full((2, 3), 300), np.uint8, "that do not fit uint8"),
        (np.full((2, 3), 1e6), np.float16, "that do not fit float16"),
        (np.full((2, 3), np.nan), np.float32, "sample 0 has NaN or infinite values; remove that sample"),
        (np.full((2, 3), np.inf), np.float32, "NaN or infinite"),
    ],
)
def test_arrays_whose_values_would_change_are_refused(array, wanted, message):
    with pytest.raises(DataError, match=message):
        open_data(array, [InputSpec("x", (None, 3), np.dtype(wanted))])


def test_a_bad_sample_further_on_is_named(tmp_path):
    data = rows(6)
    data[4, 1] = np.nan
    np.save(tmp_path / "x.npy", data)
    batches = open_data(tmp_path / "x.npy", VECTOR)
    with pytest.raises(DataError, match=r"input 'x' of .*x\.npy, sample 4 has NaN"):
        list(batches)


# --- images, against sums done by hand ---


def test_default_images_are_pixels_over_255(tmp_path):
    pixels = [picture(tmp_path / f"{i}.png", seed=i) for i in range(5)]
    batches = open_data(tmp_path, image_input(None, 3, 4, 4), batch_size=2)
    wanted = np.stack(pixels).transpose(0, 3, 1, 2).astype(np.float32) / 255
    got = everything(batches, "image")
    assert (got.dtype, got.shape) == (F32, (5, 3, 4, 4))
    np.testing.assert_allclose(got, wanted, rtol=2e-7)
    np.testing.assert_array_equal(got, everything(batches, "image"))
    assert batches.describe() == f"5 PNG images in {tmp_path}"


def test_mean_and_std_apply_after_the_scale_in_the_models_channel_order(tmp_path):
    pixels = picture(tmp_path / "a.png")
    mean, std = (1.0, 2.0, 3.0), (4.0, 5.0, 6.0)
    (batch,) = open_data(tmp_path, image_input(1, 4, 4, 3), Preprocess(scale=0.5, mean=mean, std=std, color="bgr"))
    for y, x, channel in np.ndindex(4, 4, 3):
        wanted = (pixels[y, x, 2 - channel] * 0.5 - mean[channel]) / std[channel]
        assert batch["image"][0, y, x, channel] == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize(
    ("preset", "formula"),
    [
        ("unit", lambda p: p / 255),
        ("raw", lambda p: p),
        ("tf", lambda p: p / 127.5 - 1),
        ("caffe", lambda p: p[..., ::-1] - [104, 117, 123]),
        ("imagenet", lambda p: (p / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]),
        ("cifar10", lambda p: (p / 255 - [0.4914, 0.4822, 0.4465]) / [0.2470, 0.2435, 0.2616]),
    ],
)
def test_presets(tmp_path, preset, formula):
    pixels = picture(tmp_path / "a.png")
    preprocess = dataclasses.replace(PRESETS[preset], resize=None, crop=None)
    (batch,) = open_data(tmp_path, image_input(None, 3, 4, 4), preprocess)
    np.testing.assert_allclose(batch["image"][0].transpose(1, 2, 0), formula(pixels.astype(np.float64)), atol=1e-5)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_gives_a_plausible_range(tmp_path, name):
    channels = len(PRESETS[name].mean) if name == "mnist" else 3
    picture(tmp_path / "a.png", 300, 260, channels)
    (spec,) = image_input(None, channels, 224, 224)
    (batch,) = open_data(tmp_path, [spec], PRESETS[name])
    hint = implausible(spec, feed_range(batch)["image"])
    assert hint is None if name != "raw" else "looks like raw pixels" in hint


def test_an_image_of_another_size_is_stretched_to_the_input(tmp_path):
    Image.fromarray(np.array([[0, 100], [0, 100]], np.uint8)).save(tmp_path / "a.png")
    (batch,) = open_data(tmp_path, image_input(None, 1, 2, 4), PRESETS["raw"])
    # Bilinear, pixel centres: the outer columns keep their value, the inner two lie a quarter of the way across.
    np.testing.assert_array_equal(batch["image"][0, 0], [[0, 25, 75, 100]] * 2)


def columns(path, height, width, step):
    """Save a picture whose columns are `step` apart: a crop can be read off its values."""
    Image.fromarray(np.tile(np.arange(width, dtype=np.uint8) * step, (height, 1))).save(path)


def test_resize_keeps_the_aspect_and_crop_is_central(tmp_path):
    columns(tmp_path / "a.png", 8, 16, 8)
    (batch,) = open_data(tmp_path, image_input(None, 1, None, None), Preprocess(scale=1, resize="4"))
    assert batch["image"].shape == (1, 1, 4, 8)
    # Halving filters four source pixels with weights 1 3 3 1, whose mean is between the middle two: 8 * (2 i + 0.5).
    np.testing.assert_allclose(batch["image"][0, 0, 0, 1:-1], [8 * (2 * i + 0.5) for i in range(1, 7)], atol=0.5)
    (cropped,) = open_data(tmp_path, image_input(None, 1, 4, 4), Preprocess(scale=1, resize="4", crop=4))
    np.testing.assert_array_equal(cropped["image"], batch["image"][..., 2:6])


def test_crop_alone_cuts_the_image_itself(tmp_path):
    columns(tmp_path / "a.png", 6, 10, 1)
    (batch,) = open_data(tmp_path, image_input(None, 1, 2, 4), Preprocess(scale=1, crop="2x4"))
    np.testing.assert_array_equal(batch["image"][0, 0], [[3, 4, 5, 6]] * 2)


def test_resize_to_both_sides_stretches(tmp_path):
    columns(tmp_path / "a.png", 6, 10, 1)
    (batch,) = open_data(tmp_path, image_input(None, 1, None, None), Preprocess(resize="3X5"))
    assert batch["image"].shape == (1, 1, 3, 5)


def test_grey_inputs_read_colour_images_as_luminance(tmp_path):
    Image.new("RGB", (2, 2), (255, 0, 0)).save(tmp_path / "a.png")
    (batch,) = open_data(tmp_path, image_input(None, 1, 2, 2), PRESETS["raw"])
    assert (batch["image"] == 76).all()  # 0.299 * 255


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK"])
def test_any_eight_bit_image_becomes_rgb(tmp_path, mode):
    Image.new("RGB", (2, 2), (255, 255, 255)).convert(mode).save(tmp_path / ("a.tif" if mode == "CMYK" else "a.png"))
    (batch,) = open_data(tmp_path, image_input(None, 3, 2, 2))
    np.testing.assert_allclose(batch["image"], np.ones((1, 3, 2, 2)), rtol=1e-6)


def test_uint8_inputs_get_pixels_unless_a_scale_is_asked_for(tmp_path):
    pixels = picture(tmp_path / "a.png").transpose(2, 0, 1)
    spec = image_input(None, 3, 4, 4, dtype=np.uint8)
    for preprocess in (Preprocess(), PRESETS["raw"]):
        (batch,) = open_data(tmp_path, spec, preprocess)
        assert batch["image"].dtype == np.uint8
        np.testing.assert_array_equal(batch["image"][0], pixels)
    (batch,) = open_data(tmp_path, spec, Preprocess(scale=0.5))
    np.testing.assert_array_equal(batch["image"][0], np.rint(pixels * 0.5))
    with pytest.raises(DataError, match="do not fit uint8"):
        open_data(tmp_path, spec, PRESETS["tf"])


def test_float16_inputs_are_cast(tmp_path):
    pixels = picture(tmp_path / "a.png")
    (batch,) = open_data(tmp_path, image_input(None, 4, 4, 3, dtype=np.float16))
    assert batch["image"].dtype == np.float16
    np.testing.assert_allclose(batch["image"][0], pixels / 255, atol=1e-3)


def test_the_layout_can_be_given_where_the_input_leaves_it_open(tmp_path):
    picture(tmp_path / "a.png", 5, 6)
    for layout, shape in (("nchw", (1, 3, 5, 6)), ("nhwc", (1, 5, 6, 3))):
        (batch,) = open_data(tmp_path, image_input(None, None, None, None), Preprocess(layout=layout))
        assert batch["image"].shape == shape


def test_open_sizes_take_the_images_own_and_batch_equal_ones(tmp_path):
    for number, side in enumerate((4, 4, 6)):
        picture(tmp_path / f"{number}.png", side, side + 1)
    batches = open_data(tmp_path, image_input(None, 3, None, None))
    assert [batch["image"].shape for batch in batches] == [(2, 3, 4, 5), (1, 3, 6, 7)]


def test_folders_are_searched_in_order_and_other_files_counted(tmp_path):
    for name in ("dog/b.JPG", "cat/z.png", "cat/deep/a.jpeg", ".thumbs/h.png", "cat/.hidden.png"):
        picture(tmp_path / name)
    (tmp_path / "labels.txt").write_text("x")
    batches = open_data(str(tmp_path), image_input(None, 3, 4, 4), num_samples=2)
    assert batches.describe() == f"2 of 3 images (2 JPEG, 1 PNG) in {tmp_path} (3 other files ignored)"
    assert open_data(tmp_path, image_input(None, 3, 4, 4)).num_samples == 3


def test_linked_folders_are_searched_once(tmp_path):
    data, more = tmp_path / "data", tmp_path / "more"
    picture(data / "cat" / "a.png")
    picture(more / "b.png")
    (data / "dog").symlink_to(more)
    (more / "circle").symlink_to(more)
    (more / "back").symlink_to(data)
    (data / "gone").symlink_to(tmp_path / "nowhere")
    (data / ".cache").mkdir()
    (data / ".cache" / "cat").symlink_to(data / "cat")
    assert open_data(data, image_input(None, 3, 4, 4)).num_samples == 2


# --- streaming ---


def test_images_are_read_when_their_batch_is_due(tmp_path, monkeypatch):
    for number in range(12):
        picture(tmp_path / f"{number:02d}.png")
    opened, really_open = [], Image.open
    monkeypatch.setattr(Image, "open", lambda path: opened.append(path) or really_open(path))
    batches = open_data(tmp_path, image_input(None, 3, 4, 4), batch_size=3)
    assert len(opened) == 1
    next(iter(batches))
    assert len(opened) <= 1 + 3 + 1


def as_forty_npz_files(folder, x):
    for number, part in enumerate(np.array_split(x, 40)):
        np.savez_compressed(folder / f"{number}.npz", x=part)
    return folder


def as_a_generator(folder, x):
    return (part.copy() for part in np.array_split(x, 40))


@pytest.mark.parametrize("make", [as_npy, as_npz, as_npy_batches, as_forty_npz_files, as_a_generator])
def test_memory_does_not_grow_with_the_samples(tmp_path, make):
    def peak(count):
        folder = tmp_path / str(count)
        folder.mkdir()
        source = make(folder, np.ones((count, 3, 50), np.float32))
        tracemalloc.start()
        for batch in open_data(source, [InputSpec("x", (None, 3, 50), F32)], batch_size=4):
            assert batch["x"].shape[1:] == (3, 50)
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used

    peak(40)  # what is imported or compiled once is not the data's
    assert peak(4_000) < 4_000 * 600 / 4  # bytes: a quarter of the data


def test_a_generator_is_kept_on_disk_not_in_memory():
    alive = weakref.WeakSet()

    class Sample(np.ndarray):
        pass

    def generate():
        for _ in range(50):
            sample = np.zeros(3, np.float32).view(Sample)
            alive.add(Holder(sample))
            assert len(alive) <= 3
            yield sample

    class Holder:
        """Dies with the array it is attached to."""

        def __init__(self, array):
            array.holder = self

    assert open_data(generate(), VECTOR).num_samples == 50


def scratch_folders():
    return set(Path(tempfile.gettempdir()).glob("onnx-eptq-*"))


def test_what_is_spooled_is_removed_with_the_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    batches = open_data((row for row in rows(4)), VECTOR)
    assert len(scratch_folders()) == 1
    stream = iter(batches)
    del batches
    gc.collect()
    assert sum(len(batch["x"]) for batch in stream) == 4
    del stream
    gc.collect()
    assert not scratch_folders()
    with pytest.raises(DataError):
        open_data(iter([rows(1)[0], np.zeros(7)]), VECTOR)
    gc.collect()
    assert not scratch_folders()


def test_importing_the_module_loads_no_framework():
    code = "import sys, onnx_eptq.data; print(*sys.modules)"
    root = Path(__file__).parent.parent
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root).stdout
    assert not {"torch", "onnxruntime", "onnx"} & set(loaded.split())


# --- refusals ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"std": (0.0,)}, "std must not be 0"),
        ({"scale": 0}, "must not be 0"),
        ({"mean": (float("nan"),)}, "must be finite numbers"),
        ({"mean": ()}, "must be finite numbers"),
        ({"color": "hsv"}, "color must be 'rgb' or 'bgr'; found 'hsv'"),
        ({"layout": "chwn"}, "layout must be 'nchw' or 'nhwc'; found 'chwn'"),
        ({"resize": "big"}, "resize must be a number of pixels or HxW, such as 256 or 240x320; found 'big'"),
        ({"crop": 0}, "crop must be a number of pixels"),
        ({"crop": "-3"}, "crop must be a number of pixels"),
    ],
)
def test_wrong_preprocessing_is_refused(options, message):
    with pytest.raises(UsageError, match=message):
        Preprocess(**options)


@pytest.mark.parametrize("option", ["batch_size", "num_samples"])
def test_counts_below_one_are_refused(option):
    with pytest.raises(UsageError, match=f"{option} must be at least 1; found 0"):
        open_data(rows(3), VECTOR, **{option: 0})


def refused(source, inputs, message, **options):
    with pytest.raises(DataError, match=message) as caught:
        open_data(source, inputs, **options)
    assert "\n" not in str(caught.value)


def test_missing_and_unusable_paths(tmp_path):
    refused(tmp_path / "none", VECTOR, "none does not exist; give a folder of images")
    refused(tmp_path, VECTOR, r"holds no calibration data \(found: nothing\)")
    (tmp_path / "a.txt").touch()
    (tmp_path / "b.csv").touch()
    refused(tmp_path, VECTOR, r"holds no calibration data \(found: 1 \.txt, 1 \.csv\); give a folder")
    refused(tmp_path / "a.txt", VECTOR, r"a\.txt is a \.txt file; give a folder")
    picture(tmp_path / "cat.png")
    refused(tmp_path / "cat.png", image_input(None, 3, 4, 4), r"cat\.png is a single image; give a folder")
    np.save(tmp_path / "x.npy", rows(2))
    refused(tmp_path, VECTOR, r"mixes kinds of data \(1 \.npy files, 1 image files\); keep one kind")


def test_unreadable_files_are_named(tmp_path):
    folders = {name: tmp_path / name for name in ("png", "npy", "npz", "pb")}
    for name, folder in folders.items():
        folder.mkdir()
        (folder / f"input_0.{name}").write_bytes(b"nonsense")
    refused(
        folders["png"],
        image_input(None, 3, 4, 4),
        r"input_0\.png cannot be read as an image \(.*; replace or remove it",
    )
    refused(folders["npy"], VECTOR, r"input_0\.npy cannot be read \(")
    refused(folders["npz"], VECTOR, r"input_0\.npz cannot be read \(")
    refused(folders["npz"] / "input_0.npz", VECTOR, r"input_0\.npz cannot be read \(.*numpy\.savez")
    refused(folders["pb"], VECTOR, r"input_0\.pb cannot be read as an ONNX tensor \(")
    (tmp_path / "empty.npy").touch()
    refused(tmp_path / "empty.npy", VECTOR, r"empty\.npy cannot be read")
    np.save(tmp_path / "o.npy", np.array([None, 1]), allow_pickle=True)
    refused(tmp_path / "o.npy", VECTOR, r"o\.npy cannot be read .* plain numbers")


def test_an_image_broken_further_on_is_named(tmp_path):
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png", 64, 64)
    (tmp_path / "b.png").write_bytes((tmp_path / "b.png").read_bytes()[:3000])
    batches = open_data(tmp_path, image_input(None, 3, 4, 4))
    with pytest.raises(DataError, match=r"b\.png cannot be read as an image"):
        list(batches)


def test_deep_images_are_refused(tmp_path):
    Image.fromarray(np.full((4, 4), 40_000, np.uint16)).save(tmp_path / "a.png")
    refused(tmp_path, image_input(None, 1, 4, 4), r"a\.png has I;16 pixels; wanted 8 bits per channel")


def test_images_that_cannot_feed_the_input(tmp_path):
    picture(tmp_path / "a.png", 6, 8)
    refused(tmp_path, VECTOR, r"images cannot feed input 'x' \[\?,3\]: wanted \[N,C,H,W\]")
    refused(tmp_path, image_input(None, 4, 6, 8), r"images cannot feed input 'image' \[\?,4,6,8\]")
    refused(
        tmp_path, image_input(None, None, None, None), "give .* --layout nchw or nhwc where the channel count is open"
    )
    refused(
        tmp_path, image_input(None, 3, 6, 8) + VECTOR, r"images feed one input, but .* \['image', 'x'\]; give \.npz"
    )
    options = {"preprocess": Preprocess(mean=(1, 2, 3))}
    refused(
        tmp_path,
        image_input(None, 1, 6, 8),
        "mean has 3 numbers, but .* takes 1-channel images; give --mean",
        **options,
    )
    options = {"preprocess": Preprocess(resize="3")}
    message = r"a\.png becomes 3x4 \(resize 3, crop None\), but input 'image' wants \[6,8\]; change --resize or --crop"
    refused(tmp_path, image_input(None, 3, 6, 8), message, **options)
    options = {"preprocess": Preprocess(crop=7)}
    refused(
        tmp_path,
        image_input(None, 3, 7, 7),
        "is 6x8 after resizing, too small for --crop 7x7; give a larger",
        **options,
    )


def test_shapes_that_do_not_fit(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((5, 4, 4, 3), np.float32))
    message = (
        r"input 'image' of .*x\.npy has shape \[5,4,4,3\], but the model takes \[\?,3,4,4\] \(a batch\) or \[3,4,4\] "
        r"\(one sample\); transpose the data"
    )
    refused(tmp_path / "x.npy", image_input(None, 3, 4, 4), message)
    refused(np.zeros((5, 7)), VECTOR, r"has shape \[5,7\], but the model takes \[\?,3\].*; reshape or resize")
    refused(np.zeros((5, 1, 1, 3)), VECTOR, r"has shape \[5,1,1,3\]")
    refused([rows(2), np.zeros((2, 9))], VECTOR, "input 'x' of item 1 has shape")
    refused(iter([rows(2), np.zeros((2, 9))]), VECTOR, "input 'x' of item 1 has shape")


def test_names_that_do_not_match(tmp_path):
    np.savez(tmp_path / "x.npz", a=rows(3, 2), c=rows(3, 2))
    refused(
        tmp_path / "x.npz", PAIR, r"x\.npz holds \['a', 'c'\], but the model's inputs are \['a', 'b'\]; name one array"
    )
    refused(tmp_path, PAIR, r"holds \['a', 'c'\]")
    refused({"a": rows(3, 2)}, PAIR, r"holds \['a'\], but the model's inputs are \['a', 'b'\]")
    refused(rows(3, 2), PAIR, r"a ndarray holds \['an unnamed array'\]")
    refused({"a": rows(3, 2), "b": np.arange(2)}, PAIR, r"unequal sample counts \{'a': 3, 'b': 2\}; give every input")


def test_python_objects_that_hold_no_samples():
    refused([(rows(1), 7)], VECTOR, "item 0 is a tuple; wanted an array or a dict .*, without labels")
    refused(iter([[rows(1), 7]]), VECTOR, "item 0 is a list; wanted an array")
    refused([None], VECTOR, "item 0 is a NoneType")
    refused(7, VECTOR, "calibration data cannot be a int; give a folder of images")
    refused([], VECTOR, "found no samples in a list of 0 items; give at least one sample")
    refused(iter([]), VECTOR, "found no samples from a list_iterator")
    refused(Reader([]), VECTOR, "found no samples from a Reader")
    refused(np.zeros((0, 3)), VECTOR, "found no samples in a ndarray")
    refused([{"x": [[1, 2, 3], [1]]}], VECTOR, r"item 0 cannot be read as a NumPy array \(")
    refused(rows(3), [], "the model has no inputs")
    refused(rows(3), [InputSpec("x", (4, 3), F32)], "batches of exactly 4, but 3 samples fill none; give more samples")


def test_preprocessing_that_arrays_ignore_is_said(caplog):
    open_data(rows(3), VECTOR, PRESETS["imagenet"])
    assert "preprocessing applies to images only; the samples in a ndarray are fed as they are" in caplog.text


# --- random data ---


def test_random_data_is_explicit_about_what_it_draws():
    inputs = [
        *image_input(None, 3, 8, 8),
        InputSpec("pixels", (None, 500), np.dtype(np.uint8)),
        InputSpec("tokens", (None, 50), np.dtype(np.int64)),
        InputSpec("mask", (None, 50), np.dtype(np.bool_)),
        InputSpec("half", (None, 50), np.dtype(np.float16)),
    ]
    batches = random_data(inputs, 12, seed=3, batch_size=5)
    assert batches.describe() == "12 random samples"
    assert [len(batch["image"]) for batch in batches] == [5, 5, 2]
    fed = {name: everything(batches, name) for name in ("image", "pixels", "tokens", "mask", "half")}
    assert [array.dtype for array in fed.values()] == [spec.dtype for spec in inputs]
    assert abs(fed["image"].mean()) < 0.1
    assert abs(fed["image"].std() - 1) < 0.1
    assert fed["pixels"].max() > 250
    assert set(np.unique(fed["tokens"])) == {0, 1}
    np.testing.assert_array_equal(fed["image"], everything(random_data(inputs, 12, seed=3), "image"))
    assert (fed["image"] != everything(random_data(inputs, 12, seed=4), "image")).any()


def test_random_data_needs_sizes_for_open_dimensions():
    inputs = image_input(None, 3, None, None)
    with pytest.raises(
        DataError, match=r"'image' \[\?,3,\?,\?\] needs a size for every dimension; found \[\?,3,\?,\?\]"
    ):
        random_data(inputs, 2)
    with pytest.raises(DataError, match=r"found \[1,4,8,8\]: give its whole shape"):
        random_data(inputs, 2, shapes={"image": (1, 4, 8, 8)})
    (batch,) = random_data(inputs, 2, shapes={"image": (1, 3, 8, 8)})
    assert batch["image"].shape == (2, 3, 8, 8)


def test_random_data_for_inputs_without_a_common_batch_axis():
    inputs = [InputSpec("x", (None, 4), np.dtype("float32")), InputSpec("state", (2, None, 3), np.dtype("float32"))]
    batches = list(random_data(inputs, 3, shapes={"x": (5, 4), "state": (2, 1, 3)}))
    assert [(batch["x"].shape, batch["state"].shape) for batch in batches] == [((5, 4), (2, 1, 3))] * 3
    (batch, *_) = random_data(inputs, 3, shapes={"state": (2, 1, 3)})
    assert batch["x"].shape == (1, 4)


def test_arrays_that_are_one_sample_each():
    inputs = [InputSpec("x", (None, 1, 2), np.dtype("float32"))]
    arrays = [np.full((length, 1, 2), length, np.float32) for length in (3, 3, 4, 2)]
    batches = open_data(arrays, inputs).by_item()
    assert batches.num_samples == 4
    assert [batch["x"].tolist() for batch in batches] == [array.tolist() for array in arrays]
    assert [batch["x"].shape[0] for batch in batches.subset(2, seed=1)] in ([3, 3], [3, 4], [3, 2], [4, 2])
    assert open_data(arrays, inputs).by_item(3, seed=0).num_samples == 3


def test_random_data_fills_fixed_batches():
    assert [batch["x"].shape for batch in random_data([InputSpec("x", (4, 3), F32)], 8)] == [(4, 3)] * 2


# --- what was fed ---


def test_feed_range():
    assert feed_range({"x": np.array([[0, 2], [4, 6]], np.float32)}) == {"x": FeedRange(0, 6, 3, pytest.approx(5**0.5))}


@pytest.mark.parametrize(
    ("low", "high", "message"),
    [
        (
            0,
            255,
            "values in 0..255, which looks like raw pixels; if the model expects normalised input pass --preset",
        ),
        (0, 90, "looks like raw pixels"),
        (0, 1 / 255, "looks scaled twice"),
        (0.5, 0.5, "all equal; check the data"),
        (0, 0, "all equal; check the data"),
        (-4e-15, 3e-15, "looks scaled twice"),
        (-2, 1111, "beyond any pixel; check --scale, --mean and --std"),
        (-5000, 2, "beyond any pixel"),
        (-2.12, -1.79, "far from 0 beside how much they vary; check --mean and --std"),
        *(
            (low, high, None)
            for low, high in ((0, 1), (-1, 1), (-2.2, 2.7), (-124, 151), (0.2, 0.3), (0, 6), (-0.4, 2.9))
        ),
    ],
)
def test_implausible_ranges(low, high, message):
    (spec,) = image_input(None, 3, 8, 8)
    hint = implausible(spec, FeedRange(low, high, (low + high) / 2, 1))
    assert hint is None if message is None else message in hint


def test_implausible_says_nothing_about_what_is_no_float_image():
    for spec in (*VECTOR, *image_input(None, 3, 8, 8, dtype=np.uint8), *image_input(None, 64, 8, 8)):
        assert implausible(spec, FeedRange(0, 255, 100, 1)) is None


def test_no_preprocessing_is_blamed_for_what_arrays_hold():
    (spec,) = image_input(None, 1, 8, 8)
    assert implausible(spec, FeedRange(-80, -70, -75, 1), arrays=True) is None
    assert "far from 0" in str(implausible(spec, FeedRange(-80, -70, -75, 1)))


def test_subset_spreads_over_all_samples_and_repeats() -> None:
    x = np.arange(100, dtype=np.float32).reshape(100, 1)
    batches = open_data(x, [InputSpec("x", (None, 1), np.dtype(np.float32))], batch_size=8)
    subset = batches.subset(10, seed=1)
    rows = np.concatenate([batch["x"] for batch in subset])[:, 0]
    assert subset.num_samples == 10
    assert (np.diff(rows) > 0).all()
    assert rows.max() > 50
    np.testing.assert_array_equal(rows, np.concatenate([batch["x"] for batch in batches.subset(10, seed=1)])[:, 0])
    assert batches.subset(1000).num_samples == 100
