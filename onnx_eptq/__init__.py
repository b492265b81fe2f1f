"""Post-training quantization from a float ONNX file to a verified low-bit QDQ ONNX file."""

from __future__ import annotations

from importlib import metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnx_eptq.config import Config
    from onnx_eptq.mixed import Mixed
    from onnx_eptq.pipeline import Result, explore, quantize

__all__ = ["Config", "Mixed", "Result", "__version__", "explore", "quantize"]

try:
    __version__ = metadata.version("onnx-eptq")
except metadata.PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"


def __getattr__(name: str) -> Any:
    """Import the API on first use: `import onnx_eptq` alone must not pay for torch and onnxruntime."""
    if name == "Config":
        from onnx_eptq.config import Config

        return Config
    if name == "Mixed":
        from onnx_eptq.mixed import Mixed

        return Mixed
    if name in ("Result", "explore", "quantize"):
        from onnx_eptq import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
