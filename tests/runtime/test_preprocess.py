"""The one resize: numpy, OpenCV, torch and ONNX against each other and against sums written out by hand."""

from __future__ import annotations

import math

import numpy as np
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from edgedetr.bundle import InputContract
from edgedetr.data.images import decode
from edgedetr.errors import DataError
from edgedetr.onnx_graph.graph_builder import GraphBuilder
from edgedetr.runtime.preprocess import PADDING, Geometry, prepare, resize
from edgedetr.serving.pre_post_graph import planes_of_frames
from edgedetr.serving.pre_post_graph import resize as resize_nodes

torch = pytest.importorskip("torch", reason="resizing is compared with PyTorch's")
functional = torch.nn.functional

CONTRACTS = [
    InputContract(64, 64),
    InputContract(13, 17),
    InputContract(96, 40, "letterbox"),
    InputContract(31, 90, "letterbox"),
]
SIZES = [(1, 1), (1, 7), (5, 1), (2, 2), (33, 47), (64, 64), (127, 129), (200, 31), (193, 411)]


def written_out(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """The stretch of the definition, pixel by pixel in float64, not rounded."""
    rows = image.shape[0] // height if image.shape[0] / height > 2 else 1
    columns = image.shape[1] // width if image.shape[1] / width > 2 else 1
    small = np.zeros((image.shape[0] // rows, image.shape[1] // columns, 3))
    for y in range(small.shape[0]):
        for x in range(small.shape[1]):
            small[y, x] = (
                image[y * rows : (y + 1) * rows, x * columns : (x + 1) * columns].astype(float).mean(axis=(0, 1))
            )
    result = np.zeros((height, width, 3))
    for y in range(height):
        for x in range(width):
            v = min(max((y + 0.5) * small.shape[0] / height - 0.5, 0), small.shape[0] - 1)
            u = min(max((x + 0.5) * small.shape[1] / width - 0.5, 0), small.shape[1] - 1)
            y0, x0 = math.floor(v), math.floor(u)
            y1, x1 = min(y0 + 1, small.shape[0] - 1), min(x0 + 1, small.shape[1] - 1)
            top = small[y0, x0] * (1 - (u - x0)) + small[y0, x1] * (u - x0)
            bottom = small[y1, x0] * (1 - (u - x0)) + small[y1, x1] * (u - x0)
            result[y, x] = top * (1 - (v - y0)) + bottom * (v - y0)
    return result


def torch_resize(image: np.ndarray, contract: InputContract) -> np.ndarray:
    """The definition in PyTorch's operators, [height, width, 3]."""
    g = Geometry.of(*image.shape[:2], contract)
    pixels = torch.from_numpy(image)[None].permute(0, 3, 1, 2).float()
    kernel = [
        source // target if source > 2 * target else 1
        for source, target in ((g.source_height, g.content_height), (g.source_width, g.content_width))
    ]
    pixels = functional.avg_pool2d(pixels, kernel)
    size = g.content_height, g.content_width
    pixels = functional.interpolate(pixels, size=size, mode="bilinear", align_corners=False).round()
    padded = functional.pad(pixels, (0, g.width - size[1], 0, g.height - size[0]), value=114)
    return padded[0].permute(1, 2, 0).numpy()


def graph_resize(frames: np.ndarray, contract: InputContract) -> np.ndarray:
    """The resize in graphs for whole frames, [B, 3, height, width]."""
    part, size = GraphBuilder("/frame"), frames.shape[1:3]
    resize_nodes(part, planes_of_frames(part, "frames"), Geometry.of(*size, contract), "images", len(frames))
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        part.nodes,
        "resize",
        [value("frames", TensorProto.UINT8, frames.shape)],
        [value("images", TensorProto.FLOAT, None)],
        part.constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"frames": frames})[0]


def noise(size: tuple[int, int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def far(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.abs(a.astype(np.int64) - b.astype(np.int64)).max())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("target", [(13, 17), (30, 8), (40, 55)])
def test_numpy_follows_the_definition(size, target):
    image = noise(size)
    pixels, _ = resize(image, InputContract(*target), backend="numpy")
    # Half a level for the rounding, 1e-3 for float32 sums of 8-bit levels.
    np.testing.assert_allclose(pixels, written_out(image, *target), atol=0.5 + 1e-3)


@pytest.mark.parametrize("contract", CONTRACTS, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_opencv_and_torch_agree_with_numpy_to_one_level(size, contract):
    pytest.importorskip("cv2")
    image = noise(size, seed=1)
    reference, _ = resize(image, contract, backend="numpy")
    by_opencv, _ = resize(image, contract, backend="opencv")
    by_torch = torch_resize(image, contract)
    assert far(reference, by_opencv) <= 1
    assert far(reference, by_torch) <= 1


@pytest.mark.parametrize("contract", [InputContract(320, 320), InputContract(320, 416, "letterbox")], ids=str)
@pytest.mark.parametrize("file", ["sahi/small-vehicles1.jpeg", "exif/Landscape_6.jpg", "pillow/hopper.png"])
def test_real_images_agree_to_one_level(shared_data, file, contract):
    pytest.importorskip("cv2")
    image = decode(shared_data / "edge" / file)
    reference, geometry = resize(image, contract, backend="numpy")
    by_opencv, same = resize(image, contract, backend="opencv")
    by_torch = torch_resize(image, contract)
    assert far(reference, by_opencv) <= 1
    assert far(reference, by_torch) <= 1
    assert geometry == same


@pytest.mark.parametrize(
    "size, contract",
    [
        ((193, 411), InputContract(64, 48)),
        ((33, 47), InputContract(90, 64, "letterbox")),
        ((130, 131), InputContract(64, 64)),
    ],
    ids=str,
)
def test_the_resize_in_a_graph_agrees_to_one_level(size, contract):
    frames = np.stack([noise(size, seed) for seed in range(2)])
    by_onnx = graph_resize(frames, contract)
    reference, _ = prepare(list(frames), contract, backend="numpy")
    assert by_onnx.dtype == np.float32
    assert by_onnx.shape == reference.shape
    assert far(by_onnx, reference) <= 1


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    size=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    height=st.integers(1, 90),
    width=st.integers(1, 90),
    kind=st.sampled_from(["stretch", "letterbox"]),
    seed=st.integers(0, 9),
)
def test_any_frame_in_a_graph_agrees_to_one_level(size, height, width, kind, seed):
    contract = InputContract(height, width, kind)
    frame = noise(size, seed)
    reference, _ = prepare([frame], contract, backend="numpy")
    assert far(graph_resize(frame[None], contract), reference) <= 1


def test_a_checkerboard_becomes_gray_and_does_not_alias():
    board = np.zeros((300, 300, 3), dtype=np.uint8)
    board[::2, ::2] = board[1::2, 1::2] = 255
    for backend in ("numpy", "opencv"):
        pixels, _ = resize(board, InputContract(50, 37), backend=backend)
        # 6 x 8 pixels are averaged, half of them white: 127.5, rounded either way.
        assert 127 <= pixels.min() <= pixels.max() <= 128


def test_a_constant_stays_constant_at_any_size():
    for level in (0, 1, 114, 254, 255):
        image = np.full((333, 79, 3), level, dtype=np.uint8)
        assert (resize(image, InputContract(40, 160))[0] == level).all()


def test_the_right_size_is_left_alone_and_copied():
    image = noise((32, 48))
    pixels, geometry = resize(image, InputContract(32, 48))
    assert (pixels == image).all()
    pixels[:] = 0
    assert image.any()
    assert geometry.to_source(np.array([[1.0, 2.0, 3.0, 4.0]])).tolist() == [[1, 2, 3, 4]]


def test_letterbox_keeps_the_aspect_and_pads_right_and_bottom():
    wide, geometry = resize(np.full((100, 200, 3), 7, np.uint8), InputContract(64, 64, "letterbox"))
    assert (wide[:32] == 7).all()
    assert (wide[32:] == PADDING).all()
    assert (geometry.content_height, geometry.content_width) == (32, 64)
    thin, _ = resize(np.full((500, 1, 3), 7, np.uint8), InputContract(64, 64, "letterbox"))
    assert (thin[:, :1] == 7).all()
    assert (thin[:, 1:] == PADDING).all()


def test_a_marked_pixel_is_where_the_geometry_maps_it(rng):
    for contract in CONTRACTS:
        for size in [(640, 480), (90, 400), (50, 60)]:
            y, x = int(rng.integers(20, size[0] - 20)), int(rng.integers(20, size[1] - 20))
            image = np.zeros((*size, 3), dtype=np.uint8)
            image[y - 12 : y + 12, x - 12 : x + 12] = 255
            pixels, geometry = resize(image, contract, backend="numpy")
            weight = pixels[: geometry.content_height, : geometry.content_width, 0].astype(float)
            found = (
                np.array(
                    [
                        (weight.sum(0) * (np.arange(weight.shape[1]) + 0.5)).sum(),
                        (weight.sum(1) * (np.arange(weight.shape[0]) + 0.5)).sum(),
                    ]
                )
                / weight.sum()
            )
            center = geometry.to_source(np.concatenate([found, found])[None])[0, :2]
            factor = max(geometry.used_width / geometry.content_width, geometry.used_height / geometry.content_height)
            # Half a pixel of the input, in pixels of the source: the mark is sampled on the input's grid.
            np.testing.assert_allclose(center, [x, y], atol=0.5 * max(factor, 1))


def test_boxes_come_back_from_the_input(rng):
    for _ in range(300):
        height, width = rng.integers(1, 3000, 2)
        contract = InputContract(
            int(rng.integers(1, 900)), int(rng.integers(1, 900)), str(rng.choice(["stretch", "letterbox"]))
        )
        geometry = Geometry.of(int(height), int(width), contract)
        boxes = rng.uniform(0, 3000, (5, 4))
        x, y = geometry.content_width / geometry.used_width, geometry.content_height / geometry.used_height
        in_the_input = boxes * [x, y, x, y]
        np.testing.assert_allclose(geometry.to_source(in_the_input), boxes, rtol=1e-12)  # two quotients, two products
        whole = geometry.to_source(
            np.array([[0, 0, geometry.content_width, geometry.content_height]], dtype=np.float64)
        )[0]
        np.testing.assert_allclose(whole, [0, 0, geometry.used_width, geometry.used_height], rtol=1e-12)
        for used, source, target in (
            (geometry.used_height, height, geometry.content_height),
            (geometry.used_width, width, geometry.content_width),
        ):
            assert source - max(source // target, 1) < used <= source
        assert geometry.to_source(boxes.astype(np.float32)).dtype == np.float32


def test_prepare_makes_a_batch_of_whole_levels():
    images = [noise((30, 40)), noise((100, 20)), noise((5, 5))]
    batch, geometries = prepare(images, InputContract(24, 32))
    assert batch.shape == (3, 3, 24, 32)
    assert batch.dtype == np.float32
    assert (batch == np.rint(batch)).all()
    assert [(g.source_height, g.source_width) for g in geometries] == [(30, 40), (100, 20), (5, 5)]
    for row, image in zip(batch, images):
        assert (row.transpose(1, 2, 0) == resize(image, InputContract(24, 32))[0]).all()


def test_an_empty_batch_keeps_its_shape():
    batch, geometries = prepare([], InputContract(8, 8))
    assert batch.shape == (0, 3, 8, 8)
    assert geometries == []


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((0, 4, 3), np.uint8),
        [[0, 0, 0]],
        None,
    ],
    ids=["gray", "four channels", "float", "empty", "list", "none"],
)
def test_what_is_no_image_is_refused_with_what_was_expected(image):
    with pytest.raises(DataError, match="expected a uint8 array"):
        resize(image, InputContract(8, 8))
