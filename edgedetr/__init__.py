"""edgedetr trains DETR-family detectors, quantizes them to INT8 and proves that they stayed accurate.

The Python API, imported on first use:

    load           opens a bundle as a detector
    train          data set -> bundle
    export         bundle -> ONNX files in FP32, FP16, INT8
    sensitivity    bundle -> what each layer loses in INT8
    verify         bundle -> verdict on each file
    report         bundle -> one HTML page
    import_model   a model made elsewhere -> bundle

docs/api.md describes them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from edgedetr import telemetry

if TYPE_CHECKING:
    from edgedetr.api import ExportResult, export, sensitivity, train, verify
    from edgedetr.bundle import Bundle
    from edgedetr.errors import EdgedetrError
    from edgedetr.importing.import_model import import_model
    from edgedetr.importing.import_options import ImportOptions
    from edgedetr.reporting.report import write_report as report
    from edgedetr.runtime import Detector, load

__version__ = "0.2.0"

# Where each name is defined.
_LAZY = {
    "load": "edgedetr.runtime:load",
    "train": "edgedetr.api:train",
    "export": "edgedetr.api:export",
    "sensitivity": "edgedetr.api:sensitivity",
    "verify": "edgedetr.api:verify",
    "report": "edgedetr.reporting.report:write_report",
    "import_model": "edgedetr.importing.import_model:import_model",
    "Bundle": "edgedetr.bundle:Bundle",
    "Detector": "edgedetr.runtime:Detector",
    "EdgedetrError": "edgedetr.errors:EdgedetrError",
    "ExportResult": "edgedetr.api:ExportResult",
    "ImportOptions": "edgedetr.importing.import_options:ImportOptions",
}

__all__ = [
    "load",
    "train",
    "export",
    "sensitivity",
    "verify",
    "report",
    "import_model",
    "Bundle",
    "Detector",
    "EdgedetrError",
    "ExportResult",
    "ImportOptions",
    "__version__",
]

telemetry.switch_off()  # before anything of this package can import a library that reports


def __getattr__(name: str) -> Any:
    """The API, by PEP 562: a name's module is imported when the name is first used."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _LAZY[name].partition(":")
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
