"""Parse and build ONNX files with TensorRT-RTX, and write one line of JSON per file; see rtx.py.

It runs in its own process, with the first bindings on the path, and imports nothing from the rest of edgedetr.
Arguments: a JSON object {"files": [...], "build": true}.
"""

from __future__ import annotations

import importlib
import json
import math
import sys
import time
from typing import Any

OPEN = 64  # pixels for an open size; an open batch is built for 1
MODULES = ("tensorrt_rtx", "tensorrt_rtx_bindings")  # the name differs between distributions


def bindings() -> Any:
    for name in MODULES:
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    return None


def examine(trt: Any, path: str, build: bool) -> dict[str, Any]:
    """The results of the parser and the builder for one file."""
    logged: list[str] = []

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                logged.append(message.strip())

    begun, logger = time.perf_counter(), Logger()
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    parsed = bool(parser.parse_from_file(path))
    errors = []
    for number in range(parser.num_errors):
        error = parser.get_error(number)
        errors.append(
            f"node {error.node_name() or '(no name)'} ({error.node_operator() or 'no operator'}): "
            f"{error.desc().strip()}"
        )
    result = {
        "path": path,
        "version": trt.__version__,
        "parsed": parsed,
        "built": None,
        "layers": network.num_layers,
        "parse_seconds": time.perf_counter() - begun,
        "build_seconds": None,
        "plan_bytes": None,
        "errors": errors,
    }
    if parsed and build:
        begun = time.perf_counter()
        config = builder.create_builder_config()
        inputs = [network.get_input(number) for number in range(network.num_inputs)]
        if any(-1 in tuple(item.shape) or item.is_shape_tensor for item in inputs):
            profile = builder.create_optimization_profile()
            for item in inputs:
                shape = tuple(size if size != -1 else OPEN if axis else 1 for axis, size in enumerate(item.shape))
                if item.is_shape_tensor:
                    values = [1] * math.prod(shape)
                    profile.set_shape_input(item.name, values, values, values)
                elif -1 in tuple(item.shape):
                    profile.set_shape(item.name, shape, shape, shape)
            config.add_optimization_profile(profile)
        plan = builder.build_serialized_network(network, config)
        result |= {
            "built": plan is not None,
            "build_seconds": time.perf_counter() - begun,
            "plan_bytes": None if plan is None else plan.nbytes,
        }
        if plan is None:
            errors += list(dict.fromkeys(logged)) or ["the builder returned nothing and logged no reason"]
    return result


def main(request: str) -> int:
    wanted, trt = json.loads(request), bindings()
    if trt is None:
        return 3
    for path in wanted["files"]:
        sys.stdout.write(json.dumps(examine(trt, path, wanted["build"])) + "\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
