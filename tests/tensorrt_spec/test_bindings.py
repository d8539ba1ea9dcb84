"""The rebuilt modules equal NVIDIA's bindings: facts of three versions that were read by hand."""

from __future__ import annotations

from unittest.mock import create_autospec

import pytest


@pytest.mark.parametrize(
    "version, strongly_typed, tf32, fp16", [("10.3.0", 1, 6, 0), ("10.16.1", 1, 6, 0), ("11.4.0", 0, 6, None)]
)
def test_flags_have_the_numbers_of_their_version(bindings, version, strongly_typed, tf32, fp16):
    trt = bindings.module(version)
    assert trt.__version__.startswith(version)
    assert int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED) == strongly_typed
    assert int(trt.BuilderFlag.TF32) == tf32
    assert (int(trt.BuilderFlag.FP16) if hasattr(trt.BuilderFlag, "FP16") else None) == fp16


def test_a_fake_refuses_an_unknown_name_a_wrong_argument_and_a_bare_flag(trt):
    config = create_autospec(trt.IBuilderConfig, instance=True, spec_set=True)
    config.set_memory_pool_limit(pool=trt.MemoryPoolType.WORKSPACE, pool_size=1)
    config.builder_optimization_level = 3
    with pytest.raises(TypeError, match="pool_size"):
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE)
    with pytest.raises(AttributeError):
        config.max_workspace_size = 1  # removed in 10.0
    with pytest.raises(TypeError):
        1 << trt.BuilderFlag.TF32  # an enum of pybind11 is no integer


def test_names_that_version_11_removed_are_gone(bindings):
    old, new = bindings.module("10.16.1"), bindings.module("11.4.0")
    assert hasattr(old, "IInt8EntropyCalibrator2") and not hasattr(new, "IInt8EntropyCalibrator2")
    assert hasattr(old.Builder, "platform_has_fast_int8") and not hasattr(new.Builder, "platform_has_fast_int8")


def test_interfaces_can_be_subclassed(trt):
    class Monitor(trt.IProgressMonitor):
        def __init__(self):
            trt.IProgressMonitor.__init__(self)

    assert isinstance(Monitor(), trt.IProgressMonitor)
    assert issubclass(trt.Logger, trt.ILogger) and trt.Logger.WARNING is trt.ILogger.Severity.WARNING
