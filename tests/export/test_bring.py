"""Bring your own: foreign ONNX files of every contract become bundles that find what the files find."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from edgedetr import cli
from edgedetr.boxes import cxcywh_to_xyxy
from edgedetr.bundle import Bundle
from edgedetr.data.scenes import render
from edgedetr.errors import ExportError, UsageError
from edgedetr.export.bring import bring
from edgedetr.export.sampling import gather_samples
from edgedetr.export.surgery import absorb_scales, name_nodes, to_opset
from edgedetr.export.told import Pixels
from edgedetr.graph.lint import lint
from edgedetr.runtime.detector import load

torch = pytest.importorskip("torch")
HEIGHT, WIDTH = 96, 128
CLASSES = 6                     # of the rendered set
QUERIES = 20


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    return render(tmp_path_factory.mktemp("scenes") / "set", train=4, val=2, verify=4, size=96, seed=3)


@torch.no_grad()
def spread(model):
    """Weights with real variance, so that the order of scores is decided."""
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def export(module, path: Path, *, names, results, opset=17, open_size=True, extra=()) -> Path:
    """As a user of the other library would: TorchScript exporter, open batch and size."""
    import warnings

    example = (torch.rand(1, 3, HEIGHT, WIDTH), *extra)
    axes = {name: {0: "batch"} for name in names}
    if open_size:
        axes[names[0]] |= {2: "height", 3: "width"}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(module, example, str(path), input_names=list(names), output_names=list(results),
                          opset_version=opset, dynamo=False, dynamic_axes=axes)
    return path


def hugging_face_rt_detr():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    backbone = transformers.RTDetrResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32, 64, 64], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage2", "stage3", "stage4"])
    config = transformers.RTDetrConfig(
        backbone_config=backbone, encoder_in_channels=[32, 64, 64], d_model=32, encoder_hidden_dim=32,
        encoder_ffn_dim=48, encoder_attention_heads=4, decoder_in_channels=[32, 32, 32], decoder_ffn_dim=48,
        decoder_attention_heads=4, num_queries=QUERIES, decoder_layers=2, decoder_n_points=2, num_denoising=0,
        num_labels=CLASSES, use_pretrained_backbone=False, anchor_image_size=None)
    return spread(transformers.RTDetrForObjectDetection(config))


def hugging_face_detr():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    backbone = transformers.ResNetConfig(embedding_size=16, hidden_sizes=[16, 32, 32, 48], depths=[1, 1, 1, 1],
                                         layer_type="basic", out_features=["stage4"])
    config = transformers.DetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=backbone, d_model=32,
        num_queries=QUERIES, encoder_layers=1, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=48, decoder_ffn_dim=48, num_labels=CLASSES)
    return spread(transformers.DetrForObjectDetection(config))


def hugging_face_d_fine():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    backbone = transformers.HGNetV2Config(
        stem_channels=[3, 16, 16], stage_in_channels=[16, 16, 32, 32], stage_mid_channels=[16] * 4,
        stage_out_channels=[16, 32, 32, 32], stage_num_blocks=[1] * 4, stage_numb_of_layers=[2] * 4,
        stage_light_block=[False, False, True, True], stage_downsample=[False, True, True, True],
        stage_kernel_size=[3, 3, 5, 5], use_learnable_affine_block=True, hidden_sizes=[16, 32, 32, 32], depths=[1] * 4,
        embedding_size=16, out_features=["stage2", "stage3", "stage4"])
    config = transformers.DFineConfig(
        backbone_config=backbone, encoder_in_channels=[32] * 3, d_model=32, encoder_hidden_dim=32, encoder_ffn_dim=48,
        encoder_attention_heads=4, decoder_in_channels=[32] * 3, decoder_ffn_dim=48, decoder_attention_heads=4,
        num_queries=QUERIES, decoder_layers=2, decoder_n_points=2, num_denoising=0, num_labels=CLASSES, max_num_bins=8,
        feat_strides=[8, 16, 32], num_feature_levels=3, anchor_image_size=None, use_pretrained_backbone=False)
    return spread(transformers.DFineForObjectDetection(config))


class Raw(torch.nn.Module):
    """Hugging Face's model with the outputs of its ONNX export."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixel_values):
        found = self.model(pixel_values=pixel_values)
        return found.logits, found.pred_boxes


