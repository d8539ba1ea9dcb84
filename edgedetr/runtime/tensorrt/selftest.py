"""Test whether the installed TensorRT computes correctly: three small graphs are built, run and compared.

Some version of TensorRT computes each of them wrongly (see onnx_graph/selftest_models.py). The inputs and the expected
outputs, by ONNX Runtime without optimizations, are stored next to the graphs, so only numpy and TensorRT are needed.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from edgedetr.errors import DeviceError, EngineError
from edgedetr.progress import Progress
from edgedetr.runtime.sqnr import sqnr_db
from edgedetr.runtime.tensorrt import build
from edgedetr.runtime.tensorrt.cudart import Cuda
from edgedetr.runtime.tensorrt.engine_layers import summarize_layers
from edgedetr.runtime.tensorrt.engine_metadata import BuildArguments
from edgedetr.runtime.tensorrt.gpu import Device, probe, tensorrt
from edgedetr.runtime.tensorrt.trt_runner import Session

FOLDER = Path(__file__).parent / "selftest_models"
WORKSPACE_MB = 256
RUNS = 3  # the first is queued layer by layer, the others run as a CUDA graph
EQUAL_ROWS_DB = 80.0  # of equal rows in one batch: different kernels for them would leave about 100 dB in float32


@dataclass(frozen=True)
class SelfTestModel:
    """floor_db: minimum signal-to-noise ratio of a correct computation, decibels."""

    name: str
    precision: str
    floor_db: float
    about: str


SELFTEST_MODELS = (
    # float32 sums in another order leave above 110 dB, FP16 would leave 60; issue 4813 left about 10
    SelfTestModel("grid_sample", "fp32", 80.0, "GridSample in deformable attention, equal rows"),
    # FP16 rounding leaves about 65 dB; sums of squares in FP16 overflow and leave none
    SelfTestModel("layer_norm", "fp16", 50.0, "LayerNormalization in FP16 of large values"),
    # a value that rounds to the neighboring level leaves about 40 dB; a wrong scale leaves less than 10
    SelfTestModel("concat", "int8", 25.0, "INT8 convolutions joined by Concat"),
)


@dataclass(frozen=True)
class SelfTestResult:
    """The result of one model.

    sqnr_db   the worst of all runs; None where it did not run
    share     fraction of the layers with weights that run in the model's precision, 0..1
    graph     whether it ran as a CUDA graph
    note      what is wrong, or empty
    """

    name: str
    about: str
    precision: str
    passed: bool
    sqnr_db: float | None
    floor_db: float
    share: float | None
    graph: bool
    seconds: float
    note: str = ""


@dataclass(frozen=True)
class SelfTestReport:
    """The results of all models on one device."""

    tensorrt: str
    device: Device
    outcomes: tuple[SelfTestResult, ...]

    @property
    def passed(self) -> bool:
        return all(outcome.passed for outcome in self.outcomes)

    def to_json(self) -> dict[str, object]:
        return {"passed": self.passed, **asdict(self)}


def selftest(progress: Progress | None = None) -> SelfTestReport:
    """Build and run every model. Errors: MissingDependency without TensorRT, DeviceError without a GPU."""
    device, trt = probe(), tensorrt()
    outcomes = []
    for number, tested in enumerate(SELFTEST_MODELS):
        outcomes.append(_try(tested, device))
        if progress:
            progress("selftest", number + 1, len(SELFTEST_MODELS))
    return SelfTestReport(trt.__version__, device, tuple(outcomes))


def stored(name: str) -> tuple[bytes, np.ndarray, np.ndarray]:
    """(ONNX file, input, expected output)."""
    with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as arrays:
        return (FOLDER / f"{name}.onnx").read_bytes(), arrays["x"], arrays["y"]


def _try(tested: SelfTestModel, device: Device) -> SelfTestResult:
    model, x, expected = stored(tested.name)
    begun = time.perf_counter()

    def outcome(
        passed: bool, note: str, sqnr: float | None = None, share: float | None = None, graph: bool = False
    ) -> SelfTestResult:
        return SelfTestResult(
            tested.name,
            tested.about,
            tested.precision,
            passed,
            sqnr,
            tested.floor_db,
            share,
            graph,
            time.perf_counter() - begun,
            note,
        )

    batch = (len(x),) * 3
    try:
        engine = build.build_serialized(
            model,
            BuildArguments(tested.precision, batch, WORKSPACE_MB, 3, "auto"),
            device,
            what=f"self-test model {tested.name}",
        )
        with Session(engine.data, cuda=Cuda(device), what=f"self-test model {tested.name}") as session:
            found = [session.run({"x": x})["y"] for _ in range(RUNS)]
            graph = session.graphs > 0
    except (DeviceError, EngineError) as error:  # a failure of one model does not stop the others
        return outcome(False, str(error))
    share = summarize_layers(engine.layers).fraction(tested.precision)
    ratios = [_decibels(expected, y) for y in found]
    problems = []
    if min(ratios) < tested.floor_db:
        first = next(run for run, ratio in enumerate(ratios) if ratio < tested.floor_db)
        how = "" if first == 0 else " as a CUDA graph only"
        problems.append(f"wrong{how}: {ratios[first]:.0f} dB, expected at least {tested.floor_db:.0f}")
    if _equal_rows(x) and min(_decibels(y[0], y[-1]) for y in found) < EQUAL_ROWS_DB:
        problems.append("equal rows of one batch give different results (TensorRT issue 4813)")
    if problems and tested.name == "grid_sample":
        problems.append("engines must not use GridSample here: edgedetr export writes gathers for engines")
    return outcome(not problems, "; ".join(problems), min(ratios), share, graph)


def _decibels(reference: np.ndarray, other: np.ndarray) -> float:
    """The signal-to-noise ratio as a finite number, for JSON: 300 where they are equal, -300 for NaN or infinity."""
    return float(np.clip(sqnr_db(reference, other), -300, 300))


def _equal_rows(x: np.ndarray) -> bool:
    return len(x) > 1 and bool((x == x[:1]).all())
