"""A TensorRT that builds nothing: fakes specified by the real bindings of one version, with the answers a test wants.

A name, an argument count or a property that this version does not have is an error, as it would be on a device.
"""

from __future__ import annotations

import json
from types import ModuleType
from typing import Any
from unittest.mock import create_autospec

LAYERS_10 = {
    "Layers": [
        {
            "Name": "conv",
            "LayerType": "CaskConvolution",
            "Inputs": [{"Name": "x", "Format/Datatype": "Thirty-two wide channel vectorized row major Int8 format"}],
            "Outputs": [{"Name": "y", "Format/Datatype": "Row major linear FP16 format"}],
        }
    ],
    "Bindings": ["images"],
}


class FakeTensorRT:
    """`module` replaces `tensorrt`; the attributes below say how it behaves, `made` is what was asked of it.

    plans      answers of the builder, one for each attempt; None: the build fails
    parses     answers of the parser, one for each attempt
    errors     (node, operator, text) of the parser
    said       (severity name, text) that the builder logs
    inputs     name -> shape of the network, -1 for an open size
    phases     (name, parent, steps) that the progress monitor hears of
    """

    def __init__(self, spec: ModuleType) -> None:
        self.spec = spec
        self.plans: list[bytes | None] = [b"a plan"]
        self.parses = [True, True]
        self.errors: list[tuple[str, str, str]] = []
        self.said: list[tuple[str, str]] = []
        self.inputs = {"images": (1, 3, 32, 48)}
        self.phases = [("Building", None, 2), ("inner", "Building", 5)]
        self.timing_cache_fits = True
        self.timing_caches = True  # whether this builder has any
        self.profile_index = 0
        self.loads = True
        self.inspector = json.dumps(LAYERS_10)
        self.flags: list[int] = []  # of create_network
        self.configs: list[Any] = []
        self.profiles: list[Any] = []
        self.models: list[bytes] = []  # what was parsed
        self.stopped: list[bool] = []  # answers of the monitor
        self._network: Any = None
        self.module = ModuleType("tensorrt")
        vars(self.module).update({key: value for key, value in vars(spec).items() if not key.startswith("__")})
        self.module.__version__ = spec.__version__
        self.module.Builder = self._builder  # type: ignore[attr-defined]
        self.module.OnnxParser = self._parser  # type: ignore[attr-defined]
        self.module.Runtime = self._runtime  # type: ignore[attr-defined]

    def _new(self, kind: str, /, **answers: Any) -> Any:
        made = create_autospec(getattr(self.spec, kind), instance=True, spec_set=True)
        for key, value in answers.items():
            if key.startswith("on_"):
                getattr(made, key[3:]).side_effect = value
            else:
                setattr(made, key, value)
        return made

    def _builder(self, logger: Any) -> Any:
        def network(flags: int = 0) -> Any:
            self.flags.append(flags)
            tensors = [self._new("ITensor", name=name, shape=shape) for name, shape in self.inputs.items()]
            if self._network is None:  # one for all attempts: making it takes longest, it has a hundred methods
                self._network = self._new("INetworkDefinition")
            self._network.num_inputs = len(tensors)
            self._network.get_input.side_effect = tensors.__getitem__
            return self._network

        def profile() -> Any:
            self.profiles.append(self._new("IOptimizationProfile"))
            return self.profiles[-1]

        def build(network: Any, config: Any) -> bytes | None:
            for severity, text in self.said:
                logger.log(getattr(self.spec.ILogger.Severity, severity), text)
            if isinstance(config.progress_monitor, self.spec.IProgressMonitor):
                self._report(config.progress_monitor)
            return self.plans.pop(0)

        return self._new(
            "Builder",
            on_create_network=network,
            on_create_optimization_profile=profile,
            on_create_builder_config=self._config,
            on_build_serialized_network=build,
        )

    def _config(self) -> Any:
        def cache(data: bytes) -> Any:
            if not self.timing_caches or (data and not self.timing_cache_fits):
                return None
            return self._new("ITimingCache", on_serialize=lambda: b"timings after " + data)

        made = self._new(
            "IBuilderConfig",
            on_create_timing_cache=cache,
            on_add_optimization_profile=lambda profile: self.profile_index,
        )
        made.set_timing_cache.return_value = True
        made.get_timing_cache.side_effect = lambda: made.set_timing_cache.call_args.args[0]
        self.configs.append(made)
        return made

    def _parser(self, network: Any, logger: Any) -> Any:
        def parse(model: bytes) -> bool:
            self.models.append(model)
            return self.parses.pop(0)

        def error(index: int) -> Any:
            node, operator, text = self.errors[index]
            return self._new(
                "ParserError", on_node_name=lambda: node, on_node_operator=lambda: operator, on_desc=lambda: text
            )

        return self._new("OnnxParser", num_errors=len(self.errors), on_get_error=error, on_parse=parse)

    def _runtime(self, logger: Any) -> Any:
        def load(data: bytes) -> Any:
            inspector = self._new("EngineInspector", on_get_engine_information=lambda form: self.inspector)
            return self._new("ICudaEngine", on_create_engine_inspector=lambda: inspector) if self.loads else None

        return self._new("Runtime", on_deserialize_cuda_engine=load)

    def _report(self, monitor: Any) -> None:
        for name, parent, steps in self.phases:
            monitor.phase_start(name, parent, steps)
        for name, _, steps in reversed(self.phases):
            for step in range(steps):
                self.stopped.append(not monitor.step_complete(name, step))
            monitor.phase_finish(name)
