"""Size against expected loss, for people: tables for the terminal, a chart where matplotlib is installed."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from onnx_eptq.errors import OutputError, UsageError
from onnx_eptq.mixed import Mixed, Point

BAR = 24  # characters of the longest bar


def sensitivities(mixed: Mixed) -> Table:
    """Expected loss by quantizer and width."""
    widths = sorted({bits for group in mixed.groups for bits in group.widths})
    table = Table("quantizer", "role", "elements", *(f"{bits} bit" for bits in widths), title="expected loss")
    for column in table.columns[2:]:
        column.justify = "right"
    tensors = mixed.graph.tensors()
    for group in mixed.groups:
        if group.role == "weight":
            count = math.prod(map(int, tensors[group.name].shape))
        else:
            count = math.ceil(mixed.counts.get(group.name, (0.0, 0))[0])
        row = mixed.program.terms[group.name]
        numbers = [f"{row[bits]:.2e}" if bits in row else "" for bits in widths]
        table.add_row(group.name, group.role, f"{count:,}", *numbers)
    return table


def front(points: Sequence[Point]) -> Table:
    """The Pareto front: sizes, bits, loss; the bars are logarithmic."""
    table = Table(
        "file", "weights", "average", "expected loss", "", "bits of the layers", title="size against expected loss"
    )
    for column in table.columns[:3]:
        column.justify = "right"
    losses = [max(point.allocation.expected_loss, 1e-12) for point in points]
    low, high = math.log(min(losses)), math.log(max(losses))
    for point, loss in zip(points, losses, strict=True):
        length = 1 + round((BAR - 1) * (math.log(loss) - low) / ((high - low) or 1.0))
        found = point.allocation
        table.add_row(
            f"{point.file_bytes:,}",
            f"{point.weight_bytes:,}",
            f"{found.average_bits:.2f}",
            f"{found.expected_loss:.3e}",
            "█" * length,
            " ".join(map(str, found.weights.values())),
        )
    return table


def show(mixed: Mixed, points: Sequence[Point]) -> None:
    """Print both tables to standard output, as wide as they need."""
    console = Console(width=None if sys.stdout.isatty() else 400, highlight=False)
    console.print(sensitivities(mixed))
    console.print(front(points))


def to_json(mixed: Mixed, points: Sequence[Point]) -> str:
    """All of it as JSON text."""
    groups = [{**asdict(group), "loss": mixed.program.terms[group.name]} for group in mixed.groups]
    return json.dumps({"quantizers": groups, "front": [point.to_json() for point in points]}, indent=1)


def check_chart(path: Path) -> None:
    """Raise UsageError before any work when no chart can be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UsageError(
            "--chart needs matplotlib, which is not installed: pip install matplotlib (the tables are printed without it)"
        ) from None
    if not path.absolute().parent.is_dir():
        raise UsageError(f"cannot write {path}: its folder does not exist")


def chart(points: Sequence[Point], path: Path) -> None:
    """Draw the front, and below it the bits of every layer at each of its points."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    layers = list(points[0].allocation.weights)
    figure, (above, below) = pyplot.subplots(2, 1, figsize=(9, 5 + 0.16 * len(layers)), layout="constrained")
    above.plot([p.file_bytes / 1000 for p in points], [p.allocation.expected_loss for p in points], "o-")
    above.set(xlabel="file, kB", ylabel="expected loss", yscale="log")
    for point in points:
        above.annotate(
            f"{point.allocation.average_bits:.1f}", (point.file_bytes / 1000, point.allocation.expected_loss)
        )
    bits = [[point.allocation.weights[layer] for point in points] for layer in layers]
    image = below.imshow(bits, aspect="auto", cmap="viridis", vmin=2, vmax=8)
    below.set_yticks(range(len(layers)), layers, fontsize=6)
    below.set_xticks(range(len(points)), [f"{point.allocation.average_bits:.1f}" for point in points])
    below.set_xlabel("average bits of the weights")
    figure.colorbar(image, ax=below, label="bits")
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise OutputError(f"the chart {path} cannot be written: {error}") from error
    finally:
        pyplot.close(figure)