class Decoded(Raw):
    """RT-DETR's and D-FINE's deploy contract: decoded by the best of all sigmoid scores."""

    def __init__(self, model, top: int = 15, sigmoid: bool = True):
        super().__init__(model)
        self.top, self.sigmoid = top, sigmoid

    def forward(self, images, orig_target_sizes):
        logits, boxes = super().forward(images)
        centre, half = boxes[..., :2], boxes[..., 2:] / 2
        corners = torch.cat([centre - half, centre + half], -1) * orig_target_sizes.repeat(1, 2).unsqueeze(1)
        if self.sigmoid:
            scores, index = torch.topk(torch.sigmoid(logits).flatten(1), self.top, dim=-1)
            labels, index = index - index // logits.shape[2] * logits.shape[2], index // logits.shape[2]
        else:
            scores, labels = torch.softmax(logits, -1)[:, :, :-1].max(-1)
            scores, index = torch.topk(scores, self.top, dim=-1)
            labels = labels.gather(1, index)
        return labels, corners.gather(1, index.unsqueeze(-1).repeat(1, 1, 4)), scores


class Joined(Raw):
    """Boxes and scores in one tensor [B, N, 4 + K]."""

    def forward(self, images):
        logits, boxes = super().forward(images)
        return torch.cat([boxes, torch.sigmoid(logits)], -1)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """One file of each contract, all but one by the exporter of the library itself."""
    folder = tmp_path_factory.mktemp("foreign")
    rt_detr, d_fine, detr = hugging_face_rt_detr(), hugging_face_d_fine(), hugging_face_detr()
    sizes = (torch.tensor([[WIDTH, HEIGHT]]),)
    pixels, two = ("pixel_values",), ("images", "orig_target_sizes")
    answer = ("labels", "boxes", "scores")
    return {
        "raw": export(Raw(rt_detr), folder / "raw.onnx", names=pixels, results=("logits", "pred_boxes")),
        "softmax": export(Raw(detr), folder / "softmax.onnx", names=pixels, results=("logits", "pred_boxes"),
                          open_size=False),
        "rf": export(Raw(rt_detr), folder / "rf.onnx", names=("input",), results=("labels", "dets"), open_size=False),
        "decoded": export(Decoded(d_fine), folder / "decoded.onnx", names=two, results=answer, opset=16, extra=sizes),
        "decoded-softmax": export(Decoded(detr, sigmoid=False), folder / "soft.onnx", names=two, results=answer,
                                  open_size=False, extra=sizes),
        "joined": export(Joined(rt_detr), folder / "joined.onnx", names=("images",), results=("output0",)),
    }


ASKED = {
    "raw": {"size": (HEIGHT, WIDTH)},
    "softmax": {"activation": "softmax", "pixels": Pixels(mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))},
    "rf": {},
    "decoded": {"size": (HEIGHT, WIDTH)},
    "decoded-softmax": {},
    "joined": {"size": (HEIGHT, WIDTH)},
}
FOUND = {"raw": "raw", "softmax": "raw", "rf": "raw", "decoded": "decoded", "decoded-softmax": "decoded",
         "joined": "joined"}


@pytest.fixture(scope="module", params=list(ASKED))
def brought(request, files, scenes, tmp_path_factory):
    out = tmp_path_factory.mktemp("brought") / "b.bundle"
    return request.param, files[request.param], bring(files[request.param], out, data=scenes, **ASKED[request.param])


def open_session(model: str | bytes) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def pictures(count: int) -> np.ndarray:
    """[count, 3, H, W] noise, 0..255."""
    return np.random.default_rng(7).integers(0, 256, (count, 3, HEIGHT, WIDTH)).astype(np.float32)


