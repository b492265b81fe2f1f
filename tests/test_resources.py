"""What widths cost, against written files, hand-made figures and brute force over the walk."""

import json
import math
import random
from dataclasses import replace

import numpy as np
import pytest

import models
from models import MODELS, ORT_TARGET
from onnx_eptq import resources
from onnx_eptq.calibrate import calibrate, feed, fit_biases
from onnx_eptq.errors import UsageError
from onnx_eptq.mirror import build
from onnx_eptq.ops import op_of
from onnx_eptq.plan import Rules, is_constant, linear_layers
from onnx_eptq.resources import CostRow
from onnx_eptq.widths import Asked, candidates, with_widths
from onnx_eptq.write import write

ASKED = Asked((2, 3, 4, 8), (4, 8))


def grouped(name, asked=ASKED, rules=None):
    case = models.cached(name)
    plan, groups = candidates(case.graph, ORT_TARGET, rules or Rules(), asked)
    return case, plan, groups, resources.elements(case.teacher, feed(case.teacher, case.batches[0]))


def some(groups, seed):
    generator = random.Random(seed)
    return {group.name: generator.choice(group.widths) for group in groups}


def at(groups, weights, activations):
    wanted = {"weight": weights, "activation": activations}
    return {g.name: wanted[g.role] if wanted[g.role] in g.widths else g.widest for g in groups}


BOUNDS = {  # which constants bound three Clips
    "one for all": ("zero six", "zero six", "zero six"),
    "each its own": ("zero one", "zero six", "zero ten"),
    "one ends where the next begins": ("zero one", "one six", "zero six"),
    "one is an operand, too": ("zero six", "zero ten", "zero one"),
}


@pytest.mark.parametrize("bounds", BOUNDS)
def test_bounds_that_narrower_grids_do_without_are_counted(bounds):
    first, second, third = (", ".join(pair.split()) for pair in BOUNDS[bounds])
    text = f"""(float[N,4] x) => (float[N,3] y) {{ a = MatMul(x, w1) b = Clip(a, {first}) c = MatMul(b, w2) d = Clip(c, {second})
      e = MatMul(d, w3) f = Clip(e, {third}) {"g = Mul(f, ten)" if "operand" in bounds else "g = Neg(f)"} y = MatMul(g, w4) }}"""
    draw = models.weights(60)
    numbers = {
        name: np.float32(value) for name, value in {"zero": 0, "one": 1, "six": 6, "ten": 10}.items() if name in text
    }
    case = models.quantize(
        models.parse(text, w1=draw(4, 5), w2=draw(5, 5), w3=draw(5, 5), w4=draw(5, 3), **numbers), Rules(8, 8)
    )
    plan, groups = candidates(case.graph, ORT_TARGET, Rules(), Asked((8,), (4, 8)))
    found = resources.sizes(case.graph, plan, groups, ORT_TARGET.storage)
    for seed in range(8):
        choice = some(groups, seed)
        chosen = with_widths(plan, choice)
        student = build(case.graph, chosen, calibrate(chosen, case.stats, case.teacher))
        fit_biases(student, chosen)
        written = write(case.graph, chosen, student.export(chosen), ORT_TARGET.storage).SerializeToString()
        assert found.file.use(choice) == found.file.amounts[0].of(choice) == len(written)


@pytest.mark.parametrize("form", ["target", "int4", "int8"])
@pytest.mark.parametrize("name", MODELS)
def test_file_and_weights_are_as_large_as_written(name, form):
    case, plan, groups, _ = grouped(name)
    storage = ORT_TARGET.storage if form == "target" else {b: form if b <= 4 else "int8" for b in ORT_TARGET.storage}
    found = resources.sizes(case.graph, plan, groups, storage)
    for seed in range(3):
        choice = some(groups, seed)
        chosen = with_widths(plan, choice)
        student = build(case.graph, chosen, calibrate(chosen, case.stats, case.teacher))
        fit_biases(student, chosen)
        written = write(case.graph, chosen, student.export(chosen), storage).SerializeToString()
        assert found.file.use(choice) == found.file.amounts[0].of(choice) == len(written)
        packed = {"target": 1, "int4": 4, "int8": 8}[form]
        expected = 0
        for layer in {layer.weight.name: layer for layer in case.layers}.values():
            if layer.weight.name not in plan:
                expected += 4 * math.prod(layer.weight.shape)
                continue
            bits, count = choice[layer.weight.name], math.prod(layer.weight.shape)
            stored = 8 if bits > 4 else max(bits, packed)
            expected += 3 * math.ceil(count / 8) if stored == 3 else math.ceil(count * stored / 8)
        assert found.weights.use(choice) == expected


