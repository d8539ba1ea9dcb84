"""Detectors of other libraries as their users export them, and one of each contract that we know."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

torch = pytest.importorskip("torch")
HEIGHT, WIDTH = 96, 128
CLASSES = 6  # of the rendered set
QUERIES = 20


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
        torch.onnx.export(
            module,
            example,
            str(path),
            input_names=list(names),
            output_names=list(results),
            opset_version=opset,
            dynamo=False,
            dynamic_axes=axes,
        )
    return path


def hugging_face_rt_detr(version: str = ""):
    """version  "" or "V2" of transformers' RTDetr."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    backbone = transformers.RTDetrResNetConfig(
        embedding_size=16,
        hidden_sizes=[16, 32, 64, 64],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    config = getattr(transformers, f"RTDetr{version}Config")(
        backbone_config=backbone,
        encoder_in_channels=[32, 64, 64],
        d_model=32,
        encoder_hidden_dim=32,
        encoder_ffn_dim=48,
        encoder_attention_heads=4,
        decoder_in_channels=[32, 32, 32],
        decoder_ffn_dim=48,
        decoder_attention_heads=4,
        num_queries=QUERIES,
        decoder_layers=2,
        decoder_n_points=2,
        num_denoising=0,
        num_labels=CLASSES,
        use_pretrained_backbone=False,
        anchor_image_size=None,
    )
    return spread(getattr(transformers, f"RTDetr{version}ForObjectDetection")(config))


def hugging_face_detr():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    backbone = transformers.ResNetConfig(
        embedding_size=16,
        hidden_sizes=[16, 32, 32, 48],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage4"],
    )
    config = transformers.DetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=backbone,
        d_model=32,
        num_queries=QUERIES,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        num_labels=CLASSES,
    )
    return spread(transformers.DetrForObjectDetection(config))


def hugging_face_d_fine():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    backbone = transformers.HGNetV2Config(
        stem_channels=[3, 16, 16],
        stage_in_channels=[16, 16, 32, 32],
        stage_mid_channels=[16] * 4,
        stage_out_channels=[16, 32, 32, 32],
        stage_num_blocks=[1] * 4,
        stage_numb_of_layers=[2] * 4,
        stage_light_block=[False, False, True, True],
        stage_downsample=[False, True, True, True],
        stage_kernel_size=[3, 3, 5, 5],
        use_learnable_affine_block=True,
        hidden_sizes=[16, 32, 32, 32],
        depths=[1] * 4,
        embedding_size=16,
        out_features=["stage2", "stage3", "stage4"],
    )
    config = transformers.DFineConfig(
        backbone_config=backbone,
        encoder_in_channels=[32] * 3,
        d_model=32,
        encoder_hidden_dim=32,
        encoder_ffn_dim=48,
        encoder_attention_heads=4,
        decoder_in_channels=[32] * 3,
        decoder_ffn_dim=48,
        decoder_attention_heads=4,
        num_queries=QUERIES,
        decoder_layers=2,
        decoder_n_points=2,
        num_denoising=0,
        num_labels=CLASSES,
        max_num_bins=8,
        feat_strides=[8, 16, 32],
        num_feature_levels=3,
        anchor_image_size=None,
        use_pretrained_backbone=False,
    )
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
        center, half = boxes[..., :2], boxes[..., 2:] / 2
        corners = torch.cat([center - half, center + half], -1) * orig_target_sizes.repeat(1, 2).unsqueeze(1)
        if self.sigmoid:
            scores, index = torch.topk(torch.sigmoid(logits).flatten(1), self.top, dim=-1)
            labels, index = index - index // logits.shape[2] * logits.shape[2], index // logits.shape[2]
        else:
            scores, labels = torch.softmax(logits, -1)[:, :, :-1].max(-1)
            scores, index = torch.topk(scores, self.top, dim=-1)
            labels = labels.gather(1, index)
        return labels, corners.gather(1, index.unsqueeze(-1).repeat(1, 1, 4)), scores


def renamed(path: Path, **names: str) -> ModelProto:
    """The same graph with other names for its inputs and outputs."""
    model = onnx.load(path)
    for node in model.graph.node:
        for tensors in (node.input, node.output):
            for index, name in enumerate(tensors):
                tensors[index] = names.get(name, name)
    for item in (*model.graph.input, *model.graph.output):
        item.name = names.get(item.name, item.name)
    return model


def rf_detr(raw: Path, out: Path) -> Path:
    """A raw graph under RF-DETR's names, for HEIGHT x WIDTH alone."""
    model = renamed(raw, pixel_values="input", logits="labels", pred_boxes="dets")
    for dimension, size in zip(model.graph.input[0].type.tensor_type.shape.dim[2:], (HEIGHT, WIDTH)):
        dimension.dim_value = size
    onnx.save(model, out)
    return out


def joined(raw: Path, out: Path) -> Path:
    """A raw graph that gives boxes and scores in one tensor [B, N, 4 + K]."""
    model = renamed(raw, pixel_values="images")
    model.graph.node.extend(
        [
            helper.make_node("Sigmoid", ["logits"], ["scores"], "scores"),
            helper.make_node("Concat", ["pred_boxes", "scores"], ["output0"], "joined", axis=-1),
        ]
    )
    del model.graph.output[:]
    model.graph.output.append(
        helper.make_tensor_value_info("output0", TensorProto.FLOAT, ["batch", QUERIES, 4 + CLASSES])
    )
    onnx.save(model, out)
    return out


def open_session(model: str | bytes) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def sample_images(count: int) -> np.ndarray:
    """[count, 3, H, W] noise, 0..255."""
    return np.random.default_rng(7).integers(0, 256, (count, 3, HEIGHT, WIDTH)).astype(np.float32)


def detector_of(
    *,
    boxes: float = 1.0,
    image=(1, 3, 32, 32),
    kind=TensorProto.FLOAT,
    extra: tuple = (),
    outputs=("logits", "pred_boxes"),
) -> ModelProto:
    """A graph that keeps the raw contract: an image's mean moves fixed logits and boxes."""
    rng = np.random.default_rng(0)
    constants = {
        "l": rng.normal(size=(1, 12, 3)).astype(np.float32),
        "zero": np.float32(1e-3),
        "b": (rng.uniform(0.2, 0.8, (1, 12, 4)) * boxes).astype(np.float32),
    }
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["m"], axes=[0, 1, 2, 3], keepdims=0),
        helper.make_node("Mul", ["m", "zero"], ["z"]),
        helper.make_node("Add", ["l", "z"], [outputs[0]]),
        helper.make_node("Add", ["b", "z"], [outputs[1]]),
    ]
    values = [helper.make_tensor_value_info("x", kind, image), *extra]
    results = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 12, last]) for name, last in zip(outputs, (3, 4))
    ]
    graph = helper.make_graph(
        nodes, "g", values, results, [numpy_helper.from_array(value, name) for name, value in constants.items()]
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
