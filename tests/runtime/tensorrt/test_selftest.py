"""The self-test models equal their generator's output, are right by independent arithmetic, and show planted faults."""

from __future__ import annotations

import json
from importlib.util import find_spec

import fake_cuda
import fake_tensorrt
import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from edgedetr import cli
from edgedetr.errors import DeviceError, EngineError, MissingDependency
from edgedetr.lint.lint import lint_file
from edgedetr.lint.rtx import check_all
from edgedetr.onnx_graph import selftest_models
from edgedetr.runtime.backends import onnxruntime
from edgedetr.runtime.sqnr import sqnr_db
from edgedetr.runtime.tensorrt import build, gpu, selftest
from edgedetr.runtime.tensorrt.build import SerializedEngine
from edgedetr.runtime.tensorrt.selftest import SELFTEST_MODELS, _decibels, stored

torch = pytest.importorskip("torch", reason="GridSample is compared with PyTorch's")
FLOORS = {model.name: model.floor_db for model in SELFTEST_MODELS}


def constants(model: bytes) -> dict[str, np.ndarray]:
    return {c.name: numpy_helper.to_array(c) for c in onnx.load_from_string(model).graph.initializer}


@pytest.mark.parametrize("name", selftest_models.SELFTEST_MODELS)
def test_what_is_stored_is_what_the_generator_makes(name):
    data, x, y = selftest_models.make(name)
    model, kept_x, kept_y = stored(name)
    assert model == data
    np.testing.assert_array_equal(kept_x, x)
    # float32 sums may be ordered otherwise by another CPU's kernels; measured 0 on the machine that made them
    assert sqnr_db(kept_y, y) >= 100


def test_there_is_a_graph_for_every_model_and_no_other():
    assert {path.stem for path in selftest.FOLDER.iterdir()} == set(FLOORS) == set(selftest_models.SELFTEST_MODELS)


def test_nvidias_parser_and_builder_take_them():
    if not any(map(find_spec, ("tensorrt_rtx", "tensorrt_rtx_bindings"))):
        pytest.skip("needs NVIDIA's parser on a CPU: make test installs it on x86-64")
    results = check_all(sorted(selftest.FOLDER.glob("*.onnx")))
    assert [str(result) for result in results if not result.ok] == [] and len(results) == 3


@pytest.mark.parametrize("name", FLOORS)
def test_lint_knows_what_they_provoke_and_finds_no_error(name):
    found = lint_file(selftest.FOLDER / f"{name}.onnx")
    assert {f.rule for f in found.findings} == {"grid_sample": {"grid-sample-wrong"}, "concat": {"concat-scales"}}.get(
        name, set()
    )
    assert not found.errors


def test_grid_sample_is_what_pytorch_computes():
    model, x, y = stored("grid_sample")
    c = {name: torch.from_numpy(value.copy()) for name, value in constants(model).items() if value.ndim == 2}
    queries, memory = torch.from_numpy(x[:, :48]), torch.from_numpy(x[:, 48:])
    values = (memory @ c["value_weight"]).transpose(1, 2).reshape(2, 16, 20, 20)
    grid = torch.tanh(queries @ c["place_weight"]).reshape(2, 48, 4, 2)
    sampled = torch.nn.functional.grid_sample(values, grid, mode="bilinear", align_corners=False)
    summed = (sampled * (queries @ c["score_weight"]).softmax(-1).unsqueeze(1)).sum(-1)
    assert sqnr_db(y, (summed.transpose(1, 2) @ c["out_weight"] + queries).numpy()) >= FLOORS["grid_sample"] + 20
    np.testing.assert_array_equal(y[0], y[1])


def test_layer_norm_is_what_the_definition_says_in_double_precision():
    model, x, y = stored("layer_norm")
    c = {name: value.astype(np.float64) for name, value in constants(model).items()}
    fp16 = x.astype(np.float16).astype(np.float64)
    assert ((fp16 - fp16.mean(-1, keepdims=True)) ** 2).max() > 65504  # what FP16 cannot hold
    normed = (fp16 - fp16.mean(-1, keepdims=True)) / np.sqrt(fp16.var(-1, keepdims=True) + 1e-5)
    assert sqnr_db((normed * c["scale"] + c["bias"]) @ c["weight"], y) >= FLOORS["layer_norm"]


