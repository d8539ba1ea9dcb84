"""Pretrained weights become bundles: architecture from tensors, classes and resize from the files next to them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import author_state_dicts
import pytest
import torch
from references import reference_resnet, transformers, with_spread
from safetensors.torch import save_file

from edgedetr.bundle import Bundle
from edgedetr.cli import run
from edgedetr.data.coco_classes import COCO, coco_classes
from edgedetr.data.synthetic import render
from edgedetr.errors import DataError, ModelError, RecipeError, UsageError
from edgedetr.exporting.export import export
from edgedetr.importing.import_options import ImportOptions
from edgedetr.importing.weights import import_weights
from edgedetr.models import build
from edgedetr.models.checkpoints import conversion as names
from edgedetr.models.checkpoints.pretrained import read_weights
from edgedetr.models.deploy import load_bundle_model
from edgedetr.models.members.deformable_detr import DeformableDetrConfig
from edgedetr.models.members.detr import DetrConfig
from edgedetr.models.members.rt_detr import RtDetrConfig

DETR = DetrConfig(
    backbone="resnet18", backbone_width=0.25, hidden=32, heads=4, ffn=48, encoder_layers=2, decoder_layers=2, queries=6
)
DEFORMABLE = DeformableDetrConfig(
    backbone="resnet18",
    backbone_width=0.25,
    hidden=64,
    heads=4,
    ffn=48,
    encoder_layers=2,
    decoder_layers=2,
    queries=6,
    refine=True,
    two_stage=True,
)
HEADS = ("model.heads=4",)


@pytest.fixture(scope="module")
def detr_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small DETR of 91 classes in facebookresearch's names."""
    path = tmp_path_factory.mktemp("detr") / "detr.pth"
    torch.save({"model": author_state_dicts.detr(build("detr", DETR, 91).state_dict(), 2)}, path)
    return path


def rt_detr_folder(path: Path) -> torch.nn.Module:
    """A small RT-DETR as transformers saves it, with the files that the hub has next to the weights."""
    backbone = transformers.RTDetrResNetConfig(
        embedding_size=32,
        hidden_sizes=[32, 64, 128, 256],
        depths=[2, 2, 2, 2],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    model = with_spread(
        transformers.RTDetrV2ForObjectDetection(
            transformers.RTDetrV2Config(
                backbone_config=backbone,
                id2label={0: "red cell", 1: "platelet"},
                label2id={"red cell": 0, "platelet": 1},
                encoder_in_channels=[64, 128, 256],
                d_model=32,
                encoder_hidden_dim=32,
                decoder_in_channels=[32] * 3,
                encoder_ffn_dim=48,
                decoder_ffn_dim=48,
                decoder_layers=2,
                num_queries=7,
                hidden_expansion=0.5,
                encoder_attention_heads=4,
                decoder_attention_heads=4,
                anchor_image_size=None,
            )
        )
    )
    model.save_pretrained(path)
    (path / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "do_normalize": False,
                "do_resize": True,
                "image_mean": [0.5] * 3,
                "image_std": [0.2] * 3,
                "size": {"height": 64, "width": 96},
            }
        )
    )
    return model


@pytest.fixture(scope="module")
def rt_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rt") / "hub"
    rt_detr_folder(path)
    return path


