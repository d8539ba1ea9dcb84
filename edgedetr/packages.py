"""The packages that commands need, and the message that tells how to install a missing one.

edgedetr is not on any package index yet, so the message names the missing library and never an extra of edgedetr:
somebody else's package of that name would be installed.
"""

from __future__ import annotations

from collections.abc import Iterable

# import name -> (package to install, extra of this project that has it, what it is needed for)
PACKAGES: dict[str, tuple[str, str, str]] = {
    "numpy": ("numpy", "runtime", "everything"),
    "click": ("click", "runtime", "the command line"),
    "PIL": ("pillow", "runtime", "reading images"),
    "onnxruntime": ("onnxruntime", "runtime", "running ONNX; calibrating"),
    "openvino": ("openvino", "openvino", "running INT8 fast on Intel CPUs"),
    "cv2": ("opencv-python-headless", "video", "video files; faster resizing"),
    "pycocotools": ("pycocotools", "verify", "average precision"),
    "yaml": ("pyyaml", "verify", "data sets in YOLO layout"),
    "torch": ("torch", "train", "training; export"),
    "scipy": ("scipy", "train", "matching of queries to objects"),
    "numba": ("numba", "fast", "deformable attention, faster to train on a CPU"),
    "pydantic": ("pydantic", "train", "recipes"),
    "safetensors": ("safetensors", "train", "weights"),
    "huggingface_hub": ("huggingface-hub", "train", "pretrained backbones"),
    "lightning_fabric": ("lightning-fabric", "train", "several devices; bf16"),
    "rich": ("rich", "train", "progress bars"),
    "tensorboard": ("tensorboard", "train", "training curves"),
    "onnx": ("onnx", "export", "export"),
    "onnxscript": ("onnxscript", "export", "export"),
    "matplotlib": ("matplotlib", "report", "the report's figures"),
    "jinja2": ("jinja2", "report", "the report"),
    "modelopt": ("nvidia-modelopt", "qat", "training for INT8; NVIDIA ModelOpt's quantizer"),
    "onnx_graphsurgeon": ("onnx-graphsurgeon", "peers", "NVIDIA ModelOpt's quantizer"),
    "onnxslim": ("onnxslim", "peers", "NVIDIA ModelOpt's quantizer"),
    "polygraphy": ("polygraphy", "peers", "NVIDIA ModelOpt's quantizer"),
    "lief": ("lief", "peers", "NVIDIA ModelOpt's quantizer"),
    "nncf": ("nncf", "peers", "NNCF's quantizer"),
    "tensorrt": ("tensorrt", "trt", "TensorRT engines (part of JetPack)"),
}
# NVIDIA's parser for the CPU, in the versions that the tests know.
TENSORRT_RTX = "tensorrt-rtx-cu13-bindings==1.7.1.116 tensorrt-rtx-cu13-libs==1.7.1.116"


def install(names: Iterable[str]) -> str:
    """The command that installs these modules, given by import name: `pip install pillow onnx`."""
    return f"pip install {' '.join(dict.fromkeys(PACKAGES[name][0] if name in PACKAGES else name for name in names))}"


def missing(name: str, error: ImportError | None = None) -> str:
    """`openvino is not installed; run: pip install openvino`, for a module that cannot be imported.

    error   what its import raised: a module that is there and cannot be loaded is not called missing
    """
    package = PACKAGES[name][0] if name in PACKAGES else name
    if error is not None and not isinstance(error, ModuleNotFoundError):
        if any(words in str(error).lower() for words in ("failed to map segment", "allocate memory")):
            return f"not enough memory to load {package} ({error}); close other programs and run the same command again"
        return f"{package} is installed but cannot be loaded ({error}); install it again: {install([name])}"
    return f"{package} is not installed; run: {install([name])}"
