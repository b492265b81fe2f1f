"""The Label-Free Hessian (LFH) against the Hessian of task losses, layer by layer, and how fast its estimate converges.

study_lfh.py [MODEL CALIB] [--samples 32] [--probes 64] [--seeds 3] [--chart FILE.png] [preprocessing options]

The traces of the true Hessians, with respect to each linear layer's output, are estimated with Rademacher vectors through
two backward passes: of cross-entropy with the float model's own labels, and of the squared distance from those labels.
Log-normalised, they are set beside LFH (figures 2 and 3 of arXiv 2309.11531). The second table gives the error of estimates
from few vectors against exact values, which need one backward pass per output.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common import add_demo, add_preprocessing, chart, markdown, preprocessing_settings
from torch import Tensor

from onnx_eptq import hessian, pieces, pipeline
from onnx_eptq.outputs import learning_targets
from onnx_eptq.plan import Layer

Traces = dict[str, Tensor]  # by layer output; shape [samples]
Loss = Callable[[Tensor], Tensor]  # outputs [samples, d] -> one loss per sample


class Study:
    """A float network, some samples, and its linear layers."""

    def __init__(self, options: argparse.Namespace) -> None:
        job = pipeline.begin(options.model, options.calib, threads=options.threads, **preprocessing_settings(options))
        self.teacher, batches, self.graph = pipeline.make_teacher(job)
        self.layers: list[Layer] = pipeline.linear_layers(self.graph)
        everything = pipeline.load_samples(self.teacher, batches)
        chosen = hessian.sample_ids(len(everything[0]), options.samples, options.seed)
        self.samples, self.batch = [x[chosen] for x in everything], options.batch
        raw, self.targets = pieces.raw_nodes(self.teacher), learning_targets(self.graph)
        if len(self.targets) != 1:
            sys.exit(
                f"{options.model} has {len(self.targets)} outputs to learn from; one is wanted, with a score per class"
            )
        self.names = [layer.output.name for layer in self.layers]
        wanted = [raw[name] for name in (*self.names, *self.targets)]
        self.function = pieces.function(self.teacher, pieces.placeholders(self.teacher), wanted)

    def passes(self) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
        """Layer outputs and network outputs [samples, d], batch by batch."""
        for start in range(0, len(self.samples[0]), self.batch):
            inputs = [x[start : start + self.batch].detach() for x in self.samples]
            *values, z = self.function(*[x.requires_grad_(x.is_floating_point()) for x in inputs])
            yield tuple(values), z.reshape(len(inputs[0]), -1)

    def label_free(self) -> Traces:
        """LFH, exact."""
        traces, _ = hessian.label_free_hessian(
            self.teacher, self.graph, self.layers, self.samples, probes=sys.maxsize, batch=self.batch
        )
        return traces

    def gathered(self, parts: list[list[Tensor]]) -> Traces:
        """Per layer, the parts of all batches joined along the last axis."""
        return {
            name: torch.cat(list(found), -1) for name, found in zip(self.names, zip(*parts, strict=True), strict=True)
        }


def cross_entropy(z: Tensor) -> Tensor:
    """Cross-entropy with the float model's own labels, per sample."""
    return F.cross_entropy(z, z.detach().argmax(1), reduction="none")


def squared(z: Tensor) -> Tensor:
    """Mean squared distance from the float model's own labels, per sample."""
    return (z - F.one_hot(z.detach().argmax(1), z.shape[1])).square().mean(1)


def rademacher(like: Tensor, generator: torch.Generator) -> Tensor:
    """A random sign for every element."""
    return (torch.randint(0, 2, like.shape, generator=generator).float() * 2 - 1).to(like.device)


def hessian_traces(study: Study, loss: Loss, probes: int, seed: int) -> Traces:
    """v' H v of the loss, per layer, vector and sample: [probes, samples], by two backward passes each."""
    generator, parts = torch.Generator().manual_seed(seed), []
    for values, z in study.passes():
        first = torch.autograd.grad(loss(z).sum(), values, create_graph=True)
        parts.append([_quadratic(g, value, probes, generator) for g, value in zip(first, values, strict=True)])
    return study.gathered(parts)


