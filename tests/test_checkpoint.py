"""Checkpoints: what is saved is what is read, and whatever else lies there is refused in one sentence."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from onnx_eptq.checkpoint import State, check_settings, fingerprint, load, mark, save
from onnx_eptq.errors import OutputError, UsageError

FACTS = {"stage": 1, "learning": {"distances": {"rtn": 0.25}, "curve": [{"step": 3, "loss": 1e-30}]}, "text": "häß"}


def state():
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(3, 4, generator=generator)
    return State(
        {
            "student.w": weights,
            "student.w_turned": weights.T,
            "best.w": weights,  # shared storage
            "best.zero_point": torch.tensor([3, -1], dtype=torch.int32),
            "optimizer.0.step": torch.tensor(7.0),
            "empty": torch.empty(0, 2),
        },
        FACTS,
    )


def test_what_is_saved_is_read(tmp_path):
    path, saved = tmp_path / "c", state()
    save(path, saved, "mark")
    found = load(path, "mark")
    assert found.facts == FACTS
    assert set(found.tensors) == set(saved.tensors)
    for name, tensor in saved.tensors.items():
        assert torch.equal(found.tensors[name], tensor)
        assert found.tensors[name].dtype == tensor.dtype
    assert set(found.part("best.")) == {"w", "zero_point"}
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_a_second_save_replaces_the_first(tmp_path):
    path = tmp_path / "c"
    save(path, State({"a": torch.zeros(3)}, {"step": 1}), "mark")
    save(path, State({"b": torch.ones(2)}, {"step": 2}), "mark")
    assert load(path, "mark").facts == {"step": 2}
    assert set(load(path, "mark").tensors) == {"b"}


def test_a_save_that_fails_keeps_the_earlier_one(tmp_path, monkeypatch):
    path = tmp_path / "c"
    save(path, state(), "mark")

    def full(tensors, staged, metadata):
        staged.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("onnx_eptq.checkpoint.save_file", full)
    with pytest.raises(OutputError, match="cannot be written: No space left"):
        save(path, State({}, {"step": 9}), "mark")
    assert load(path, "mark").facts == FACTS
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_a_folder_that_is_gone_is_an_output_error(tmp_path):
    with pytest.raises(OutputError, match="cannot be written"):
        save(tmp_path / "gone" / "c", state(), "mark")


def test_another_run_is_refused(tmp_path):
    save(tmp_path / "c", state(), "mark")
    with pytest.raises(UsageError, match=r"belongs to another model, data, plan or settings.*--resume"):
        load(tmp_path / "c", "other")


def test_settings_that_differ_are_named(tmp_path):
    path = tmp_path / "c"
    save(path, state(), mark({"seed": 1, "steps": None, "bits": {"a": (2, 4)}}, ["rest"]))
    check_settings(path, {"seed": 1, "steps": None, "bits": {"a": [2, 4]}})
    with pytest.raises(UsageError, match=r"other settings \(seed 1, not 2; steps None, not 7\).*--resume"):
        check_settings(path, {"seed": 2, "steps": 7, "bits": {"a": [2, 4]}})
    path.write_bytes(b"no checkpoint")
    with pytest.raises(UsageError, match="is not a checkpoint that can be read"):
        check_settings(path, {})


def test_two_runs_with_one_output_do_not_meet(tmp_path, monkeypatch):
    """Each writes beside it under a name of its own."""
    path, staged = tmp_path / "c", []

    def meet(tensors, place, metadata):
        staged.append(place)
        if len(staged) == 1:
            with monkeypatch.context() as patch:
                patch.setattr("os.getpid", lambda: -1)
                save(path, State({"b": torch.ones(2)}, {}), "other")
        save_file(tensors, place, metadata)

    monkeypatch.setattr("onnx_eptq.checkpoint.save_file", meet)
    save(path, State({"a": torch.zeros(3)}, {}), "mark")
    assert len(set(staged)) == 2
    assert set(load(path, "mark").tensors) == {"a"}


def test_what_is_no_checkpoint_is_refused(tmp_path):
    path = tmp_path / "c"
    with pytest.raises(UsageError, match="is not a checkpoint that can be read"):
        load(path, "mark")
    path.mkdir()
    with pytest.raises(UsageError, match="is not a checkpoint that can be read"):
        load(path, "mark")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.floats(0, 1))
def test_files_cut_short_are_refused(tmp_path, where):
    path = tmp_path / "c"
    save(path, state(), "mark")
    data = path.read_bytes()
    path.write_bytes(data[: int(where * (len(data) - 1))])
    with pytest.raises(UsageError, match=r"is not a checkpoint that can be read.*start anew"):
        load(path, "mark")


@pytest.mark.parametrize("at", [0, 7, 9, 40])
def test_damaged_heads_are_refused(tmp_path, at):
    path = tmp_path / "c"
    save(path, state(), "mark")
    data = bytearray(path.read_bytes())
    data[at : at + 8] = b"\xff" * 8
    path.write_bytes(data)
    with pytest.raises(UsageError, match="is not a checkpoint that can be read"):
        load(path, "mark")


def test_keys_tell_parts_apart():
    assert len({fingerprint(parts) for parts in (["ab", "c"], ["a", "bc"], [b"abc"], ["abc", ""])}) == 4
