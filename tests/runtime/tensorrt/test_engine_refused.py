"""What cannot become an engine is said with its reason, before TensorRT sees it where that can be known."""

from __future__ import annotations

import dataclasses
import os
import sys
from types import ModuleType

import numpy as np
import onnx
import pytest
from engine_build import install

from edgedetr.errors import BundleError, DeviceError, EngineError, MissingDependency
from edgedetr.runtime.tensorrt import build, engine_cache, gpu
from edgedetr.runtime.tensorrt.gpu import Device


def test_an_engine_that_cannot_be_loaded_is_not_kept(fake, bundle):
    fake.loads = False
    with pytest.raises(EngineError, match="built an engine that it cannot load"):
        build.build(bundle)
    assert not engine_cache.plans(bundle)


def test_an_unreadable_answer_of_the_inspector_is_an_error(fake, bundle):
    fake.inspector = "not json"
    with pytest.raises(EngineError, match="inspector"):
        build.build(bundle)
    assert not engine_cache.plans(bundle)


@pytest.mark.parametrize("silence", ["", " \n", None])
def test_an_inspector_that_says_nothing_leaves_the_engine_without_layers(fake, bundle, silence):
    fake.inspector = silence
    made = build.build(bundle)
    assert made.made and made.metadata.layers.weighted == {}


def test_a_builder_that_does_not_start_is_one_error(old, bundle):
    def refuse(logger: object) -> None:
        raise TypeError("pybind11::init(): factory function returned nullptr")  # what the bindings raise

    old.module.Builder = refuse
    with pytest.raises(EngineError, match="does not start here"):
        build.build(bundle)


def test_without_tensorrt_the_error_says_where_to_build(bundle, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingDependency, match="TensorRT is not installed.*apt install.*run: edgedetr build"):
        build.build(bundle)
    assert "not installed" in gpu.why_unavailable()


@pytest.mark.parametrize("error", [ImportError("libnvdla_compiler.so: cannot open shared object file"), OSError("x")])
def test_a_tensorrt_that_cannot_be_loaded_says_which_library(monkeypatch, error):
    class Broken:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "tensorrt":
                raise error

    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(MissingDependency, match=f"cannot be loaded .{error}"):
        gpu.tensorrt()


def test_another_package_of_that_name_is_not_taken(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", ModuleType("tensorrt"))
    with pytest.raises(MissingDependency, match="is not NVIDIA's"):
        gpu.tensorrt()


def test_without_a_driver_tensorrt_is_never_started(old, bundle, monkeypatch):
    def no_driver() -> Device:
        raise DeviceError("no NVIDIA driver: libcuda.so.1 is not here")

    monkeypatch.setattr(gpu, "probe", no_driver)
    with pytest.raises(DeviceError, match="no NVIDIA driver"):
        build.build(bundle)
    assert not old.flags and "no NVIDIA driver" in gpu.why_unavailable()


def test_available_says_nothing_where_engines_can_be_built(fake):
    assert gpu.why_unavailable() == ""


def test_a_graph_that_has_not_been_made_names_its_command(old, make_bundle):
    with pytest.raises(BundleError, match="model.int8.onnx has not been made yet; run: edgedetr export"):
        build.build(make_bundle("model.onnx"))


@pytest.mark.parametrize(
    "harm, words",
    [
        (lambda path, other: path.symlink_to(other), "a link; expected plain files"),
        (lambda path, other: os.link(other, path), "2 names"),
    ],
)
def test_a_graph_that_is_a_link_never_reaches_tensorrt(old, bundle, tmp_path, harm, words):
    path, other = bundle.path / "model.int8.onnx", tmp_path / "other.onnx"
    path.rename(other)
    harm(path, other)  # the bytes are the recorded ones; the link could be turned while they are read
    with pytest.raises((BundleError, EngineError), match=words):
        build.build(bundle)
    assert not old.flags


def test_a_graph_with_weights_elsewhere_never_reaches_tensorrt(old, bundle, tiny_graph):
    with bundle.add("model.int8.onnx", stage="export") as path:
        tiny_graph.write(path, np.zeros((3, 6)), np.zeros((3, 2)))
        model = onnx.load(path)
        model.graph.initializer[0].ClearField("raw_data")
        model.graph.initializer[0].data_location = onnx.TensorProto.EXTERNAL
        model.graph.initializer[0].external_data.add(key="location", value="../../secrets")
        path.write_bytes(model.SerializeToString())
    with pytest.raises(EngineError, match="keeps weights in another file .'../../secrets'"):
        build.build(bundle)
    assert not old.flags


def test_a_graph_with_other_inputs_is_refused(old, bundle, tiny_graph):
    with bundle.add("model.int8.onnx", stage="export") as path:
        tiny_graph.write(path, np.zeros((3, 6)), np.zeros((3, 2)), names=("a", "b"))
    with pytest.raises(BundleError, match="expected images -> logits, boxes"):
        build.build(bundle)


def test_known_defects_are_said_and_a_certainly_wrong_graph_is_refused(bindings, bundle, cache, monkeypatch):
    from edgedetr.runtime.tensorrt import known_issues

    install(bindings.module("10.3.0"), monkeypatch)
    entry = known_issues.KnownIssue("x", (("10.3", "10.4"),), "it is slow", "wait", "https://example.org")
    monkeypatch.setattr(known_issues, "all_issues", lambda: (entry,))
    assert build.build(bundle).metadata.warnings == ("it is slow; wait (https://example.org)",)
    monkeypatch.setattr(known_issues, "all_issues", lambda: (dataclasses.replace(entry, refuse=True),))
    with pytest.raises(EngineError, match="it is slow; wait"):
        build.build(bundle, force=True)


def test_hints_for_failures_are_only_said_then(bindings, bundle, cache, monkeypatch):
    from edgedetr.runtime.tensorrt import known_issues

    fake = install(bindings.module("11.4.0"), monkeypatch)
    fake.plans, fake.parses = [b"plan", None], [True, True]
    entry = known_issues.KnownIssue(
        "x", (("11", "12"),), "needs more", "give it", "https://example.org", on_failure=True
    )
    monkeypatch.setattr(known_issues, "all_issues", lambda: (entry,))
    assert build.build(bundle).metadata.warnings == ()
    with pytest.raises(EngineError, match="known issue: needs more; give it"):
        build.build(bundle, force=True)