def answers(kind: str, path: Path, image: np.ndarray, pixels: Pixels):
    """What the file itself finds in one picture, by this test's own arithmetic: labels, boxes xyxy px, scores."""
    std, mean = (np.array(value, np.float32).reshape(3, 1, 1) for value in (pixels.std, pixels.mean))
    session = open_session(str(path))
    feed = {session.get_inputs()[0].name: ((image / np.float32(255) - mean) / std).astype(np.float32)}
    if len(session.get_inputs()) == 2:
        feed["orig_target_sizes"] = np.array([[WIDTH, HEIGHT]], np.int64)
    given = dict(zip([item.name for item in session.get_outputs()], session.run(None, feed)))
    if kind.startswith("decoded"):
        return given["labels"][0], given["boxes"][0], given["scores"][0]
    if kind == "joined":
        boxes, scores = given["output0"][0, :, :4], given["output0"][0, :, 4:]
    else:
        logits = given["logits" if "logits" in given else "labels"][0].astype(np.float64)
        boxes = given["pred_boxes" if "pred_boxes" in given else "dets"][0]
        scores = 1 / (1 + np.exp(-logits))
        if kind == "softmax":
            power = np.exp(logits - logits.max(-1, keepdims=True))
            scores = (power / power.sum(-1, keepdims=True))[:, :-1]
            scores = np.where(scores == scores.max(-1, keepdims=True), scores, -1)      # the best class of each query
    order = np.argsort(-scores, axis=None)[:15]
    query, label = np.unravel_index(order, scores.shape)
    return label, cxcywh_to_xyxy(boxes[query]) * [WIDTH, HEIGHT, WIDTH, HEIGHT], scores[query, label]


def test_the_bundle_finds_what_the_file_finds(brought):
    kind, path, result = brought
    detector = load(result.bundle, backend="onnxruntime", stage="onnx", threads=1)
    for image in pictures(2):
        labels, boxes, scores = answers(kind, path, image[None], result.pixels)
        found = detector([image.transpose(1, 2, 0).astype(np.uint8)])[0]
        # Float32 through another order of summation, after folding: measured 2e-5 in scores, 3e-3 px in boxes.
        np.testing.assert_allclose(found.confidence[:10], scores[:10], atol=1e-3)
        assert found.class_id[:10].tolist() == labels[:10].tolist()
        clipped = np.clip(boxes[:10], 0, [WIDTH, HEIGHT, WIDTH, HEIGHT])
        np.testing.assert_allclose(found.xyxy[:10], clipped, atol=0.1)


def test_the_contract_and_the_activation_are_recognised(brought):
    kind, _, result = brought
    assert result.contract == FOUND[kind]
    assert result.activation == ("softmax" if "softmax" in kind else "sigmoid")
    assert result.queries == QUERIES
    assert result.objects >= 10
    output = result.bundle.manifest.output
    assert output.top_k == (15 if result.contract == "decoded" else 100)


def test_the_graph_is_one_of_ours(brought):
    kind, _, result = brought
    model = onnx.load(result.bundle.require("model.onnx"))
    assert {item.domain: item.version for item in model.opset_import} == {"": 19}
    shapes = {item.name: [dim.dim_value for dim in item.type.tensor_type.shape.dim]
              for item in [*model.graph.input, *model.graph.output]}
    width = CLASSES + (result.activation == "softmax")
    assert shapes == {"images": [1, 3, HEIGHT, WIDTH], "logits": [1, QUERIES, width], "boxes": [1, QUERIES, 4]}
    names = [node.name for node in model.graph.node]
    assert all(names)
    assert len(set(names)) == len(names)
    assert not {"BatchNormalization", "Shape", "If"} & {node.op_type for node in model.graph.node}
    # LayerNorm of opset 16 stays written out. Nothing else is left to say.
    assert {finding.rule for finding in lint(model)} == ({"layer-norm"} if kind == "decoded" else set())
    assert result.gathered == (0 if "softmax" in kind else 6)       # two layers, three levels