def test_a_folder_of_transformers_becomes_a_bundle_with_the_same_detections(tmp_path: Path) -> None:
    theirs = rt_detr_folder(tmp_path / "hub")
    imported = import_weights(str(tmp_path / "hub"), tmp_path / "b.bundle", ImportOptions(model="rt_detr"))
    manifest = Bundle.open(tmp_path / "b.bundle").manifest
    assert [c.name for c in manifest.classes] == ["red cell", "platelet"]
    assert (manifest.input.height, manifest.input.width, manifest.input.resize) == (64, 96, "stretch")
    assert manifest.config["queries"] == 7 and manifest.config["heads"] == 4
    assert list(manifest.config["mean"]) == [0, 0, 0]
    assert imported.layout == "transformers" and imported.fresh == ()
    images = torch.randint(0, 256, (1, 3, 64, 96)).float()
    with torch.no_grad():
        logits, boxes = load_bundle_model(imported.bundle)[1](images)
        expected = theirs(pixel_values=images / 255)
    assert expected.pred_boxes.std() > 1e-2 and expected.logits.std() > 1e-2, "the reference says something"
    # Folded BatchNorm in float32, measured 1e-8 and 0; the weights' spread decides the order of the queries.
    torch.testing.assert_close(logits, expected.logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(boxes, expected.pred_boxes, atol=1e-5, rtol=0)


def test_an_authors_file_keeps_its_resize_and_classes_are_coco_by_their_number(detr_file: Path, tmp_path: Path) -> None:
    imported = import_weights(str(detr_file), tmp_path / "b.bundle", ImportOptions(model="detr", sets=HEADS))
    manifest = imported.bundle.manifest
    assert (manifest.input.height, manifest.input.width, manifest.input.resize) == (800, 1344, "letterbox")
    assert manifest.classes[1].name == "person" and manifest.classes[90].category_id == 90
    assert manifest.config == {**manifest.config, "backbone": "resnet18", "encoder_layers": 2, "queries": 6}
    assert any("800 px" in note for note in imported.notes) and any("COCO" in note for note in imported.notes)
    assert Bundle.open(imported.bundle.path).require("recipe.toml").is_file()


def test_what_no_tensor_shows_is_reported(detr_file: Path, tmp_path: Path) -> None:
    notes = import_weights(str(detr_file), tmp_path / "a", ImportOptions(model="detr", size=(64, 64), sets=HEADS)).notes
    unreadable = next(note for note in notes if "no tensor shows" in note)
    assert (
        "whether C5 is dilated (DC5)" in unreadable and "heads=4" in unreadable and "ffn_activation=relu" in unreadable
    )
    assert "--set model.heads=VALUE" in unreadable
    path = tmp_path / "rt.pth"
    config = RtDetrConfig(backbone_width=0.25, hidden=32, heads=4, encoder_ffn=48, decoder_ffn=48, decoder_layers=3)
    torch.save({"ema": {"module": author_state_dicts.rt_detr(build("rt_detr", config, 80).state_dict(), 2)}}, path)
    sets = ("model.heads=4", "model.queries=7")
    notes = import_weights(str(path), tmp_path / "b", ImportOptions(model="rt_detr", size=(64, 64), sets=sets)).notes
    unreadable = next(note for note in notes if "no tensor shows" in note)
    assert "whether sampling is discrete" in unreadable and "eval_idx" in unreadable and "method=default" in unreadable
    assert "queries=7" in unreadable, "as set"
    fewer = import_weights(
        str(path), tmp_path / "c", ImportOptions(model="rt_detr", size=(64, 64), sets=(*sets, "model.decoder_layers=2"))
    )
    assert fewer.bundle.manifest.config["decoder_layers"] == 2
    assert any("decoder layers from 2 on are left out" in note for note in fewer.notes)


def test_a_model_of_another_kind_is_refused_by_its_name(tmp_path: Path) -> None:
    """A folder of D-FINE has RT-DETR's names almost everywhere."""
    rt_detr_folder(tmp_path / "hub")
    config = json.loads((tmp_path / "hub" / "config.json").read_text())
    (tmp_path / "hub" / "config.json").write_text(json.dumps({**config, "model_type": "d_fine"}))
    with pytest.raises(ModelError, match='model_type is "d_fine"; rt_detr is read from rt_detr or rt_detr_v2; '):
        import_weights(str(tmp_path / "hub"), tmp_path / "b", ImportOptions(model="rt_detr"))
    weights = {
        "model.enc_score_head.weight": torch.ones(2, 2),
        "model.backbone.model.encoder.stages.1.downsample.conv.weight": torch.ones(2, 2),
        "layer1.0.downsample.x.weight": torch.ones(1),
    }
    torch.save(weights, tmp_path / "d.pth")
    with pytest.raises(ModelError, match="no class head"):
        import_weights(str(tmp_path / "d.pth"), tmp_path / "b", ImportOptions(model="rt_detr", size=(64, 64)))
    with pytest.raises(ModelError, match="no known layout of detr .*use --model rt_detr"):
        import_weights(str(tmp_path / "d.pth"), tmp_path / "b", ImportOptions(model="detr", size=(64, 64)))
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("config.json", "[" * 200_000, "config.json: nested too deep"),
        ("config.json", "{", "config.json: not readable as JSON"),
        ("config.json", "[]", "config.json: list; expected an object"),
        ("config.json", "\xff", "config.json: not UTF-8"),
        ("config.json", {"id2label": ["a", "b"]}, "id2label is a list; expected a name for each class"),
        (
            "config.json",
            {"id2label": {"0": "a"}},
            "id2label has 1 entries; expected one for each of the class head's 2",
        ),
        ("config.json", {"id2label": {"0": "a", "7": "b"}}, "id2label has 2 entries, which are not those from 0 to 1"),
        ("config.json", {"id2label": {"0": "a", "1": {"x": 1}}}, "id2label holds a dict"),
        ("config.json", {"id2label": {"0": "a", "1": None}}, "id2label holds a NoneType"),
        ("config.json", {"num_labels": 5}, "num_labels is 5"),
        ("config.json", {"d_model": "wide"}, 'd_model is "wide"'),
        ("config.json", {"decoder_attention_heads": 10**30}, "decoder_attention_heads is 10000"),
        ("config.json", {"decoder_attention_heads": {"a": []}}, "decoder_attention_heads is "),
        ("config.json", {"hidden_expansion": float("inf")}, "hidden_expansion is Infinity"),
        ("preprocessor_config.json", "[" * 200_000, "preprocessor_config.json: nested too deep"),
        ("preprocessor_config.json", {"size": {"height": "x", "width": 3}}, 'size: height is "x"'),
    ],
)
def test_hub_files_of_wrong_types_are_one_error_and_nothing_is_written(
    name: str, content: object, message: str, rt_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "hub"
    shutil.copytree(rt_folder, folder)
    if isinstance(content, dict):
        content = json.dumps({**json.loads((folder / name).read_text()), **content})
    (folder / name).write_bytes(str(content).encode("latin-1"))
    with pytest.raises(ModelError, match=message):
        import_weights(str(folder), tmp_path / "b", ImportOptions(model="rt_detr"))
    assert not (tmp_path / "b").exists()


def test_rt_detr_r101_has_an_encoder_wider_than_its_decoder(tmp_path: Path) -> None:
    """384 and 256 channels, as published; here 48 and 32 after a smaller backbone, in the authors' names."""
    config = RtDetrConfig(
        backbone_width=0.25,
        hidden=32,
        encoder_width=48,
        heads=4,
        encoder_ffn=48,
        decoder_ffn=40,
        decoder_layers=2,
        expansion=1.0,
    )
    ours = build("rt_detr", config, 80).state_dict()
    torch.save({"ema": {"module": author_state_dicts.rt_detr(ours, 2)}}, tmp_path / "r101.pth")
    imported = import_weights(
        str(tmp_path / "r101.pth"),
        tmp_path / "b",
        ImportOptions(model="rt_detr", size=(64, 64), sets=(*HEADS, "model.queries=7")),
    )
    config = imported.bundle.manifest.config
    assert (config["encoder_width"], config["hidden"], config["expansion"]) == (48, 32, 1.0)
    state = load_bundle_model(imported.bundle)[0].state_dict()
    assert all(torch.equal(state[name], value) for name, value in ours.items())


def test_timms_names_of_a_backbone_are_read_with_its_config(tmp_path: Path) -> None:
    """facebook/detr-resnet-50 has use_timm_backbone; timm is not needed to read it."""
    config = DetrConfig(backbone="resnet18", hidden=32, heads=4, ffn=48, encoder_layers=1, decoder_layers=1, queries=6)
    theirs = transformers.DetrForObjectDetection(
        transformers.DetrConfig(
            backbone_config=reference_resnet(18),
            num_labels=3,
            d_model=32,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            num_queries=6,
        )
    )
    theirs = with_spread(theirs)
    theirs.save_pretrained(tmp_path)
    ours = names.translate("detr", read_weights(str(tmp_path)))
    rest = {name: value for name, value in read_weights(str(tmp_path)).items() if ".backbone." not in name}
    inside = author_state_dicts.torchvision_resnet(ours, "model.backbone.conv_encoder.model.")
    save_file({name: value.contiguous() for name, value in {**rest, **inside}.items()}, tmp_path / "model.safetensors")
    raw = json.loads((tmp_path / "config.json").read_text())
    timm = {"backbone_config": None, "use_timm_backbone": True, "backbone": "resnet18", "backbone_kwargs": None}
    (tmp_path / "config.json").write_text(json.dumps({**raw, **timm}))
    imported = import_weights(str(tmp_path), tmp_path / "b", ImportOptions(model="detr", size=(64, 96)))
    assert imported.bundle.manifest.config["backbone"] == config.backbone
    images = torch.randint(0, 256, (1, 3, 64, 96)).float()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        logits, boxes = load_bundle_model(imported.bundle)[1](images)
        expected = theirs(pixel_values=(images / 255 - mean) / std)
    torch.testing.assert_close(logits, expected.logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(boxes, expected.pred_boxes, atol=1e-5, rtol=0)
    (tmp_path / "config.json").write_text(json.dumps({**raw, **timm, "backbone": "resnet34"}))
    with pytest.raises(ModelError, match="backbone is resnet34, but the tensors are those of resnet18 at width 1"):
        import_weights(str(tmp_path), tmp_path / "c", ImportOptions(model="detr", size=(64, 96)))


def test_an_imported_bundle_exports(detr_file: Path, tmp_path: Path) -> None:
    bundle = import_weights(
        str(detr_file), tmp_path / "b.bundle", ImportOptions(model="detr", size=(64, 96), sets=HEADS)
    ).bundle
    export(bundle)
    assert Bundle.open(bundle.path).has("model.onnx")


def test_deformable_two_stage_is_recognized_and_says_what_it_cannot_know(tmp_path: Path) -> None:
    ours = build("deformable_detr", DEFORMABLE, 80).state_dict()
    torch.save({"model": author_state_dicts.deformable_detr(ours, 2)}, tmp_path / "d.pth")
    imported = import_weights(
        str(tmp_path / "d.pth"),
        tmp_path / "b.bundle",
        ImportOptions(model="deformable_detr", size=(320, 320), sets=(*HEADS, "model.queries=6")),
    )
    config = imported.bundle.manifest.config
    assert config["two_stage"] and config["refine"] and config["points"] == 4 and config["levels"] == 4
    detector, _ = load_bundle_model(imported.bundle)
    state = detector.state_dict()
    assert all(torch.equal(state[name], value) for name, value in ours.items())
    assert imported.bundle.manifest.classes[79].category_id == 90


def test_other_classes_keep_their_rows_by_name_and_the_rest_is_reported(detr_file: Path, tmp_path: Path) -> None:
    data = render(tmp_path / "data", train=2, val=2, verify=2, size=64)
    names = tmp_path / "names.txt"
    names.write_text("\n".join(["circle", "-", *(f"thing {i}" for i in range(2, 91))]), encoding="utf-8")
    imported = import_weights(
        str(detr_file),
        tmp_path / "b.bundle",
        ImportOptions(model="detr", data=data, classes=names, size=(64, 96), sets=HEADS),
    )
    manifest = imported.bundle.manifest
    assert "circle" in imported.kept and imported.fresh
    assert set(imported.kept) | set(imported.fresh) == {c.name for c in manifest.classes}
    assert "started anew: " + ", ".join(imported.fresh) in imported.notes[-1]
    assert manifest.data is not None and manifest.data.verify_split == "test"
    row = next(c.index for c in manifest.classes if c.name == "circle")
    source = torch.load(detr_file, weights_only=True)["model"]["class_embed.weight"]
    head = load_bundle_model(imported.bundle)[0].decoder.boxes.score.weight
    assert torch.equal(head[row], source[0]) and torch.equal(head[-1], source[-1])


def test_what_cannot_be_imported_says_why_and_leaves_nothing(detr_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "b.bundle"
    short = tmp_path / "names.txt"
    short.write_text("a\nb\n", encoding="utf-8")
    with pytest.raises(DataError, match="names 2 classes, but the class head of .* has 91"):
        import_weights(str(detr_file), out, ImportOptions(model="detr", classes=short, sets=HEADS))
    short.write_text("\n".join(["a", *(f"class {number}" for number in range(89)), "a"]), encoding="utf-8")
    with pytest.raises(UsageError, match="91 names, of which some are empty or repeated"):
        import_weights(str(detr_file), out, ImportOptions(model="detr", classes=short, sets=HEADS))
    with pytest.raises(ModelError, match="no known layout of rt_detr"):
        import_weights(str(detr_file), out, ImportOptions(model="rt_detr"))
    with pytest.raises(ModelError, match="of another size .*expected the same architecture"):
        import_weights(str(detr_file), out, ImportOptions(model="detr", sets=(*HEADS, "model.queries=7")))
    with pytest.raises(RecipeError, match="multiples of 32"):
        import_weights(str(detr_file), out, ImportOptions(model="detr", sets=HEADS, size=(70, 70)))
    assert not out.exists()
    import_weights(str(detr_file), out, ImportOptions(model="detr", sets=HEADS, size=(64, 64)))
    with pytest.raises(ModelError, match="is a bundle already"):
        import_weights(str(detr_file), out, ImportOptions(model="detr", sets=HEADS))


def test_the_command_says_what_it_did(detr_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        run(
            [
                "import",
                str(detr_file),
                "--model",
                "detr",
                "--out",
                str(tmp_path / "b"),
                "--input",
                "64x96",
                "--set",
                "model.heads=4",
                "--json",
            ]
        )
        == 0
    )
    captured = capsys.readouterr()
    assert "facebookresearch/detr" in captured.err and "instead of the 800 x 1344" in captured.err
    assert json.loads(captured.out)["layout"] == "facebookresearch/detr"


def test_coco_has_eighty_classes_up_to_ninety() -> None:
    """Against the counts of the data set's own page: 80 categories, 11 numbers of 0..90 unused."""
    assert len(COCO) == len(set(COCO.values())) == 80
    by_number = coco_classes(91)
    assert by_number is not None and sum(name == "N/A" for _, name in by_number) == 11
    assert coco_classes(79) is None
