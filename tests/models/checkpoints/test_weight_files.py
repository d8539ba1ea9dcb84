"""Weight files of others: every usual form is read, and what is no file of tensors is named and not loaded."""

from __future__ import annotations

import json
import pickle
import random
import zipfile
from pathlib import Path
from typing import Any

import author_state_dicts
import pytest
import torch
from safetensors.torch import save_file

from edgedetr.errors import ModelError
from edgedetr.importing import weights as published
from edgedetr.importing.import_options import ImportOptions
from edgedetr.importing.weights import import_weights
from edgedetr.models import build
from edgedetr.models.checkpoints import conversion
from edgedetr.models.checkpoints.pretrained import load_weights, read_weights
from edgedetr.models.checkpoints.weight_source import WeightSource
from edgedetr.models.members.detr import DetrConfig

CONFIG = DetrConfig(
    backbone="resnet18", backbone_width=0.25, hidden=32, heads=4, ffn=48, encoder_layers=1, decoder_layers=1, queries=6
)
Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def ours() -> Weights:
    generator = torch.Generator().manual_seed(2)
    return {
        name: torch.randn(value.shape, generator=generator)
        for name, value in build("detr", CONFIG, 3).state_dict().items()
    }


@pytest.fixture(scope="module")
def authors(ours: Weights) -> Weights:
    return author_state_dicts.detr(ours, 1)


def comes_back(source: Path, ours: Weights) -> None:
    found = conversion.translate("detr", read_weights(str(source)), str(source))
    assert found.keys() == ours.keys()
    assert all(torch.equal(found[name], ours[name]) for name in ours)


