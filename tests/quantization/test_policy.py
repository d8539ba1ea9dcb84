"""Policies: strict reading, and which nodes each rule keeps float."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgedetr.errors import ExportError
from edgedetr.onnx_graph.index import GraphIndex
from edgedetr.quantization.policy import Policy, PolicyRule, check_policy, load_policy, make_plan, set_role


def graph_of(nodes, shapes, **constants):
    initializers = [numpy_helper.from_array(np.asarray(value, np.float32), name) for name, value in constants.items()]
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    outputs = [helper.make_empty_tensor_value_info(nodes[-1].output[0])]
    graph = helper.make_graph(nodes, "g", inputs, outputs, initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)])


W = np.ones((32, 32))


def test_the_shipped_default_gives_a_reason_for_every_rule():
    policy = load_policy("default")
    assert policy.name == "default"
    assert policy.float_rules
    assert all(len(rule.reason) > 20 for rule in policy.float_rules)


@pytest.mark.parametrize(
    "text, message",
    [
        ("quantizes = ['Conv']", "unknown key 'quantizes'; did you mean 'quantize'"),
        ("quantize = 'Conv'", "quantize is 'Conv'; expected a list of strings"),
        ("residuals = 'yes'", "residuals is 'yes'; expected bool"),
        ("[[float]]\nmatch = ['*']", "has no reason"),
        ("[[float]]\nmatch = ['*']\nreson = 'x'", "unknown key 'reson'; did you mean 'reason'"),
        ("float = 3", "expected \\[\\[float\\]\\] tables"),
        ("name = [", "cannot be read as a policy"),
        ("float = [3]", "an entry of `float` is 3; expected"),
        ("name = 0x" + "f" * 9000, "name is a number of 36000 bits; expected str"),
        ("name = [" * 5000, "cannot be read as a policy"),
        ("'" + "k" * 9000 + "' = 3", "unknown key 'kkk"),
    ],
)
def test_a_faulty_policy_is_refused_with_its_fault(tmp_path, text, message):
    path = tmp_path / "p.toml"
    path.write_text(text)
    with pytest.raises(ExportError, match=message):
        load_policy(path)


def test_an_unknown_policy_names_the_nearest():
    with pytest.raises(ExportError, match="no policy named 'defualt'; did you mean 'default'"):
        load_policy("defualt")


def test_a_missing_policy_file_is_an_error(tmp_path):
    with pytest.raises(ExportError, match="cannot be read as a policy"):
        load_policy(tmp_path / "none.toml")


def test_a_rule_keeps_what_it_matches_except_its_exceptions():
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["h"], "/decoder/value/MatMul"),
        helper.make_node("MatMul", ["h", "b"], ["i"], "/decoder/out/MatMul"),
        helper.make_node("MatMul", ["i", "c"], ["y"], "/encoder/q/MatMul"),
    ]
    model = graph_of(nodes, {"x": [1, 4, 32]}, a=W, b=W, c=W)
    rule = PolicyRule("boxes", match=("*/decoder/*",), unless=("*/value/*",))
    found = make_plan(GraphIndex(model), Policy("p", float_rules=(rule,)))
    assert [layer.node for layer in found.layers] == ["/decoder/value/MatMul", "/encoder/q/MatMul"]
    assert found.float_layers == {"/decoder/out/MatMul": "boxes"}


def test_a_rule_keeps_the_layers_that_have_one_of_its_roles():
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["h"], "one"),
        helper.make_node("MatMul", ["h", "b"], ["i"], "two"),
        helper.make_node("MatMul", ["i", "c"], ["y"], "three"),
    ]
    for node, role in zip(nodes, ("refinement", "decoder", "")):
        set_role(node, role)
    model = graph_of(nodes, {"x": [1, 4, 32]}, a=W, b=W, c=W)
    found = make_plan(GraphIndex(model), Policy("p", float_rules=(PolicyRule("boxes", roles=("decoder", "other")),)))
    assert [layer.node for layer in found.layers] == ["one", "three"]
    assert found.float_layers == {"two": "boxes"}


def test_the_default_keeps_float_where_a_deformable_encoder_samples():
    chain = zip(["value", "offsets", "weights", "out"], ["x", "h0", "h1", "h2"], "abcd")
    nodes = [
        helper.make_node(
            "MatMul", [source, weight], [f"h{number}"], f"/detector/encoder/layers.0/attention/{part}/MatMul"
        )
        for number, (part, source, weight) in enumerate(chain)
    ]
    found = make_plan(GraphIndex(graph_of(nodes, {"x": [1, 4, 32]}, a=W, b=W, c=W, d=W)), load_policy("default"))
    assert [layer.node.split("/")[-2] for layer in found.layers] == ["value", "out"]
    assert all("samples" in reason for reason in found.float_layers.values())


def test_a_rule_can_depend_on_what_the_node_reads():
    k = np.ones((32, 32, 1, 1))
    nodes = [
        helper.make_node("Conv", ["x", "a"], ["h"], "c0"),
        helper.make_node("Concat", ["h", "h"], ["i"], "cat", axis=1),
        helper.make_node("Conv", ["i", "b"], ["y"], "c1"),
    ]
    model = graph_of(nodes, {"x": [1, 32, 4, 4]}, a=k, b=np.ones((32, 64, 1, 1)))
    found = make_plan(
        GraphIndex(model), Policy("p", float_rules=(PolicyRule("behind a Concat", ops=("Conv",), reads=("Concat",)),))
    )
    assert [layer.node for layer in found.layers] == ["c0"]
    assert found.float_layers == {"c1": "behind a Concat"}


@pytest.mark.parametrize(
    "node, constants, reason",
    [
        (helper.make_node("MatMul", ["x", "x2"], ["y"], "bmm"), {}, "two activations"),
        (helper.make_node("MatMul", ["x", "w"], ["y"], "box"), {"w": np.ones((32, 4))}, "fewer than 16"),
        (helper.make_node("Conv", ["m", "w"], ["y"], "depthwise", group=32), {"w": np.ones((32, 1, 1, 1))}, "grouped"),
        (helper.make_node("Conv", ["m", "w"], ["y"], "narrow"), {"w": np.ones((4, 32, 1, 1))}, "fewer than 8 channels"),
    ],
)
def test_what_no_integer_kernel_takes_stays_float(node, constants, reason):
    first = helper.make_node("MatMul", ["x", "a"], ["ignored"], "other")
    shapes = {"x": [1, 32, 32], "x2": [1, 32, 32], "m": [1, 32, 4, 4]}
    found = make_plan(GraphIndex(graph_of([first, node], shapes, a=W, **constants)), Policy("p"))
    assert reason in found.float_layers[node.name]


@pytest.mark.parametrize("transposed", [0, 1])
def test_gemm_scales_run_along_its_outputs(transposed):
    node = helper.make_node("Gemm", ["x", "w"], ["y"], "fc", transB=transposed)
    found = make_plan(
        GraphIndex(graph_of([node], {"x": [4, 32]}, w=np.ones((20, 32) if transposed else (32, 20)))), Policy("p")
    )
    assert found.layers[0].axis == (0 if transposed else 1)


def test_a_pattern_that_fits_nothing_is_an_error_that_names_the_nearest_part():
    model = graph_of(
        [helper.make_node("MatMul", ["x", "a"], ["y"], "/detector/selector/project/MatMul")], {"x": [1, 4, 32]}, a=W
    )
    check_policy(model, load_policy("default"))  # patterns for parts of other members are no fault
    check_policy(model, Policy("mine", float_rules=(PolicyRule("r", match=("*/selector/*", "*/decoder/*")),)))
    for rule in (PolicyRule("r", match=("*/selecter/*",)), PolicyRule("r", unless=("*/selecter/project/*",))):
        for policy in (Policy("mine", float_rules=(rule,)), Policy("mine", float32_rules=(rule,))):
            with pytest.raises(ExportError, match=r"policy 'mine': .*'\*/selecter/.*; did you mean 'selector'"):
                check_policy(model, policy)


def test_a_role_that_no_node_has_is_an_error_that_names_the_nearest():
    node = helper.make_node("MatMul", ["x", "a"], ["y"], "one")
    set_role(node, "refinement")
    model = graph_of([node], {"x": [1, 4, 32]}, a=W)
    check_policy(model, Policy("mine", float_rules=(PolicyRule("r", roles=("refinement", "query_selection")),)))
    with pytest.raises(ExportError, match="policy 'mine': no node .* role 'refinment'; did you mean 'refinement'"):
        check_policy(model, Policy("mine", float_rules=(PolicyRule("r", roles=("refinment",)),)))


def test_a_copy_of_the_default_policy_of_0_2_is_accepted_for_every_member():
    model = graph_of([helper.make_node("MatMul", ["x", "a"], ["y"], "one")], {"x": [1, 4, 32]}, a=W)
    rules = (
        PolicyRule("r", match=("*/decoder/*",), unless=("*/cross_attention/value/*", "*/interaction/out/*")),
        PolicyRule("r", match=("*/selector/*",), unless=("*/selector/project/*",)),
        PolicyRule("r", match=("*/attention/offsets/*", "*/attention/weights/*")),
    )
    check_policy(model, Policy("mine", float_rules=rules))


def test_the_default_has_the_digest_of_the_one_by_names_that_kept_the_same_layers_float():
    """A bundle of 0.1 stays fresh. Where golden_layers.json changes, its digest must not be in the table."""
    assert load_policy("default").sha256() == "62eb5149a85aecf325711ae1902ce48a4d0197de1e1a95836c7a3aff4b1bd8dd"


def test_a_users_policy_keeps_its_digest_of_0_1_and_roles_change_it(tmp_path):
    text = 'quantize = ["Conv"]\nresiduals = false\n[[float]]\nmatch = ["*/decoder/*"]\nreason = "boxes"\n'
    (tmp_path / "mine.toml").write_text(text)
    mine = load_policy(tmp_path / "mine.toml")
    rule = {"match": ["*/decoder/*"], "ops": [], "reads": [], "reason": "boxes", "unless": []}
    as_in_0_1 = {"float32": [], "name": "mine", "quantise": ["Conv"], "residuals": False, "rules": [rule]}
    assert mine.sha256() == hashlib.sha256(json.dumps(as_in_0_1).encode()).hexdigest()
    (tmp_path / "mine.toml").write_text(text + 'roles = ["decoder"]\n')
    assert load_policy(tmp_path / "mine.toml").sha256() != mine.sha256()


def test_the_spelling_of_0_1_is_still_read(tmp_path, caplog):
    (tmp_path / "mine.toml").write_text('quantise = ["Conv"]')
    assert load_policy(tmp_path / "mine.toml").quantize == ("Conv",)
    assert "`quantise` is `quantize` now" in caplog.text