def _quadratic(gradient: Tensor, value: Tensor, probes: int, generator: torch.Generator) -> Tensor:
    found = []
    for _ in range(probes):
        v = rademacher(value, generator)
        if not gradient.requires_grad:  # the loss is linear in the value
            return torch.zeros(probes, len(value), dtype=torch.float64)
        (product,) = torch.autograd.grad(gradient, value, v, retain_graph=True, materialize_grads=True)
        found.append(_per_sample(product.double() * v, value))
    return torch.stack(found)


def lfh_estimates(study: Study, probes: int, seed: int) -> Traces:
    """|v' J|**2 per layer, vector and sample: [probes, samples]."""
    generator, parts = torch.Generator().manual_seed(seed), []
    for values, z in study.passes():
        found = [
            [_per_sample(g.double().square() * probes, g) for g in torch.autograd.grad(z, values, v, retain_graph=True)]
            for v in hessian.directions(z.shape[1], len(z), probes, False, generator)
        ]
        parts.append([torch.stack(of_layer) for of_layer in zip(*found, strict=True)])
    return study.gathered(parts)


def exact_traces(study: Study, factors: Callable[[Tensor], Iterator[Tensor]]) -> Traces:
    """Tr(J' A J) per layer and sample, where A is the sum of v v' over `factors`, of shape [samples, d] each.

    It is the whole Hessian's trace where the network is piecewise linear between the layer and its outputs.
    """
    parts = []
    for values, z in study.passes():
        total = [torch.zeros(len(z), dtype=torch.float64) for _ in values]
        for v in factors(z.detach()):
            for index, g in enumerate(torch.autograd.grad(z, values, v, retain_graph=True)):
                total[index] += _per_sample(g.double().square(), g)
        parts.append(total)
    return study.gathered(parts)


def curvature(z: Tensor) -> Iterator[Tensor]:
    """Columns of a square root of diag(p) - p p', the Hessian of cross-entropy."""
    p = z.softmax(1)
    roots = torch.diag_embed(p.sqrt()) - p[:, :, None] * p.sqrt()[:, None, :]
    return iter(roots.unbind(2))


def evenly(z: Tensor) -> Iterator[Tensor]:
    """Columns of a square root of 2 / d, the Hessian of the mean square."""
    d = z.shape[1]
    return iter((torch.eye(d) * (2 / d) ** 0.5)[:, None, :].expand(d, len(z), d))


def _per_sample(square: Tensor, value: Tensor) -> Tensor:
    return square.reshape(len(value), -1).sum(1).detach().cpu()


def ranks(numbers: list[float]) -> np.ndarray:
    """Rank of each number, equal ones sharing theirs."""
    array = np.asarray(numbers)
    return (array[:, None] > array).sum(1) + 0.5 * (array[:, None] == array).sum(1)


def correlation(a: list[float], b: list[float]) -> float:
    """Pearson's; of ranks it is Spearman's."""
    return float(np.corrcoef(a, b)[0, 1])


def compare(study: Study, columns: dict[str, Traces]) -> tuple[str, dict[str, Any]]:
    """Log-normalised traces side by side, and how well each ranks the layers like the first column."""
    logs = {title: list(hessian.log_normalised(traces).values()) for title, traces in columns.items()}
    titles = list(logs)
    names = [layer.node.name or layer.output.name for layer in study.layers]
    rows: list[list[object]] = [[name, *(round(logs[t][i], 3) for t in titles)] for i, name in enumerate(names)]
    rank = {t: correlation(list(ranks(logs[titles[0]])), list(ranks(logs[t]))) for t in titles[1:]}
    plain = {t: correlation(logs[titles[0]], logs[t]) for t in titles[1:]}
    rows.append(["**rank correlation with LFH**", None, *(round(rank[t], 3) for t in titles[1:])])
    rows.append(["**correlation with LFH**", None, *(round(plain[t], 3) for t in titles[1:])])
    return markdown(["layer", *titles], rows), {"layers": names, "log": logs, "rank": rank, "correlation": plain}


