"""Pretrained weights: every layout is converted, and what does not fit is named."""

from __future__ import annotations

import pickle
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from edgedetr.bundle import Bundle, ClassInfo, InputContract, Manifest, OutputContract
from edgedetr.errors import ModelError
from edgedetr.models import build
from edgedetr.models.backbones.resnet import resnet
from edgedetr.models.checkpoints.backbone_names import rename_backbone
from edgedetr.models.checkpoints.pretrained import load_backbone, load_detector, load_weights, read_weights
from edgedetr.models.deploy import load_bundle_model
from edgedetr.models.members.detr import DetrConfig
from edgedetr.models.members.rt_detr import RtDetrConfig
from edgedetr.published import hub_files

TINY = {"hidden": 32, "heads": 4, "encoder_ffn": 48, "decoder_ffn": 48, "decoder_layers": 1, "queries": 5}


def published_resnet(name: str, deep: bool) -> dict[str, torch.Tensor]:
    """Names and sizes as torchvision (or, deep, timm's "d") publishes them; made from the papers' tables."""
    bottleneck = name == "resnet50"
    depths, grow = ([3, 4, 6, 3], 4) if bottleneck else ([2, 2, 2, 2], 1)
    shapes: dict[str, tuple[int, ...]] = {"fc.weight": (1000, 512 * grow), "fc.bias": (1000,)}

    def norm(key: str, channels: int) -> None:
        shapes.update({f"{key}.{part}": (channels,) for part in ("weight", "bias", "running_mean", "running_var")})
        shapes[f"{key}.num_batches_tracked"] = ()

    if deep:
        for number, (inputs, outputs) in {0: (3, 32), 3: (32, 32), 6: (32, 64)}.items():
            shapes[f"conv1.{number}.weight"] = (outputs, inputs, 3, 3)
        norm("conv1.1", 32)
        norm("conv1.4", 32)
    else:
        shapes["conv1.weight"] = (64, 3, 7, 7)
    norm("bn1", 64)
    channels = 64
    for stage, depth in enumerate(depths):
        middle = 64 * 2**stage
        for block in range(depth):
            key, outputs = f"layer{stage + 1}.{block}", middle * grow
            if bottleneck:
                sizes = [(middle, channels, 1, 1), (middle, middle, 3, 3), (outputs, middle, 1, 1)]
            else:
                sizes = [(middle, channels, 3, 3), (middle, middle, 3, 3)]
            for number, size in enumerate(sizes, start=1):
                shapes[f"{key}.conv{number}.weight"] = size
                norm(f"{key}.bn{number}", size[0])
            if channels != outputs:
                first = 1 if deep else 0
                shapes[f"{key}.downsample.{first}.weight"] = (outputs, channels, 1, 1)
                norm(f"{key}.downsample.{first + 1}", outputs)
            channels = outputs
    generator = torch.Generator().manual_seed(0)
    return {key: torch.rand(size, generator=generator) for key, size in shapes.items()}


@pytest.mark.parametrize("name, deep", [("resnet18", False), ("resnet50", False), ("resnet50", True)])
def test_backbones_of_torchvision_and_timm_fit(name: str, deep: bool) -> None:
    weights = published_resnet(name, deep)
    net = resnet(name + "vd" * deep, levels=(5,), frozen_norm=True)
    loaded = load_weights(net, rename_backbone(weights), name)
    assert loaded.fresh == ()
    assert torch.equal(net.stages[1][0].body[1].norm.running_var, weights["layer2.0.bn2.running_var"])
    assert torch.equal(net.stem[-1].norm.bias, weights["bn1.bias"])
    shortcut = net.stages[3][0].shortcut.project
    assert torch.equal(shortcut.conv.weight, weights[f"layer4.0.downsample.{int(deep)}.weight"])
    assert torch.equal(shortcut.norm.weight, weights[f"layer4.0.downsample.{int(deep) + 1}.weight"])


@pytest.mark.parametrize("member", ["detr", "rt_detr"])
def test_files_of_transformers_load(member: str, tmp_path: Path) -> None:
    """As `save_pretrained` writes them, which is how they are stored on the hub."""
    transformers = pytest.importorskip("transformers")
    if member == "detr":
        backbone = transformers.ResNetConfig(
            embedding_size=64,
            hidden_sizes=[64, 128, 256, 512],
            depths=[2, 2, 2, 2],
            layer_type="basic",
            out_features=["stage4"],
        )
        theirs = transformers.DetrForObjectDetection(
            transformers.DetrConfig(
                backbone_config=backbone,
                use_timm_backbone=False,
                backbone=None,
                use_pretrained_backbone=False,
                num_labels=3,
                d_model=32,
                encoder_layers=1,
                decoder_layers=1,
                encoder_ffn_dim=48,
                decoder_ffn_dim=48,
                num_queries=5,
            )
        )
        config: object = DetrConfig(
            backbone="resnet18", hidden=32, ffn=48, encoder_layers=1, decoder_layers=1, queries=5
        )
    else:
        backbone = transformers.RTDetrResNetConfig(
            embedding_size=32,
            hidden_sizes=[32, 64, 128, 256],
            depths=[2, 2, 2, 2],
            layer_type="basic",
            out_features=["stage2", "stage3", "stage4"],
        )
        theirs = transformers.RTDetrForObjectDetection(
            transformers.RTDetrConfig(
                backbone_config=backbone,
                num_labels=3,
                encoder_in_channels=[64, 128, 256],
                d_model=32,
                encoder_hidden_dim=32,
                decoder_in_channels=[32] * 3,
                encoder_ffn_dim=48,
                decoder_ffn_dim=48,
                decoder_layers=1,
                num_queries=5,
                hidden_expansion=0.5,
                decoder_attention_heads=4,
                anchor_image_size=None,
            )
        )
        config = RtDetrConfig(backbone_width=0.5, **TINY)
    theirs.save_pretrained(tmp_path)
    ours = build(member, config, 3)
    with torch.no_grad():
        for tensor in ours.state_dict().values():
            tensor.fill_(-7)  # so that a tensor that was not loaded would show
    loaded = load_detector(ours, member, str(tmp_path / "model.safetensors"))
    assert loaded.fresh == ()
    assert [name for name, p in ours.named_parameters() if (p == -7).all()] == []