def test_concat_is_what_integer_arithmetic_gives():
    model, x, y = stored("concat")
    c = constants(model)

    def quantized(values, scale):
        scale = np.asarray(scale, np.float64)
        return np.clip(np.rint(values / scale), -128, 127) * scale

    def conv(values, name):
        weight, scale = c[f"{name}_weight"].astype(np.float64), c[f"{name}_weight_scale"].astype(np.float64)
        weight = quantized(weight, scale.reshape(-1, 1, 1, 1))
        return torch.nn.functional.conv2d(
            torch.from_numpy(values), torch.from_numpy(weight), padding=weight.shape[2] // 2
        ).numpy()

    fp16 = quantized(x.astype(np.float16).astype(np.float64), c["half_scale"])
    a, b = (quantized(np.maximum(conv(fp16, n), 0), c[f"{n}_relu_scale"]) for n in "ab")
    expected = conv(quantized(np.concatenate([a, b], axis=1), c["joined_scale"]), "c")
    assert sqnr_db(expected, y) >= FLOORS["concat"]


def faulty(name: str) -> bytes:
    """The model with the fault that it is there to find."""
    model = onnx.load_from_string(stored(name)[0])
    for node in model.graph.node:
        if name == "grid_sample" and node.op_type == "GridSample":
            next(a for a in node.attribute if a.name == "mode").s = b"nearest"  # issue 4646
        if name == "concat" and node.output[0] == "a_relu_dq":
            node.input[1] = "b_relu_scale"  # one branch's scale for both
    if name == "layer_norm":  # squares beyond FP16 are infinite, as in a norm that was decomposed in FP16
        norm = next(n for n in model.graph.node if n.op_type == "LayerNormalization")
        index, make = list(model.graph.node).index(norm), onnx.helper.make_node
        model.graph.node.remove(norm)
        new = [
            make("Cast", ["half"], ["full"], to=1),
            make("ReduceMean", ["full", "last"], ["mean"]),
            make("Sub", ["full", "mean"], ["centered"]),
            make("Mul", ["centered", "centered"], ["exact"]),
            make("Greater", ["exact", "largest"], ["over"]),
            make("Where", ["over", "infinite", "exact"], ["squares"]),
            make("ReduceMean", ["squares", "last"], ["variance"]),
            make("Sqrt", ["variance"], ["deviation"]),
            make("Div", ["centered", "deviation"], ["unit32"]),
            make("Cast", ["unit32"], ["unit"], to=10),
            make("Mul", ["unit", "scale"], ["scaled"]),
            make("Add", ["scaled", "bias"], ["normed"]),
        ]
        for node in reversed(new):
            model.graph.node.insert(index, node)
        values = {"last": np.array([-1]), "largest": np.float32(65504), "infinite": np.float32(np.inf)}
        for key, value in values.items():
            model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), key))
    return model.SerializeToString()


@pytest.mark.parametrize("name", FLOORS)
def test_the_fault_that_a_model_is_there_for_is_far_below_its_floor(name):
    _, x, y = stored(name)
    wrong = onnxruntime.tensors(faulty(name), x, ["y"], optimize=False, threads=1, feed="x")["y"]
    assert sqnr_db(y, wrong) < FLOORS[name] - 5


@pytest.mark.parametrize(
    "a, b, ratio",
    [([1.0], [1.0], 300), ([1.0], [1.1], 20), ([1.0], [np.nan], -300), ([1.0], [np.inf], -300), ([0.0], [1.0], -300)],
)
def test_the_ratio_is_in_decibels_and_always_a_number(a, b, ratio):
    assert _decibels(np.array(a), np.array(b)) == pytest.approx(ratio, abs=1e-6)


@pytest.fixture
def fake(monkeypatch, trt):
    return fake_tensorrt.install(monkeypatch, trt, fake_cuda.install(monkeypatch))