def errors(estimates: Traces, exact: Traces, counts: list[int]) -> list[tuple[float, float]]:
    """Relative error after that many vectors: of layers' means over samples (root mean square), of single samples (median)."""
    found = []
    for count in counts:
        means = {name: values[:count].mean(0) for name, values in estimates.items()}
        layers = [float(means[name].mean() / exact[name].mean() - 1) for name in exact]
        single = torch.cat([(means[name] / exact[name] - 1).abs() for name in exact])
        found.append((float(np.sqrt(np.mean(np.square(layers)))), float(single.nanmedian())))
    return found


def convergence(
    runs: dict[str, list[Traces]], exact: dict[str, Traces], counts: list[int]
) -> tuple[str, dict[str, Any]]:
    """Errors in percent by number of vectors, mean over seeds."""
    table = {
        title: np.mean([errors(traces, exact[title], counts) for traces in each], 0) for title, each in runs.items()
    }
    header = ["vectors", *(f"{title}, {what}, %" for title in table for what in ("layers", "single samples"))]
    rows = [
        [count, *(round(100 * float(value), 2) for pairs in table.values() for value in pairs[i])]
        for i, count in enumerate(counts)
    ]
    return markdown(header, rows), {"vectors": counts, **{title: pairs.tolist() for title, pairs in table.items()}}


def draw(path: Path, compared: dict[str, Any], converged: dict[str, Any]) -> None:
    """Both tables as charts."""
    with chart(path, 2) as (left, right):
        for title, values in compared["log"].items():
            left.plot(values, marker="o", label=title)
        left.set(xlabel="layer, in order", ylabel="log10 of the trace, least layer at 0")
        left.legend()
        for title, pairs in converged.items():
            if title != "vectors":
                right.loglog(converged["vectors"], [100 * pair[0] for pair in pairs], marker="o", label=title)
        right.set(xlabel="Rademacher vectors", ylabel="relative error of layers, %")
        right.legend()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_demo(parser)
    parser.add_argument("--samples", type=int, default=16, help="calibration samples to average over")
    parser.add_argument("--probes", type=int, default=32, help="Rademacher vectors of the true Hessians")
    parser.add_argument("--seeds", type=int, default=3, help="repetitions of the estimates whose errors are given")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--chart", type=Path, help="draw both tables into this file; needs matplotlib")
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    add_preprocessing(parser)
    return parser.parse_args()


def main() -> None:
    options = arguments()
    study = Study(options)
    seeds = range(options.seed, options.seed + options.seeds)
    d = next(study.passes())[1].shape[1]
    losses: dict[str, tuple[Loss, Callable[[Tensor], Iterator[Tensor]]]] = {"MSE": (squared, evenly)}
    if d > 1:
        losses = {"cross-entropy": (cross_entropy, curvature), **losses}
    lfh = study.label_free()
    runs = {"LFH": [lfh_estimates(study, options.probes, seed) for seed in seeds]}
    runs |= {
        title: [hessian_traces(study, loss, options.probes, s) for s in seeds] for title, (loss, _) in losses.items()
    }
    exact = {"LFH": lfh, **{title: exact_traces(study, factors) for title, (_, factors) in losses.items()}}
    true = {title: {name: t.mean(0) for name, t in runs[title][0].items()} for title in losses}
    text, compared = compare(study, {"LFH": lfh, **{f"Hessian of {title}": found for title, found in true.items()}})
    counts = [1 << k for k in range(options.probes.bit_length())]
    errors_text, converged = convergence(runs, exact, counts)
    print(f"log10 of traces, normalised per sample, less the least layer's ({options.samples} samples):\n\n{text}")
    print(f"\nRelative error of estimates against exact values ({d} outputs):\n\n{errors_text}")
    if options.chart:
        draw(options.chart, compared, converged)
    if options.json:
        options.json.write_text(json.dumps({"layers": compared, "convergence": converged}, indent=1) + "\n")


if __name__ == "__main__":
    main()