def test_weights_kept_float_count_as_such():
    case, plan, groups, _ = grouped("residual", rules=Rules(keep_float=["w3"]))
    found = resources.sizes(case.graph, plan, groups, ORT_TARGET.storage)
    assert found.weights.use(at(groups, 4, 8)) == (6 * 3 * 9 + 6 * 6 * 9) / 2 + 4 * 30
    assert found.float_bytes == 4 * (6 * 3 * 9 + 6 * 6 * 9 + 30)


def test_activation_memory_of_a_residual_block_by_hand():
    _, plan, groups, counts = grouped("residual")
    memory = resources.activation_memory(models.cached("residual").graph, plan, groups, counts)
    image, b, c, e = 3 * 8 * 8, 6 * 4 * 4, 6 * 4 * 4, 6 * 4 * 4  # the Add's own result is fused into the Relu behind it
    assert memory.use(at(groups, 8, 8)) == max(image + b, b + c, b + c + e)
    assert memory.use(at(groups, 8, 4)) == max(image + b / 2, b / 2 + c + e / 2)  # c and the image keep 8 bits
    wide = {**at(groups, 8, 8), "b": 4}
    assert memory.use(wide) == max(image + b / 2, b / 2 + c + e)


def peak(graph, plan, counts):
    """By walking the nodes and asking each value who still reads it."""
    fused = {t.name for n in graph.nodes for t in n.outputs if t.name not in plan and t.name not in plan.floats}
    fused -= {t.name for t in graph.outputs} | {
        t.name for n in graph.nodes for t in n.outputs if not resources.is_float(t)
    }
    order = {id(node): index for index, node in enumerate(graph.nodes)}

    def readers(tensor):
        for node in tensor.outputs:
            yield order[id(node)]
            for out in node.outputs:
                if out.name in fused:
                    yield from readers(out)

    def size(name):
        count, each = counts.get(name, (0, 0))
        return math.ceil(count * plan[name].grid.bits / 8) if name in plan else math.ceil(count) * each

    spans = []
    for tensor in graph.tensors().values():
        if is_constant(tensor) or tensor.name in fused or (not tensor.inputs and tensor not in graph.inputs):
            continue
        start = order[id(tensor.inputs[0])] if tensor.inputs else 0
        end = len(graph.nodes) if tensor in graph.outputs else max(readers(tensor), default=start)
        spans.append((start, end, size(tensor.name)))
    return max(sum(s for start, end, s in spans if start <= index <= end) for index in range(len(graph.nodes)))


@pytest.mark.parametrize("name", MODELS)
def test_activation_memory_is_the_peak_of_what_is_alive(name):
    case, plan, groups, counts = grouped(name)
    memory = resources.activation_memory(case.graph, plan, groups, counts)
    for seed in range(4):
        choice = some(groups, seed)
        assert memory.use(choice) == peak(case.graph, with_widths(plan, choice), counts)


MACS = {
    "residual": [6 * 4 * 4 * 27, 6 * 4 * 4 * 54, 5 * 6],
    "depthwise": [8 * 7 * 7 * 27, 8 * 4 * 4 * 4, 4 * 4 * 4 * 8],
    "gemm": [36, 36],
    "matmul": [4 * 6 * 8, 4 * 8 * 8, 4 * 8 * 5],
    "transposed": [4 * 4 * 4 * 6 * 9, 6 * 9 * 9 * 2 * 9],
    "images1d": [4 * 12 * 2 * 3, 4 * 3],
}