def test_selection_and_decoder_are_known_by_their_place(brought):
    """Names by another exporter would not say it: the rows and the reach of each node do."""
    from edgedetr.quantization.policy import load as load_policy
    from edgedetr.quantization.policy import plan

    kind, _, result = brought
    chosen = plan(onnx.load(result.bundle.require("model.onnx")), load_policy("default"))
    names = [layer.node for layer in chosen.layers]
    assert sum("/backbone/" in name for name in names) >= 8
    assert not [name for name in names if "bbox" in name or "class" in name or "score" in name]
    if "softmax" not in kind:
        reasons = {reason for name, reason in chosen.islands.items() if "enc_bbox_head" in name}
        assert any("query selection" in reason for reason in reasons)


def test_names_are_not_needed_for_that(files, scenes, tmp_path):
    model = onnx.load(files["raw"])
    for node in model.graph.node:
        node.name = ""
    onnx.save(model, tmp_path / "nameless.onnx")
    result = bring(tmp_path / "nameless.onnx", tmp_path / "b", data=scenes, size=(HEIGHT, WIDTH))
    names = [node.name for node in onnx.load(result.bundle.require("model.onnx")).graph.node]
    assert sum(name.startswith("/decoder/") for name in names) > 50
    assert sum(name.startswith("/selector/") for name in names) > 5


# ---- the whole way


@pytest.mark.parametrize("kind", ["raw", "decoded"])
def test_import_int8_lint_and_verify_by_the_command_line(kind, files, scenes, tmp_path, capsys):
    out = str(tmp_path / "b.bundle")
    size = f"{HEIGHT}x{WIDTH}"
    assert cli.run(["import", str(files[kind]), "--out", out, "--data", str(scenes), "--input", size]) == 0
    said = capsys.readouterr().err
    assert "there is no PyTorch model" in said
    assert "normalisation taken: (pixel x 0.00392157 - 0 0 0) / 1 1 1" in said
    assert cli.run(["export", out, "--int8"]) == 0
    assert cli.run(["lint", out]) == 0
    bundle = Bundle.open(out)
    assert {"reference.npz", "ranges.json", "model.int8.onnx", "model.int8-cpu.onnx"} <= set(bundle.manifest.files)
    listed = bundle.manifest.files
    assert listed["reference.npz"].made_from == {"model.onnx": listed["model.onnx"].sha256}
    assert any(node.op_type == "QuantizeLinear" for node in onnx.load(bundle.require("model.int8.onnx")).graph.node)
    before = (tmp_path / "b.bundle" / "bundle.json").read_bytes()
    assert cli.run(["export", out, "--int8"]) == 0
    assert (tmp_path / "b.bundle" / "bundle.json").read_bytes() == before
    capsys.readouterr()
    assert cli.run(["verify", out, "--max-drop", "100", "--threads", "1", "--json"]) == 0
    captured = capsys.readouterr()
    stages = {(s["name"], s["backend"]): s for s in json.loads(captured.out)["stages"]}
    assert ("reference", "onnxruntime") in stages
    assert stages["onnx", "onnxruntime"]["drop"] == 0       # the same file, the same library
    assert stages["onnx", "onnxruntime"]["parity"]["matched"] in (None, 1.0)
    assert "an imported graph has no PyTorch model" in captured.err
    assert cli.run(["export", out, "--sampling", "grid_sample"]) == 2


# ---- what the file cannot say


def test_one_logit_more_than_classes_must_be_explained(files, scenes, tmp_path):
    with pytest.raises(UsageError, match="7 class logits for 6 classes; say what they are: --activation softmax"):
        bring(files["softmax"], tmp_path / "b", data=scenes)
    assert not (tmp_path / "b").exists()