def test_another_number_of_classes_starts_the_heads_anew_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    source, target = (build("rt_detr", RtDetrConfig(backbone_width=0.25, **TINY), classes) for classes in (80, 3))
    before = target.selector.score.weight.clone()
    loaded = load_weights(target, source.state_dict(), "eighty classes")
    assert set(loaded.fresh) == {
        "selector.score.weight",
        "selector.score.bias",
        "selector.denoising_class_embed.weight",
        "decoder.boxes.score.0.weight",
        "decoder.boxes.score.0.bias",
    }
    assert torch.equal(target.selector.score.weight, before)
    assert torch.equal(target.encoder.project[0].conv.weight, source.encoder.project[0].conv.weight)
    assert "selector.score.weight" in caplog.text


def test_whatever_does_not_fit_is_listed() -> None:
    detector = build("rt_detr", RtDetrConfig(backbone_width=0.25, **TINY), 3)
    weights = dict(detector.state_dict())
    weights["selector.extra"] = weights.pop("selector.norm.weight")
    weights["selector.norm.bias"] = torch.zeros(5)
    with pytest.raises(
        ModelError,
        match=r"missing \(1\): selector.norm.weight; left over \(1\): selector.extra; "
        r"of another size \(1\): selector.norm.bias \(5,\) for \(32,\)",
    ):
        load_weights(detector, weights, "file")


def test_offline_the_error_names_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")

    def unreachable(*args: object, **options: object) -> str:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(hub, "get_hf_file_metadata", unreachable)
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub_files, "why_offline", lambda: "")
    config = DetrConfig(backbone="resnet18")
    with torch.device("meta"):
        detector = build("detr", config, 3)
    with pytest.raises(
        ModelError, match=r"no route to host.*edgedetr fetch timm/resnet18.tv_in1k --to DIR.*--start random"
    ):
        load_backbone(detector, config)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ModelError, match="pip install huggingface-hub"):
        load_backbone(detector, config)


def test_random_loads_nothing_and_a_narrow_backbone_has_no_published_weights() -> None:
    narrow = RtDetrConfig(backbone_width=0.25, **TINY)
    detector = build("rt_detr", narrow, 3)
    with pytest.raises(ModelError, match=r"no published weights for resnet18vd at width 0.25; .*--start random"):
        load_backbone(detector, narrow)
    assert load_backbone(detector, RtDetrConfig(backbone_weights="random", backbone_width=0.25, **TINY)) is None


class Malicious:
    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return Path.write_text, (Path("executed"), "x")


@pytest.mark.parametrize("content", [b"", b"not weights", pickle.dumps(Malicious())], ids=["empty", "text", "pickle"])
@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
def test_damaged_and_malicious_files_are_refused_unexecuted(
    content: bytes, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(content)
    with pytest.raises(ModelError, match="not readable as weights"):
        read_weights(name)
    assert not Path("executed").exists()
    with pytest.raises(ModelError, match=r"missing.pth: no such file"):
        read_weights("missing.pth")


def test_torch_files_are_read_through_their_wrappers(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save({"ema": {"module": {"module.a": torch.ones(2)}}, "epoch": 3}, path)
    assert torch.equal(read_weights(str(path))["a"], torch.ones(2))
    torch.save({"epoch": 3}, path)
    with pytest.raises(ModelError, match="no tensors inside"):
        read_weights(str(path))


def test_a_bundle_gives_back_the_model_that_was_trained(tmp_path: Path) -> None:
    config = RtDetrConfig(backbone_width=0.25, points=(4, 2, 3), **TINY)
    trained = build("rt_detr", config, 2).eval()
    classes = (ClassInfo(0, 7, "cat"), ClassInfo(1, 9, "dog"))
    manifest = Manifest("rt_detr", classes, InputContract(64, 96), OutputContract(), asdict(config))
    bundle = Bundle.create(tmp_path / "b.bundle", manifest)
    with bundle.add("weights.safetensors", stage="train") as path:
        save_file(trained.state_dict(), path)
    detector, graph = load_bundle_model(Bundle.open(bundle.path))
    assert all(torch.equal(value, trained.state_dict()[key]) for key, value in detector.state_dict().items())
    assert (graph.height, graph.width) == (64, 96)
    bundle.update(config={**asdict(config), "hidden": 64})
    with pytest.raises(ModelError, match="the weights do not fit the rt_detr that bundle.json describes"):
        load_bundle_model(Bundle.open(bundle.path))
    bundle.update(config={**asdict(config), "hiden": 64})
    with pytest.raises(ModelError, match="unexpected keyword argument 'hiden'"):
        load_bundle_model(Bundle.open(bundle.path))
