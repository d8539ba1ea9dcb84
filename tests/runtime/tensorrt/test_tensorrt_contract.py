"""Every name of TensorRT that the project uses exists, with these arguments, in all three versions it must run on."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
from tensorrt_spec import contract

import edgedetr

RUNTIME = Path(edgedetr.__file__).parent / "runtime" / "tensorrt"
# Objects of TensorRT that a file is given and does not make: variable -> class.
GIVEN = {"execution_context.py": {"context": "IExecutionContext"}, "trt_runner.py": {"engine": "ICudaEngine"}}
SOURCES = sorted(
    path for path in RUNTIME.glob("*.py") if path.name in GIVEN or "trt." in path.read_text(encoding="utf-8")
)
# Names that are not in all versions, and why that is right. Flags asked for by hasattr and getattr need no entry.
EXEMPT = {
    "trt.IErrorRecorder.take": "our recorder's own method, which only we call",
    "trt.IProfiler.take": "our profiler's own method, which only we call",
}

# What the builder and the runner cannot do without: if these were not found, the collector would have gone blind.
ESSENTIAL = {
    "build.py": {
        "trt.Builder",
        "trt.Builder.create_network",
        "trt.OnnxParser.parse",
        "trt.ParserError.node_name",
        "trt.Builder.build_serialized_network",
        "trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED",
        "trt.IBuilderConfig.set_memory_pool_limit",
        "trt.IBuilderConfig.progress_monitor",
        "trt.IBuilderConfig.builder_optimization_level",
        "trt.IOptimizationProfile.set_shape",
        "trt.IProgressMonitor.step_complete",
        "trt.EngineInspector.get_engine_information",
        "trt.ITimingCache.serialize",
        "trt.INetworkDefinition.get_input",
        "trt.ITensor.shape",
    },
    "gpu.py": {"trt.ILogger.Severity", "trt.ILogger.Severity.INTERNAL_ERROR", "trt.ILogger.log"},
    "trt_runner.py": {
        "trt.Runtime.deserialize_cuda_engine",
        "trt.ICudaEngine.create_execution_context",
        "trt.ICudaEngine.get_tensor_mode",
        "trt.TensorIOMode.INPUT",
    },
    "execution_context.py": {
        "trt.IExecutionContext.execute_async_v3",
        "trt.IExecutionContext.set_tensor_address",
        "trt.IExecutionContext.profiler",
    },
    "profiling.py": {"trt.IProfiler.report_layer_time"},
}


def uses(path: Path, bindings: ModuleType) -> list[contract.Use]:
    return contract.uses(path.read_text(encoding="utf-8"), bindings.described(), GIVEN.get(path.name))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
@pytest.mark.parametrize("version", ["10.3.0", "10.16.1", "11.4.0"])
def test_every_name_and_argument_exists_in_this_version(bindings, path, version):
    names = bindings.described()[version]
    wrong = [
        reason for use in uses(path, bindings) if str(use) not in EXEMPT and (reason := contract.missing(use, names))
    ]
    assert not wrong, f"TensorRT {version}, {path.name}: " + "; ".join(wrong)


@pytest.mark.parametrize("name", ESSENTIAL)
def test_the_collector_sees_what_is_used(bindings, name):
    assert ESSENTIAL[name] - {str(use) for use in uses(RUNTIME / name, bindings)} == set()


PLANTED = [
    ("trt.BuilderFlag.FP16", {"11.4.0"}),
    ("trt.IInt8EntropyCalibrator2()", {"11.4.0"}),
    ("builder = trt.Builder(logger)\nbuilder.platform_has_fast_int8", {"11.4.0"}),
    (
        "builder = trt.Builder(logger)\nconfig = builder.create_builder_config()\nconfig.max_workspace_size = 1",
        {"10.3.0", "10.16.1", "11.4.0"},
    ),
    (
        "config = trt.Builder(logger).create_builder_config()\ndef f(config):\n    config.int8_calibrator = None",
        {"11.4.0"},
    ),
    ("network = trt.Builder(logger).create_network(0)\nnetwork.get_input(0).set_dynamic_range(-1, 1)", {"11.4.0"}),
    (
        (
            "e = trt.Runtime(log).deserialize_cuda_engine(b'')\n"
            "c = e.create_execution_context()\nc.execute_async_v2([], 0)"
        ),
        {"10.3.0", "10.16.1", "11.4.0"},
    ),
    ("class M(trt.IProgressMonitor):\n    def step_done(self): ...", {"10.3.0", "10.16.1", "11.4.0"}),
    ("trt.Runtime(logger).deserialize_cuda_engine(b'', 1, 2)", {"10.3.0", "10.16.1", "11.4.0"}),
    ("p = trt.OnnxParser(n, logger)\np.parse(model=b'', folder='x')", {"10.3.0", "10.16.1", "11.4.0"}),
    ("trt.Builder(logger).build_serialized_network(n, c, t)", {"10.3.0"}),
    ("levels = trt.Logger.Severity\nlevels.FATAL", {"10.3.0", "10.16.1", "11.4.0"}),
    ("trt.TilingOptimizationLevel.FULL", {"10.3.0"}),
    ("trt.Logger(trt.Logger.WARNING).min_severity", set()),
    ("x = trt.Builder(logger) if a else None\nx.max_threads", set()),
]


@pytest.mark.parametrize("source, expected", PLANTED)
def test_a_planted_name_is_caught_in_the_versions_that_lack_it(bindings, source, expected):
    versions = bindings.described()
    found = contract.uses(source, versions)
    assert found
    assert {v for v, names in versions.items() if any(contract.missing(use, names) for use in found)} == expected


def test_every_exempt_name_is_needed(bindings):
    versions = bindings.described()
    lacking = {
        str(use)
        for path in SOURCES
        for use in uses(path, bindings)
        if any(contract.missing(use, names) for names in versions.values())
    }
    assert set(EXEMPT) == lacking
