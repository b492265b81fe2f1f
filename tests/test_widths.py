"""Which quantizers choose together, and what they may choose."""

from dataclasses import replace

import pytest

import models
from models import MODELS, ORT_TARGET
from onnx_eptq.errors import UsageError
from onnx_eptq.plan import Rules, check_plan, make_plan
from onnx_eptq.widths import Asked, candidates, with_widths

ASKED = Asked((2, 4, 8), (4, 8))
CONV_4_8 = replace(ORT_TARGET, op_bits={"Conv": (4, 8)})


def found(name, asked=ASKED, target=ORT_TARGET, rules=None):
    graph = models.cached(name).graph
    plan, groups = candidates(graph, target, rules or Rules(), asked)
    return graph, plan, {group.name: group for group in groups}


@pytest.mark.parametrize("name", MODELS)
def test_every_quantizer_is_in_one_group_and_any_choice_fits_the_model(name):
    graph, plan, groups = found(name)
    members = [value for group in groups.values() for value in group.values]
    assert sorted(members) == sorted(v for v, p in plan.items() if p.role in ("weight", "activation"))
    for end in (0, -1):
        chosen = with_widths(plan, {group.name: group.widths[end] for group in groups.values()})
        check_plan(graph, ORT_TARGET, chosen)
        assert {v: chosen[v].grid.bits for g in groups.values() for v in g.values} == {
            v: g.widths[end] for g in groups.values() for v in g.values
        }


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", MODELS)
def test_the_plan_of_one_width_is_the_plan_without_choice(name, bits):
    graph, plan, _ = found(name, Asked((3,), (bits,)))
    assert plan.to_json() == make_plan(graph, ORT_TARGET, Rules(3, bits)).to_json()


def test_inputs_and_output_of_a_concat_choose_together():
    _, _, groups = found("concat")
    (joined,) = [group for group in groups.values() if "joined" in group.values]
    assert set(joined.values) == {"left", "right", "joined"}
    assert joined.widths == (4, 8)


def test_inputs_and_outputs_of_the_network_keep_eight_bits_unless_named():
    _, _, groups = found("residual")
    assert groups["image"].widths == groups["logits"].widths == (8,)
    assert groups["b"].widths == (4, 8)
    _, _, groups = found("residual", Asked((4,), (4, 8), {"image": (4, 6), "w1": (8,), "Conv_*": (2, 3)}))
    assert groups["image"].widths == (4, 6)
    assert groups["w1"].widths == (8,)
    assert groups["w2"].widths == (2, 3)
    assert groups["w3"].widths == (4,)


def test_a_shared_weight_chooses_once():
    _, _, groups = found("two_towers")
    assert [group.name for group in groups.values() if group.role == "weight"] == ["shared"]


def test_the_target_says_what_an_operator_takes():
    graph, _, groups = found("residual", target=CONV_4_8)
    assert groups["w1"].widths == (4, 8)
    assert groups["w3"].widths == (2, 4, 8)
    make_plan(graph, CONV_4_8, Rules(4))
    with pytest.raises(UsageError, match=r"takes 4, 8 bits for Conv, not 3 \('Conv"):
        make_plan(graph, CONV_4_8, Rules(3))
    with pytest.raises(UsageError, match="'w1' has 2 bits, but target"):
        check_plan(graph, CONV_4_8, make_plan(graph, ORT_TARGET, Rules(2)))
    with pytest.raises(
        UsageError, match="may have 2, 3 bits as asked, but target 'onnxruntime' takes 4, 8 bits for Conv"
    ):
        found("residual", Asked((2, 3), (8,)), CONV_4_8)


def test_widths_that_cannot_be():
    with pytest.raises(UsageError, match=r"stores weights of .* bits, not 9"):
        found("residual", Asked((4, 9), (8,)))
    with pytest.raises(UsageError, match=r"stores activations of .* bits, not 16"):
        found("residual", Asked((4,), (8, 16)))
    with pytest.raises(UsageError, match="share one grid"):
        found("pooling", Asked((4,), (4, 8), {"b": (4,), "c": (8,)}))