def test_names_put_the_logits_in_the_order_of_the_data_set(files, scenes, tmp_path):
    known = ["circle", "square", "triangle", "star", "ring", "cross"]
    (tmp_path / "names.txt").write_text("\n".join(["cross", *known[:5]]) + "\n")
    result = bring(files["raw"], tmp_path / "b", data=scenes, size=(HEIGHT, WIDTH), classes=tmp_path / "names.txt")
    assert [item.name for item in result.bundle.manifest.classes] == known
    detector = load(result.bundle, backend="onnxruntime", stage="onnx", threads=1)
    image = pictures(1)
    labels, _, _ = answers("raw", files["raw"], image, result.pixels)
    found = detector([image[0].transpose(1, 2, 0).astype(np.uint8)])[0]
    assert found.class_id[:10].tolist() == [(label - 1) % 6 for label in labels[:10]]


def test_without_data_classes_come_from_the_file_of_names(files, tmp_path):
    (tmp_path / "names.txt").write_text("a\n-\nc\nd\ne\nf\n")
    result = bring(files["raw"], tmp_path / "b", size=(HEIGHT, WIDTH), classes=tmp_path / "names.txt")
    assert [(item.name, item.category_id) for item in result.bundle.manifest.classes] == [
        ("a", 0), ("c", 2), ("d", 3), ("e", 4), ("f", 5)]
    assert result.bundle.manifest.data is None


@pytest.mark.parametrize("text, message", [("", "0 names"), ("a\n\nb", "empty or twice"), ("a\na", "empty or twice"),
                                           ("a\nb\nc", "6 class logits for 3 classes|line for each|does not name")])
def test_a_faulty_list_of_names_is_refused(files, scenes, tmp_path, text, message):
    (tmp_path / "names.txt").write_text(text)
    with pytest.raises(UsageError, match=message):
        bring(files["raw"], tmp_path / "b", data=scenes, size=(HEIGHT, WIDTH), classes=tmp_path / "names.txt")


def test_an_open_size_must_be_said_and_a_fixed_one_kept(files, scenes, tmp_path):
    with pytest.raises(UsageError, match="--input 640x640"):
        bring(files["raw"], tmp_path / "b", data=scenes)
    with pytest.raises(UsageError, match="the file takes 96x128 alone"):
        bring(files["rf"], tmp_path / "b", data=scenes, size=(96, 96))


def test_rf_detr_gets_the_statistics_it_was_published_with(brought):
    kind, _, result = brought
    if kind != "softmax":           # that one is told others
        assert result.pixels.mean == ((0.485, 0.456, 0.406) if kind == "rf" else (0, 0, 0))


# ---- files that are refused


def detector_of(*, boxes: float = 1.0, image=(1, 3, 32, 32), kind=TensorProto.FLOAT, extra: tuple = (),
                outputs=("logits", "pred_boxes")) -> ModelProto:
    """A graph that keeps the raw contract: a picture's mean moves fixed logits and boxes."""
    rng = np.random.default_rng(0)
    constants = {"l": rng.normal(size=(1, 12, 3)).astype(np.float32), "zero": np.float32(1e-3),
                 "b": (rng.uniform(0.2, 0.8, (1, 12, 4)) * boxes).astype(np.float32)}
    nodes = [helper.make_node("ReduceMean", ["x"], ["m"], axes=[0, 1, 2, 3], keepdims=0),
             helper.make_node("Mul", ["m", "zero"], ["z"]),
             helper.make_node("Add", ["l", "z"], [outputs[0]]), helper.make_node("Add", ["b", "z"], [outputs[1]])]
    values = [helper.make_tensor_value_info("x", kind, image), *extra]
    results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 12, last])
               for name, last in zip(outputs, (3, 4))]
    graph = helper.make_graph(nodes, "g", values, results,
                              [numpy_helper.from_array(value, name) for name, value in constants.items()])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def replaced(change) -> ModelProto:
    model = detector_of()
    change(model)
    return model


def _domain(model):
    model.graph.node[2].domain = "com.microsoft"
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))


def _quantised(model):
    model.graph.node.insert(0, helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "p"]))


def _no_boxes(model):
    del model.graph.output[1]


def _dangling(model):
    model.graph.node[2].input[1] = "nowhere"


