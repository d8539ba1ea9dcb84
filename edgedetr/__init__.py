"""edgedetr trains DETR-family detectors, quantizes them to INT8 and proves that they stayed accurate.

The Python API, imported on first use:

    load           open a bundle as a detector            edgedetr.runtime
    train          data set -> bundle                     edgedetr.api
    export         bundle -> ONNX files in FP32, FP16, INT8
    verify         bundle -> verdict on each file
    report         bundle -> one HTML page
    import_model   a model made elsewhere -> bundle       edgedetr.importing
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from edgedetr import telemetry

if TYPE_CHECKING:
    from edgedetr.api import ExportResult, export, report, train, verify
    from edgedetr.bundle import Bundle
    from edgedetr.errors import EdgedetrError
    from edgedetr.importing.import_model import import_model
    from edgedetr.importing.import_options import ImportOptions
    from edgedetr.runtime import Detector, load

__version__ = "0.2.0"

# Name -> module that has it.
_LAZY = {
    "load": "edgedetr.runtime",
    "train": "edgedetr.api",
    "export": "edgedetr.api",
    "verify": "edgedetr.api",
    "report": "edgedetr.api",
    "import_model": "edgedetr.importing.import_model",
    "Bundle": "edgedetr.bundle",
    "Detector": "edgedetr.runtime",
    "EdgedetrError": "edgedetr.errors",
    "ExportResult": "edgedetr.api",
    "ImportOptions": "edgedetr.importing.import_options",
}

__all__ = [
    "load",
    "train",
    "export",
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
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