def sharded(folder: Path, weights: Weights, suffix: str) -> Path:
    """Two shards and their index, as save_pretrained(max_shard_size=...) writes them."""
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    listed = sorted(weights)
    weight_map = {}
    for number, part in enumerate((listed[: len(listed) // 2], listed[len(listed) // 2 :]), start=1):
        name = f"{stem}-0000{number}-of-00002.{suffix}"
        tensors = {key: weights[key].contiguous() for key in part}
        save_file(tensors, folder / name) if suffix == "safetensors" else torch.save(tensors, folder / name)
        weight_map.update(dict.fromkeys(part, name))
    index = folder / f"{stem}.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}), encoding="utf-8")
    return index


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards_are_put_together(suffix: str, ours: Weights, authors: Weights, tmp_path: Path) -> None:
    index = sharded(tmp_path, authors, suffix)
    comes_back(tmp_path, ours)
    comes_back(index, ours)
    origin = WeightSource(str(tmp_path))
    origin.weights()
    assert len(origin.record()["files"]) == 3, "the index and both shards"


def test_an_index_is_believed_about_nothing(authors: Weights, tmp_path: Path) -> None:
    index = sharded(tmp_path, authors, "safetensors")
    weight_map = json.loads(index.read_text())["weight_map"]
    first = sorted(weight_map)[0]
    for wrong, said in [
        ({"weight_map": {**weight_map, first: "../x.safetensors"}}, "expected a file in the folder of the index"),
        ({"weight_map": {**weight_map, first: "/etc/passwd"}}, "expected a file in the folder of the index"),
        ({"weight_map": {**weight_map, first: 7}}, "no weight_map"),
        ({}, "no weight_map"),
        ([1], "no weight_map"),
        ({"weight_map": {**weight_map, "extra": weight_map[first]}}, "extra is missing"),
        ({"weight_map": {k: v for k, v in weight_map.items() if k != first}}, f"{first} is not in the index"),
        ({"weight_map": {**weight_map, first: "gone.safetensors"}}, "names gone.safetensors, which is not"),
        ({"weight_map": {f"a{i}": f"f{i}" for i in range(501)}}, "501 files"),
    ]:
        index.write_text(json.dumps(wrong), encoding="utf-8")
        with pytest.raises(ModelError, match=said):
            read_weights(str(tmp_path))
    index.write_text("[" * 100_000, encoding="utf-8")
    with pytest.raises(ModelError, match="nested too deep"):
        read_weights(str(tmp_path))


def test_a_bin_file_and_its_folder_are_read(ours: Weights, authors: Weights, tmp_path: Path) -> None:
    torch.save(authors, tmp_path / "pytorch_model.bin")
    comes_back(tmp_path, ours)
    comes_back(tmp_path / "pytorch_model.bin", ours)


@pytest.mark.parametrize(
    "prefix",
    [
        "model.",
        "module.",
        "model.model.",
        "module.model.",
        "model.module.",
        "net.",
        "_orig_mod.",
        "ema_model.module.",
        "detector._orig_mod.",
    ],
)
def test_prefixes_of_frameworks_go(prefix: str, ours: Weights, authors: Weights, tmp_path: Path) -> None:
    """Lightning's fields, DistributedDataParallel, torch.compile, averaged models; the loss's own buffers stay out."""
    weights = {prefix + name: tensor for name, tensor in authors.items()}
    weights |= {"criterion.empty_weight": torch.ones(4), "n_averaged": torch.tensor(3)}
    torch.save(
        {
            "state_dict": weights,
            "pytorch-lightning_version": "2.5.0",
            "epoch": 3,
            "global_step": 10,
            "loops": {"fit_loop": {"state_dict": {}}},
            "callbacks": {},
            "optimizer_states": [{"state": {}}],
            "hyper_parameters": {"lr": 1e-4},
        },
        tmp_path / "last.ckpt",
    )
    comes_back(tmp_path / "last.ckpt", ours)


def test_lightning_around_a_model_of_transformers(tmp_path: Path) -> None:
    """`self.model = DetrForObjectDetection(...)`: every name begins with model., transformers' own with model.model."""
    mine = [
        (r"encoder.project.", "model.input_projection."),
        (r"selector.position.", "model.query_position_embeddings."),
        (r"decoder.boxes.score.", "class_labels_classifier."),
    ]
    weights = {theirs + kind: torch.ones(2) for _, theirs in mine for kind in ("weight",)}
    for prefix in ("", "model.", "model.model."):
        found = conversion.translate("detr", {prefix + name: tensor for name, tensor in weights.items()})
        assert sorted(found) == sorted(ours + "weight" for ours, _ in mine), prefix
    assert conversion.layout_of("detr", {f"model.{name}": tensor for name, tensor in weights.items()}) == "transformers"


@pytest.mark.parametrize("wrapper", ["ema", "model_ema", "ema_state_dict", "state_dict_ema", "ema_model"])
def test_averaged_weights_are_taken_and_said(wrapper: str, ours: Weights, authors: Weights, tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    inner: Any = {"module": authors, "updates": 7} if wrapper == "ema" else authors
    torch.save({"model": {name: tensor + 1 for name, tensor in authors.items()}, wrapper: inner}, path)
    comes_back(path, ours)
    origin = WeightSource(str(path))
    origin.weights()
    assert origin.notes == [f"weights under {wrapper!r} were read, and not those under 'model'"]


class Detector(torch.nn.Module):
    """A class of a stranger's program."""


class Malicious:
    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return Path.write_text, (Path("executed"), "x")


def write(path: Path, what: str) -> None:
    if what == "model":
        torch.save(Detector(), path)
    elif what == "old model":
        torch.save(Detector(), path, _use_new_zipfile_serialization=False)
    elif what == "malicious":
        torch.save({"model": {"a": torch.ones(2)}, "x": Malicious()}, path)
    elif what == "old malicious":
        torch.save({"x": Malicious()}, path, _use_new_zipfile_serialization=False)
    elif what == "pickle":
        path.write_bytes(pickle.dumps(Malicious()))
    elif what == "numpy":
        path.write_bytes(pickle.dumps({"a": __import__("numpy").ones(3)}, protocol=2))
    elif what == "script":
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    elif what == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("readme.txt", "hello")
    elif what == "lora":
        torch.save({"base_model.model.q.lora_A.weight": torch.ones(2, 2)}, path)
    elif what == "sparse":
        torch.save({"a": torch.eye(3).to_sparse()}, path)
    elif what == "wide":
        torch.save({"a": torch.zeros(1).expand(100_000, 100_000)}, path)
    elif what == "shared":
        torch.save(dict.fromkeys(map(str, range(500)), torch.zeros(100_000)), path)
    elif what == "list":
        torch.save([torch.ones(2)], path)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize(
    "what, said",
    [
        ("model", "objects of .*Detector.*nothing was loaded.*state_dict"),
        ("old model", "objects of .*Detector"),
        ("malicious", "objects of .*getattr"),
        ("old malicious", "objects of .*getattr"),
        ("pickle", "not readable as"),
        ("numpy", "objects of .*numpy.ndarray"),
        ("script", "TorchScript archive"),
        ("zip", "a zip, but not as torch.save writes it"),
        ("lora", "adapter .LoRA.*merge_and_unload"),
        ("sparse", "objects of torch._utils._rebuild_sparse_tensor"),
        ("wide", "a .100000, 100000. is not stored in full|share far more"),
        ("shared", "share far more than the file holds"),
        ("list", "no tensors inside .list"),
    ],
)
def test_what_is_no_file_of_tensors_is_named_in_one_line(
    what: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("w.pth"), what)
    with pytest.raises(ModelError, match=said) as raised:
        read_weights("w.pth")
    assert "\n" not in str(raised.value) and "weights_only" not in str(raised.value)
    assert not Path("executed").exists()


def test_a_compressed_archive_is_refused_before_it_takes_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """20 kB that promise 20 MB, as torch itself would load them."""
    stored, path = tmp_path / "s.pth", tmp_path / "w.pth"
    torch.save({"model": {"a": torch.zeros(5_000_000)}}, stored)
    with zipfile.ZipFile(stored) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in source.namelist():
            packed.writestr(name, source.read(name))
    assert path.stat().st_size < 30_000 and torch.load(path, weights_only=True)["model"]["a"].shape == (5_000_000,)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was loaded"))
    with pytest.raises(ModelError, match="bytes promise 200.*not compressed"):
        read_weights(str(path))


def test_a_configuration_that_the_tensors_do_not_fill_is_never_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A norm of 8000 channels has 32 kB; the attentions of that width would have gigabytes."""
    weights = author_state_dicts.detr(build("detr", CONFIG, 3).state_dict(), 1)
    for name in [name for name in weights if name.startswith("transformer.decoder") and ".norm" in name]:
        weights[name] = torch.ones(8000)
    torch.save(weights, tmp_path / "w.pth")
    devices: list[str] = []

    def watched(*args: Any) -> Any:
        devices.append(torch.get_default_device().type)
        return build(*args)

    monkeypatch.setattr(published, "build", watched)
    with pytest.raises(ModelError, match="of another size"):
        import_weights(
            str(tmp_path / "w.pth"), tmp_path / "b", ImportOptions(model="detr", size=(64, 64), sets=("model.heads=4",))
        )
    assert devices == ["meta"]


@pytest.mark.parametrize(
    "name, said",
    [
        ("m.onnx", "an ONNX graph; run: edgedetr import .*m.onnx --out BUNDLE"),
        ("m.engine", "a TensorRT engine"),
        ("m.plan", "a TensorRT engine"),
        ("m.tflite", "TensorFlow Lite"),
        ("m.h5", "TensorFlow's weights"),
        ("m.msgpack", "Flax's weights"),
        ("m.pkl", "a pickle, which could execute anything"),
        ("m.xml", "an OpenVINO model"),
    ],
)
def test_another_kind_of_file_is_named_with_what_takes_it(name: str, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"something")
    with pytest.raises(ModelError, match=said):
        read_weights(str(tmp_path / name))
    with pytest.raises(ModelError, match="no such file"):
        read_weights(str(tmp_path / f"gone-{name}"))


def test_folders_without_weights_say_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="holds none of model.safetensors.*it holds nothing"):
        read_weights(str(tmp_path))
    (tmp_path / "checkpoint-500").mkdir()
    (tmp_path / "checkpoint-500" / "model.safetensors").touch()
    with pytest.raises(ModelError, match="holds no weights, but checkpoint-500 in it do; name .*checkpoint-500"):
        read_weights(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="holds an adapter .PEFT.*merge_and_unload"):
        read_weights(str(tmp_path))
    (tmp_path / "adapter_config.json").unlink()
    (tmp_path / "bundle.json").write_text("{}")
    with pytest.raises(ModelError, match="is a bundle of edgedetr already; run: edgedetr export"):
        read_weights(str(tmp_path))


@pytest.mark.parametrize("source", ["x" * 5000, "a\0b", "/nowhere/w", "../x y"])
def test_unusual_names_are_one_error(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError):
        read_weights(source)


@pytest.mark.parametrize("form", ["new.pth", "old.pth", "w.safetensors"])
def test_damaged_files_are_one_error(form: str, tmp_path: Path) -> None:
    """Bytes changed and ends cut off, from one seed; 3,000 of each form were tried once, at most 246 MB resident."""
    path, draw = tmp_path / form, random.Random(4)
    tensors = {"a.weight": torch.ones(4, 4), "b": torch.zeros(3)}
    if form == "w.safetensors":
        save_file(tensors, path)
    else:
        torch.save({"model": tensors}, path, _use_new_zipfile_serialization=form == "new.pth")
    whole, said = path.read_bytes(), []
    for _ in range(150):
        damaged = bytearray(whole[: draw.randrange(len(whole))] if draw.random() < 0.15 else whole)
        for _ in range(draw.choice([1, 2, 8])):
            if damaged:
                damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        path.write_bytes(damaged)
        try:
            read_weights(str(path))
        except ModelError as error:
            said.append(str(error))
    assert len(said) > 50 and not any("\n" in message for message in said)


@pytest.mark.parametrize(
    "form, said",
    [
        ("torch.int8", "stored as torch.int8; expected float32, float16"),
        ("torch.complex64", "torch.complex64"),
        ("torch.float8_e4m3fn", "torch.float8"),
        ("nan", "NaN or infinity"),
        ("half that overflows", "NaN or infinity"),
    ],
)
def test_weights_that_are_no_numbers_to_compute_with_are_refused_by_name(form: str, said: str, ours: Weights) -> None:
    name = "decoder.layers.0.feedforward.up.weight"
    changed = {"nan": ours[name] * float("nan"), "half that overflows": (ours[name] * 1e6).half()}
    tensor = changed[form] if form in changed else ours[name].to(getattr(torch, form.removeprefix("torch.")))
    with pytest.raises(ModelError, match=f"w.pth: {name} .*{said}"):
        load_weights(build("detr", CONFIG, 3), {**ours, name: tensor}, "w.pth")
    load_weights(build("detr", CONFIG, 3), {name: tensor.bfloat16() for name, tensor in ours.items()}, "w.pth")