@pytest.mark.parametrize("model, message", [
    (detector_of(image=(1, 32, 32, 3)), "32 channels at its second place; .*channels first"),
    (detector_of(image=(4, 3, 32, 32)), "takes 4 pictures at a time"),
    (detector_of(kind=TensorProto.FLOAT16), "input 'x' is float16; expected float32"),
    (detector_of(extra=(helper.make_tensor_value_info("text", TensorProto.INT64, [1, 7, 9, 9, 9]),)),
     "input text int64 .* is not known"),
    (replaced(_domain), "operators that are not ONNX's own: Add \\(com.microsoft\\)"),
    (replaced(_quantised), "quantised already"),
    (replaced(_no_boxes), "the graph gives logits .*; expected one of: logits"),
    (replaced(_dangling), "not valid ONNX"),
    (detector_of(boxes=640.0), "boxes go from .*expected cx, cy, w, h as shares"),
])
def test_what_cannot_be_imported_is_said_and_leaves_nothing(tmp_path, model, message):
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(ExportError, match=message):
        bring(tmp_path / "m.onnx", tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_the_smallest_file_passes(tmp_path):
    """The twin of the refused ones."""
    onnx.save(detector_of(), tmp_path / "m.onnx")
    result = bring(tmp_path / "m.onnx", tmp_path / "b")
    assert [item.name for item in result.bundle.manifest.classes] == ["class 0", "class 1", "class 2"]


def test_a_mask_of_pixels_becomes_a_constant(tmp_path):
    """Hugging Face's DETR asks which pixels are picture: here all of them are."""
    mask = helper.make_tensor_value_info("pixel_mask", TensorProto.INT64, ["batch", "height", "width"])
    model = detector_of(extra=(mask,))
    model.graph.node.insert(0, helper.make_node("Cast", ["pixel_mask"], ["f"], to=TensorProto.FLOAT))
    model.graph.node.insert(1, helper.make_node("ReduceMean", ["f"], ["share"], axes=[0, 1, 2], keepdims=0))
    model.graph.node.insert(2, helper.make_node("Mul", ["x", "share"], ["seen"]))
    model.graph.node[3].input[0] = "seen"
    onnx.save(model, tmp_path / "m.onnx")
    result = bring(tmp_path / "m.onnx", tmp_path / "b")
    assert [item.name for item in onnx.load(result.bundle.require("model.onnx")).graph.input] == ["images"]


@pytest.mark.parametrize("content", [b"", b"\x00" * 100, b"{}", detector_of().SerializeToString()[:300]])
def test_a_damaged_file_is_refused(tmp_path, content):
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(ExportError):
        bring(tmp_path / "m.onnx", tmp_path / "b")


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_weights_behind_a_link_are_refused(tmp_path, link):
    (tmp_path / "model").mkdir()
    onnx.save(detector_of(), tmp_path / "model" / "m.onnx", save_as_external_data=True, location="w.bin",
              size_threshold=0)
    assert bring(tmp_path / "model" / "m.onnx", tmp_path / "good").objects
    (tmp_path / "model" / "w.bin").rename(tmp_path / "elsewhere.bin")
    link(tmp_path / "elsewhere.bin", tmp_path / "model" / "w.bin")
    with pytest.raises(ExportError, match="which is a (symbolic|hard) link"):
        bring(tmp_path / "model" / "m.onnx", tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_decoding_that_is_not_understood_is_not_guessed(files, tmp_path, scenes):
    """The same graph with scores that are not those of its boxes."""
    model = onnx.load(files["decoded"])
    model.graph.initializer.append(numpy_helper.from_array(np.float32(0.37), "third"))
    out = next(node for node in model.graph.node if "boxes" in node.output)
    out.output[0] = "boxes/before"
    model.graph.node.append(helper.make_node("Mul", ["boxes/before", "third"], ["boxes"], "odd"))
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(ExportError, match="tensors that may be logits and boxes give the detections"):
        bring(tmp_path / "m.onnx", tmp_path / "b", data=scenes, size=(HEIGHT, WIDTH))


def test_a_trained_bundle_is_not_overwritten(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "weights.safetensors").write_bytes(b"years")
    onnx.save(detector_of(), tmp_path / "m.onnx")
    with pytest.raises(UsageError, match="holds a trained model"):
        bring(tmp_path / "m.onnx", tmp_path / "b")


@pytest.mark.parametrize("words, message", [
    (["m.onnx", "--model", "detr"], "--model is for weights"),
    (["w.safetensors", "--model", "detr", "--mean", "0", "0", "0"], "--mean is for an ONNX file"),
    (["w.safetensors"], "weights need --model"),
    (["m.onnx", "--input", "640"], "expected height x width"),
    (["m.onnx", "--std", "0", "1", "1"], "std"),
])
def test_wrong_words_are_told(tmp_path, words, message, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    onnx.save(detector_of(), tmp_path / "m.onnx")
    assert cli.run(["import", *words, "--out", "b"]) == 2
    assert message in capsys.readouterr().err


# ---- surgery


def run(model: ModelProto, **feed) -> list[np.ndarray]:
    return open_session(model.SerializeToString()).run(None, feed)


def graph_of(nodes, constants, shape=(1, 4, 6, 6), opset=17, name="x") -> ModelProto:
    graph = helper.make_graph(nodes, "g", [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)],
                              [helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, None)],
                              [numpy_helper.from_array(np.asarray(value, np.float32), key)
                               for key, value in constants.items()])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("form", ["batch-norm", "mul-add", "scalar", "flat"])
def test_scales_are_folded_into_the_convolution(form, biased, rng):
    constants = {"w": rng.normal(size=(5, 4, 3, 3)), **({"wb": rng.normal(size=5)} if biased else {})}
    nodes = [helper.make_node("Conv", ["x", "w", *(["wb"] if biased else [])], ["c"], "conv")]
    if form == "batch-norm":
        constants |= {"g": rng.normal(size=5), "s": rng.normal(size=5), "m": rng.normal(size=5),
                      "v": rng.uniform(0.1, 2, 5)}
        nodes.append(helper.make_node("BatchNormalization", ["c", "g", "s", "m", "v"], ["n"], "norm", epsilon=1e-3))
    else:
        shape = {"mul-add": (1, 5, 1, 1), "scalar": (), "flat": (5, 1, 1)}[form]
        constants |= {"g": rng.normal(size=shape), "s": rng.normal(size=shape)}
        nodes += [helper.make_node("Mul", ["g", "c"], ["k"], "mul"), helper.make_node("Add", ["k", "s"], ["n"], "add")]
    model = graph_of([*nodes, helper.make_node("Relu", ["n"], ["y"], "relu")], constants)
    image = rng.normal(size=(1, 4, 6, 6)).astype(np.float32)
    before = run(model, x=image)[0]
    assert absorb_scales(model) == len(nodes) - 1
    assert [node.op_type for node in model.graph.node] == ["Conv", "Relu"]
    # float32 rounding of weights that were folded in float64; values are around 10
    np.testing.assert_allclose(run(model, x=image)[0], before, atol=1e-4)


def test_what_is_read_twice_or_is_no_scale_stays(rng):
    shared = graph_of([helper.make_node("Conv", ["x", "w"], ["c"], "conv"),
                       helper.make_node("Mul", ["c", "g"], ["k"], "m"),
                       helper.make_node("Add", ["k", "c"], ["y"], "a")],
                      {"w": rng.normal(size=(5, 4, 3, 3)), "g": rng.normal(size=(1, 5, 1, 1))})
    assert absorb_scales(shared) == 0
    along_width = graph_of([helper.make_node("Conv", ["x", "w"], ["c"], "conv"),
                            helper.make_node("Mul", ["c", "g"], ["y"], "m")],
                           {"w": rng.normal(size=(5, 4, 3, 3)), "g": rng.normal(size=(1, 1, 1, 4))})
    assert absorb_scales(along_width) == 0


@pytest.mark.parametrize("mode, older", [("linear", b"bilinear"), ("cubic", b"bicubic"), ("nearest", b"nearest")])
def test_the_modes_of_grid_sample_are_renamed_on_the_way_down(mode, older, rng):
    grid = rng.uniform(-1.1, 1.1, (1, 3, 5, 2))
    model = graph_of([helper.make_node("GridSample", ["x", "g"], ["y"], "s", mode=mode)], {"g": grid}, opset=20)
    model.ir_version = 9
    image = rng.normal(size=(1, 4, 6, 6)).astype(np.float32)
    expected = run(model, x=image)[0]
    lower = to_opset(model, 19)
    assert lower.graph.node[0].attribute[0].s == older
    assert (lower.ir_version, lower.opset_import[0].version) == (9, 19)
    np.testing.assert_array_equal(run(lower, x=image)[0], expected)


def test_what_an_older_opset_does_not_have_is_named():
    newer = graph_of([helper.make_node("Gelu", ["x"], ["y"], "the_gelu")], {}, opset=20)
    with pytest.raises(ExportError, match="Gelu the_gelu of opset 20 does not exist at opset 19"):
        to_opset(newer, 19)
    changed = graph_of([helper.make_node("GroupNormalization", ["x", "a", "b"], ["y"], "gn", num_groups=2)],
                       {"a": np.ones(4), "b": np.ones(4)}, opset=21)
    with pytest.raises(ExportError, match="means something else at"):
        to_opset(changed, 19)


def test_an_older_file_is_converted_upwards(rng):
    model = graph_of([helper.make_node("ReduceMean", ["x"], ["y"], "mean", axes=[2, 3])], {}, opset=13)
    image = rng.normal(size=(1, 4, 6, 6)).astype(np.float32)
    lifted = to_opset(model, 19)
    assert lifted.opset_import[0].version == 19
    np.testing.assert_array_equal(run(lifted, x=image)[0], run(model, x=image)[0])


@pytest.mark.parametrize("align", [0, 1])
@pytest.mark.parametrize("shape, points", [((1, 4, 6, 6), (3, 5)), ((1, 3, 1, 7), (4, 1)), ((2, 2, 5, 1), (1, 6))])
def test_gathers_give_the_numbers_of_grid_sample(shape, points, align, rng):
    grid = rng.uniform(-1.4, 1.4, (shape[0], *points, 2))
    grid.reshape(-1)[:6] = [-1, 1, 0, 0, 1, -1]             # the borders and the middle exactly
    node = helper.make_node("GridSample", ["x", "g"], ["y"], "s", mode="bilinear", align_corners=align)
    model = graph_of([node], {"g": grid}, shape=shape, opset=19)
    values = rng.normal(size=shape).astype(np.float32)
    expected = run(model, x=values)[0]
    assert gather_samples(model) == 1
    assert "GridSample" not in {item.op_type for item in model.graph.node}
    # float32: places are scaled in another order; measured 2e-6 on values around 1
    np.testing.assert_allclose(run(model, x=values)[0], expected, atol=2e-5)
    torch_grid, torch_values = (torch.from_numpy(value.astype(np.float32)) for value in (grid, values))
    oracle = torch.nn.functional.grid_sample(torch_values, torch_grid, align_corners=bool(align))
    np.testing.assert_allclose(run(model, x=values)[0], oracle.numpy(), atol=2e-5)


@pytest.mark.parametrize("told", [{"mode": "nearest"}, {"padding_mode": "border"}])
def test_other_samplings_stay(told, rng):
    node = helper.make_node("GridSample", ["x", "g"], ["y"], "s", **told)
    model = graph_of([node], {"g": rng.uniform(-1, 1, (1, 2, 2, 2))}, opset=19)
    assert gather_samples(model) == 0
    assert [item.op_type for item in model.graph.node] == ["GridSample"]


def test_every_node_gets_a_name_of_its_own():
    model = graph_of([helper.make_node("Relu", ["x"], ["a"], "same"), helper.make_node("Relu", ["a"], ["b"], "same"),
                      helper.make_node("Relu", ["b"], ["y"])], {})
    name_nodes(model)
    names = [node.name for node in model.graph.node]
    assert names[0] == "same"
    assert len(set(names)) == 3
    assert all(names)
