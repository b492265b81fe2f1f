"""The state of a long run in one safetensors file, written atomically."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from onnx_eptq.errors import OutputError, UsageError

ADVICE = "repeat them as they were, or start anew without --resume"


@dataclass
class State:
    """Tensors by name, and everything else as plain data."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names start with `prefix`, without it."""
        return {name.removeprefix(prefix): value for name, value in self.tensors.items() if name.startswith(prefix)}


def save(path: Path, state: State, fingerprint: str) -> None:
    """Write the file beside its final place first: whoever is killed meanwhile keeps the earlier one."""
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.tensors.items()}
    staged = path.with_name(f"{path.name}.{os.getpid()}.part")  # another run may have the same output
    try:
        save_file(tensors, staged, {"fingerprint": fingerprint, "facts": json.dumps(state.facts)})
        staged.replace(path)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            staged.unlink()
        raise OutputError(
            f"the checkpoint {path} cannot be written: {getattr(error, 'strerror', None) or error}"
        ) from error


def load(path: Path, fingerprint: str) -> State:
    """Read what `save` wrote.

    Raises:
        UsageError: the file is no checkpoint, or one of another model, data or settings.
    """
    with _reading(path) as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
        facts = json.loads(metadata["facts"])
    if metadata.get("fingerprint") != fingerprint:
        raise UsageError(f"the checkpoint {path} belongs to another model, data, plan or settings; {ADVICE}")
    return State(tensors, facts)


def check_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Raise UsageError for a file that is no checkpoint, or one of other settings, before what `load` compares is known."""
    with _reading(path) as file:
        saved = json.loads((file.metadata() or {})["fingerprint"])["settings"]
    differing = [
        f"{name} {saved.get(name)}, not {value}" for name, value in settings.items() if saved.get(name) != value
    ]
    if differing:
        raise UsageError(
            f"the checkpoint {path} belongs to a run with other settings ({'; '.join(differing)}); {ADVICE}"
        )


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[Any]:
    """The open file; whatever is wrong with it while it is read becomes one UsageError."""
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise UsageError(f"{path} is not a checkpoint that can be read ({error}); delete it and start anew") from error


def mark(settings: Mapping[str, Any], parts: Iterable[bytes | str]) -> str:
    """A fingerprint that tells the settings of its run, and beside them that of all else which decides the result."""
    return json.dumps({"settings": dict(settings), "rest": fingerprint(parts)})


def fingerprint(parts: Iterable[bytes | str]) -> str:
    """A key of everything that decides a result."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()[:32]