@pytest.mark.parametrize("name", MACS)
def test_multiplications_by_hand(name):
    case, _, _, counts = grouped(name)
    assert [resources.macs(layer.node, layer, counts) for layer in case.layers] == MACS[name]


@pytest.mark.parametrize("name", MODELS)
def test_bit_operations_are_the_sum_over_layers(name):
    case, plan, groups, counts = grouped(name)
    operations = resources.bit_operations(case.graph, plan, groups, counts)
    for seed in range(3):
        choice = some(groups, seed)
        chosen = with_widths(plan, choice)
        total = 0.0
        layers = {id(layer.node): layer for layer in linear_layers(case.graph)}
        for node in case.graph.nodes:
            if op_of(node).role_of(node.attrs) == "linear":
                bits = [chosen[t.name].grid.bits if t.name in chosen else 32 for t in node.inputs[:2]]
                total += resources.macs(node, layers.get(id(node)), counts) * bits[0] * bits[1]
        assert operations.use(choice) == pytest.approx(total, rel=1e-9)


def test_products_of_activations_count():
    case, plan, groups, counts = grouped("attention")
    operations = resources.bit_operations(case.graph, plan, groups, counts)
    by_name = {node.name: node for node in case.graph.nodes}
    scores = next(n for n in by_name.values() if n.op == "MatMul" and not any(map(is_constant, n.inputs)))
    assert resources.macs(scores, None, counts) == 4 * 4 * 6
    assert any(not is_constant(case.graph.tensors()[a]) for a, _ in operations.amounts[0].pairs)


def test_costs_by_operator_shape_layer_and_bits(tmp_path):
    case, plan, groups, _ = grouped("residual")
    rows = [
        {"op": "Conv", "shape": [6, 3, 3, 3], "weight_bits": 2, "cost": 1},
        {"op": "Conv", "shape": [6, None, 3, 3], "act_bits": 4, "cost": 10},
        {"op": "Conv", "cost": 100},
        {"layer": "Gemm*", "cost": 1000},
    ]
    path = tmp_path / "costs.json"
    path.write_text(json.dumps({"unit": "ms", "rows": rows}))
    unit, table = resources.read_costs(path)
    assert table[1] == CostRow(10, "Conv", (6, None, 3, 3), act_bits=4)
    cost = resources.costs(case.graph, plan, groups, unit, table)
    assert cost.spell(cost.use(at(groups, 2, 4))) == "1,011 ms"  # the image keeps 8 bits, so only the first row fits w1
    assert cost.use(at(groups, 4, 4)) == 100 + 10 + 1000
    assert cost.use(at(groups, 4, 8)) == 100 + 100 + 1000
    with pytest.raises(UsageError, match=r"no row for 'Gemm.*' \(Gemm \[5, 6\]\) at 2/4 bits.* and \d+ more"):
        resources.costs(case.graph, plan, groups, unit, table[:3])


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"rows": [{}]}', '{"rows": [{"cost": "x"}]}', '{"rows": [{"cost": 1, "a": 2}]}']
)
def test_text_that_is_no_cost_table(tmp_path, text):
    path = tmp_path / "costs.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"the cost table .* is not"):
        resources.read_costs(path)
    with pytest.raises(UsageError, match="cannot read"):
        resources.read_costs(tmp_path / "none.json")


def test_a_narrower_width_never_takes_more():
    for name in ("residual", "attention", "concat"):
        case, plan, groups, counts = grouped(name)
        for resource in (
            resources.activation_memory(case.graph, plan, groups, counts),
            resources.bit_operations(case.graph, plan, groups, counts),
            resources.sizes(case.graph, plan, groups, dict.fromkeys(ORT_TARGET.storage, "int8")).weights,
        ):
            assert resource.use(at(groups, 2, 4)) <= resource.use(at(groups, 4, 4)) <= resource.use(at(groups, 8, 8))


def test_one_choice_of_storage_is_part_of_the_size():
    case, plan, groups, _ = grouped("gemm")
    target = replace(ORT_TARGET, storage={**ORT_TARGET.storage, 2: "int8"})
    found = resources.sizes(case.graph, plan, groups, target.storage)
    assert found.weights.use(at(groups, 2, 8)) == 72