@pytest.fixture
def built(monkeypatch):
    """A builder whose engines are the graphs themselves, or what the test gives instead."""
    plans: dict[str, bytes] = {}

    def build_serialized(model, arguments, device, *, what, **rest):
        assert set(arguments.batch) == {len(stored(what.split()[-1])[1])} and not rest
        plan = plans.get(what.split()[-1], model)
        if plan == b"":
            raise EngineError(f"{what}: TensorRT cannot build it")
        layer = {"Name": "conv", "LayerType": "CaskConvolution", "Inputs": [{"Format/Datatype": "Int8"}]}
        return SerializedEngine(plan, json.dumps({"Layers": [layer]}), b"", "strong", 0.1)

    monkeypatch.setattr(build, "build_serialized", build_serialized)
    return plans


def test_a_right_tensorrt_passes_every_model_plainly_and_as_a_graph(fake, built, capsys):
    assert cli.run(["selftest", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["passed"] and [o["name"] for o in said["outcomes"]] == list(FLOORS)
    assert all(o["passed"] and o["graph"] and o["sqnr_db"] > 100 and o["note"] == "" for o in said["outcomes"])
    assert [o["share"] for o in said["outcomes"]] == [0.0, 0.0, 1.0]
    assert not any(fake.fake.live().values())
    assert fake.gone == ["context", "engine", "runtime"] * 3


@pytest.mark.parametrize("name", FLOORS)
def test_a_wrong_result_gives_exit_code_3_and_names_the_model(fake, built, name, capsys):
    built[name] = faulty(name)
    assert cli.run(["selftest"]) == 3
    said = capsys.readouterr().err
    assert f"{name}: wrong: " in said and said.count("WRONG") == 1
    assert ("gathers" in said) == (name == "grid_sample")


def test_equal_rows_that_come_out_different_are_named(fake, built, capsys):
    fake.shift = 1e-3  # 60 dB: above what a float32 floor would forgive
    assert cli.run(["selftest"]) == 3
    assert "equal rows of one batch give different results (TensorRT issue 4813)" in capsys.readouterr().err


def test_a_model_that_is_wrong_only_as_a_cuda_graph_is_named_so(fake, built, monkeypatch):
    def run(self, feeds, original=selftest.Session.run):
        found = original(self, feeds)
        return {name: value + bool(self.graphs) for name, value in found.items()}

    monkeypatch.setattr(selftest.Session, "run", run)
    outcomes = selftest.selftest().outcomes
    assert all(not o.passed and o.note.startswith("wrong as a CUDA graph only") for o in outcomes)


def test_a_model_that_cannot_be_built_fails_and_the_others_are_still_run(fake, built):
    built["layer_norm"] = b""
    found = selftest.selftest()
    assert [o.passed for o in found.outcomes] == [True, False, True]
    assert found.outcomes[1].note == "self-test model layer_norm: TensorRT cannot build it"
    assert found.outcomes[1].sqnr_db is None and not found.passed


def test_a_model_that_the_device_has_no_memory_for_fails_and_the_others_are_still_run(fake, built):
    fake.fake.fail("cudaMalloc", 2, after=5)  # the second buffer of the third model is too much
    found = selftest.selftest()
    assert [o.passed for o in found.outcomes] == [True, True, False]
    assert "Orin is out of memory" in found.outcomes[2].note
    assert not any(fake.fake.live().values())


def test_without_a_device_or_tensorrt_one_error_says_so(monkeypatch, capsys):
    monkeypatch.setattr(selftest, "probe", lambda: (_ for _ in ()).throw(DeviceError("no NVIDIA driver; run: doctor")))
    assert cli.run(["selftest"]) == 1
    assert "no NVIDIA driver" in capsys.readouterr().err
    monkeypatch.setattr(selftest, "probe", lambda: None)
    monkeypatch.setattr(selftest, "tensorrt", lambda: (_ for _ in ()).throw(MissingDependency(gpu.NEEDED)))
    assert cli.run(["selftest"]) == 1
    assert "python3-libnvinfer" in capsys.readouterr().err
