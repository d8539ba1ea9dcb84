"""The floors hold: a module imports only from below or from its own folder, and the device needs next to nothing."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

import edgedetr

PACKAGE = Path(edgedetr.__file__).parent
FLOOR = {
    "errors": -1,  # everyone may fail
    "telemetry": -1,
    "artifacts": -0.5,
    "image_size": -0.8,
    "printable": -1,
    "progress": 0,
    "boxes": 0,
    "bundle": 0,
    "package_data": 0,
    "packages": 0,
    "storage": -0.5,
    "options": -0.5,
    "data": 1,
    "runtime": 1,
    "onnx_graph": 2,
    "evaluation": 2.1,
    "lint": 2.1,
    "quantization": 2.2,
    "serving": 2.2,
    "layers": 3,
    "models": 4,
    "recipe": 5,
    "recipe_reference": 5.5,
    "training": 5,
    "exporting": 5,
    "importing": 5,
    "reporting": 5,
    "api": 5.5,
    "demo": 5.7,
    "doctor": 5.5,
    "cli": 6,
    "__main__": 7,
}
WITHOUT_TORCH = 2.9  # floors up to this one
# Between folders of one floor, each with its reason.
ALLOWED = {
    ("runtime", "data"),  # predict reads files through data.images, inside a function; Detector takes arrays
    ("quantization", "evaluation"),  # the digests of reference.npz say which images must not calibrate
    ("importing", "recipe"),
    ("training", "recipe"),
    ("exporting", "recipe"),  # a recipe is what they are told
    ("recipe", "training"),
    ("recipe", "exporting"),  # their configurations are its sections
}
# floor 1 and 2: third-party packages that may stand at the top of a file
TOP_LEVEL = {
    "data": {"numpy", "PIL"},
    "runtime": {"numpy"},
    "evaluation": {"numpy"},
    "quantization": {"numpy", "onnx", "tomli"},
    "onnx_graph": {"numpy", "onnx"},
    "lint": {"numpy", "onnx"},
    "serving": {"numpy", "onnx"},
    "storage": {"tomli"},
}


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        inside = path.relative_to(PACKAGE)
        part = inside.parts[0].removesuffix(".py")
        if part != "__init__":
            yield part, path


def imports(tree: ast.AST) -> Iterator[tuple[str, bool]]:
    """Every imported module, and whether it is imported when the file is (not in a function or for type checking)."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((name.name, True) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the floor"
            yield from ((f"{node.module}.{name.name}", True) for name in node.names)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield from ((name, False) for name, _ in imports(node))
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from ((name, False) for name, _ in imports(node))
        else:
            yield from imports(node)


CASES = [pytest.param(part, path, id=str(path.relative_to(PACKAGE))) for part, path in modules()]


def test_every_part_has_a_floor():
    assert {part for part, _ in modules()} <= set(FLOOR)


@pytest.mark.parametrize("part, path", CASES)
def test_module_imports_from_below_or_from_its_own_folder(part, path):
    for name, _ in imports(ast.parse(path.read_text(encoding="utf-8"))):
        if not name.startswith("edgedetr."):
            continue
        other = name.split(".")[1]
        if other in (part, "__init__"):
            continue
        assert FLOOR[other] < FLOOR[part] or (part, other) in ALLOWED, (
            f"{path.name} (floor {FLOOR[part]}) imports {name}"
        )


def test_every_module_of_the_package_that_is_imported_exists():
    """Mypy takes a missing module of the package for one of another package without types."""
    for _, path in modules():
        for name, _ in imports(ast.parse(path.read_text(encoding="utf-8"))):
            if name.startswith("edgedetr."):
                whole = PACKAGE.parent.joinpath(*name.split("."))
                found = [whole, whole.with_suffix(".py"), whole.parent.with_suffix(".py"), whole.parent / "__init__.py"]
                assert any(one.exists() for one in found), f"{path.relative_to(PACKAGE)} imports {name}"


@pytest.mark.parametrize("part, path", [case for case in CASES if FLOOR[case.values[0]] <= WITHOUT_TORCH])
def test_lower_floors_never_import_torch(part, path):
    for name, _ in imports(ast.parse(path.read_text(encoding="utf-8"))):
        assert name.split(".")[0] not in ("torch", "torchvision", "transformers", "timm", "lightning_fabric")


@pytest.mark.parametrize("part, path", [case for case in CASES if FLOOR[case.values[0]] <= WITHOUT_TORCH])
def test_lower_floors_import_only_light_packages_at_the_top(part, path):
    allowed = TOP_LEVEL.get(part, {"numpy"}) | sys.stdlib_module_names | {"edgedetr"}
    for name, at_once in imports(ast.parse(path.read_text(encoding="utf-8"))):
        assert not at_once or name.split(".")[0] in allowed, f"{path.name} imports {name} at the top"


@pytest.mark.parametrize("part, path", [case for case in CASES if case.values[0] == "cli"])
def test_the_command_line_imports_libraries_inside_command_bodies(part, path):
    light = sys.stdlib_module_names | {"click"}
    for name, at_once in imports(ast.parse(path.read_text(encoding="utf-8"))):
        own = name.startswith(
            (
                "edgedetr.cli",
                "edgedetr.api",
                "edgedetr.artifacts",
                "edgedetr.bundle",
                "edgedetr.errors",
                "edgedetr.printable",
            )
        )
        assert not at_once or own or name.split(".")[0] in light, f"{path.name} imports {name} at the top"


def test_no_print_and_no_exit_below_the_command_line():
    for part, path in modules():
        if FLOOR[part] < 6:
            tree = ast.parse(path.read_text(encoding="utf-8"))
            called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
            assert not called & {"print", "sys.exit", "exit", "quit"}, path


DEVICE = """
    import sys, time

    class Refuse:
        names = {"torch", "onnx", "click", "pydantic", "matplotlib", "jinja2", "scipy", "pycocotools", "rich"}
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in self.names:
                raise ImportError(f"{name} was imported on the device")

    sys.meta_path.insert(0, Refuse())
    begun = time.perf_counter()
    import numpy as np
    from edgedetr import runtime
    detector = runtime.load(sys.argv[1])
    seconds = time.perf_counter() - begun
    found = detector([np.zeros((40, 60, 3), np.uint8), np.full((64, 64, 3), 255, np.uint8)])
    assert len(found) == 2 and all(len(one.xyxy) == len(one.confidence) == len(one.class_id) for one in found)
    print(seconds)
"""


@pytest.fixture(scope="module")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose model.onnx finds one fixed box: input -> mean -> nothing, plus constants."""
    onnx = pytest.importorskip("onnx")
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    from edgedetr.bundle import Bundle, ClassInfo, InputContract, Manifest, OutputContract

    logits = numpy_helper.from_array(np.array([[[2.0, -9.0], [-9.0, -9.0]]], np.float32), "fixed_logits")
    boxes = numpy_helper.from_array(np.array([[[0.5, 0.5, 0.5, 0.5], [0.2, 0.2, 0.1, 0.1]]], np.float32), "fixed_boxes")
    nothing = numpy_helper.from_array(np.zeros(1, np.float32), "zero")
    nodes = [
        helper.make_node("ReduceMean", ["images"], ["mean"], keepdims=0, axes=[0, 1, 2, 3]),
        helper.make_node("Mul", ["mean", "zero"], ["none"]),
        helper.make_node("Add", ["fixed_logits", "none"], ["logits"]),
        helper.make_node("Add", ["fixed_boxes", "none"], ["boxes"]),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "tiny",
        [value("images", TensorProto.FLOAT, [1, 3, 32, 32])],
        [value("logits", TensorProto.FLOAT, [1, 2, 2]), value("boxes", TensorProto.FLOAT, [1, 2, 4])],
        [logits, boxes, nothing],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    bundle = Bundle.create(
        tmp_path_factory.mktemp("floors") / "tiny.bundle",
        Manifest("rt_detr", (ClassInfo(0, 1, "a"), ClassInfo(1, 5, "b")), InputContract(32, 32), OutputContract()),
    )
    with bundle.add("model.onnx", stage="export") as path:
        onnx.save(model, str(path))
    return bundle.path


def test_the_device_runs_without_torch_onnx_click_pydantic_and_matplotlib(tiny_bundle):
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(DEVICE), str(tiny_bundle)],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # Import and load are to take less than a second; tenfold, because a test machine may be busy with other work.
    assert float(done.stdout) < 10
