"""bundle.json is read strictly: damage is noticed, wrong values are one error each, and no name or link leads out."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgedetr.bundle import Bundle, ClassInfo, DataRecord, InputContract, Manifest, OutputContract
from edgedetr.errors import BundleError
from edgedetr.storage.manifest import manifest_from_json, manifest_to_text

OLD = Path(__file__).parents[1] / "fixtures" / "bundle-0.1" / "bundle.json"
MANIFEST = Manifest(
    "rt_detr",
    (ClassInfo(0, 1, "cell"), ClassInfo(1, 7, "größer")),
    InputContract(320, 256),
    OutputContract("softmax", 100),
    {"hidden": 256, "mean": [0.5, 1.0]},
    DataRecord("/data/cells", "test"),
    0.5,
)


@pytest.fixture
def bundle(tmp_path) -> Bundle:
    made = Bundle.create(tmp_path / "b.bundle", MANIFEST)
    put(made, "ranges.json", "1")
    put(made, "results/verify.json", "{}", made_from=["ranges.json"])
    return made


def put(bundle, name, text, made_from=()):
    with bundle.add(name, stage="test", made_from=made_from) as path:
        path.write_text(text)


def flips(text: bytes, step: int) -> tuple[int, list[int]]:
    """How many flipped bits were refused, and the positions of those that changed the meaning unnoticed."""
    whole, refused, unnoticed = manifest_from_json(json.loads(text)), 0, []
    for bit in range(0, 8 * len(text), step):
        damaged = bytearray(text)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            if manifest_from_json(json.loads(damaged.decode())) != whole:
                unnoticed.append(bit)
        except (ValueError, BundleError):  # json's and Unicode's errors are ValueErrors
            refused += 1
    return refused, unnoticed


def of_now(text: str) -> bytes:
    """The content of an older bundle.json as this version writes it."""
    return manifest_to_text(manifest_from_json(json.loads(text))).encode()


def test_a_flipped_bit_never_changes_the_meaning_unnoticed():
    old = OLD.read_bytes()
    assert flips(old, 97)[1]  # without a digest it does
    refused, unnoticed = flips(of_now(old.decode()), 97)
    assert unnoticed == [] and refused > 300  # the others are in white space


@pytest.mark.slow
def test_no_flipped_bit_at_all_changes_the_meaning_unnoticed():
    assert flips(of_now(OLD.read_text()), 1)[1] == []


def test_an_edit_by_hand_is_refused_until_the_digest_is_taken_out(bundle):
    where = bundle.path / "bundle.json"
    raw = json.loads(where.read_text())
    where.write_text(json.dumps({**raw, "budget": 0.75}))
    with pytest.raises(BundleError, match=r"bundle\.json: damaged.*does not match its digest.* remove the line"):
        Bundle.open(bundle.path)
    del raw["digest"]
    where.write_text(json.dumps({**raw, "budget": 0.75}))
    assert Bundle.open(bundle.path).manifest.budget == 0.75


def test_spaces_and_order_of_keys_are_no_damage(bundle):
    where = bundle.path / "bundle.json"
    where.write_text(json.dumps(dict(reversed(json.loads(where.read_text()).items()))))
    assert Bundle.open(bundle.path).manifest == bundle.manifest


def key_paths(value: object, at: tuple = ()) -> list[tuple]:
    """The way to every value of a JSON document, the document itself included."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(key_path for key, item in inner for key_path in key_paths(item, (*at, key)))]


WHOLE = json.loads(manifest_to_text(MANIFEST)) | {
    "files": {"model.onnx": {"sha256": "0" * 64, "size": 5, "stage": "export", "made_from": {"ranges.json": "1" * 64}}}
}
del WHOLE["digest"]
KEY_PATHS = key_paths(WHOLE)
OTHERS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.just([]),
    st.just({}),
    st.sampled_from(
        [
            -1,
            0,
            10**400,
            2**64,
            float("nan"),
            float("inf"),
            "\0",
            "\ud800",
            "a" * 5000,
            "../x",
            "/etc/passwd",
            [[]],
            [{}],
            {"": {}},
            {"..": 1},
            {"a" * 300: {}},
            ["x"] * 3,
        ]
    ),
    st.recursive(
        st.none() | st.integers() | st.text(max_size=3),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
        max_leaves=6,
    ),
)


@settings(max_examples=250, deadline=None)
@given(st.sampled_from(KEY_PATHS), OTHERS)
def test_any_value_at_any_key_is_read_unchanged_or_is_one_error(key_path, value):
    raw = copy.deepcopy(WHOLE)
    if key_path:
        inner = raw
        for key in key_path[:-1]:
            inner = inner[key]
        inner[key_path[-1]] = value
    else:
        raw = value
    try:
        found = manifest_from_json(raw)
    except (ValueError, BundleError) as error:
        str(error).encode()  # printable anywhere
        return
    assert manifest_from_json(json.loads(manifest_to_text(found))) == found
    assert isinstance(found.budget, float) and 0 <= found.budget <= 100
    assert found.input.height > 0 and 0 < found.output.top_k <= 100_000
    assert all(name.encode() and not Path(name).is_absolute() and ".." not in Path(name).parts for name in found.files)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"budget": float("nan")}, "budget is nan; expected points of AP from 0 to 100"),
        ({"budget": True}, "budget is True"),
        ({"input": {"height": 16000, "width": 16000}}, "input is 16000 x 16000; expected at most 33,554,432 pixels"),
        ({"synthetic": 1}, "synthetic is 1; expected true or false"),
        ({"output": {"activation": "relu"}}, "output.activation is 'relu'"),
        ({"output": {"top_k": "100"}}, "output.top_k is '100'"),
        ({"output": {"top_k": 10**9}}, "output.top_k is 1000000000; expected a whole number from 1 to"),
        ({"input": {"height": 64, "width": True}}, "input.width is True"),
        ({"input": {"height": 64, "width": 10**9}}, "input.width is 1000000000"),
        ({"input": {"height": 64}}, "input.width is None"),
        ({"config": {"hidden": float("inf")}}, "config.hidden is inf"),
        ({"config": {"levels": [{"n": 2**80}]}}, r"config\.levels\.0\.n is 1208925819614629174706176"),
        ({"classes": "cell"}, "classes is 'cell'; expected a list"),
        ({"classes": [{"index": 0, "category_id": "1", "name": "cell"}]}, r"classes\[0\]\.category_id is '1'"),
        ({"data": {"path": "a\0b", "verify_split": "test"}}, r"data\.path is 'a\\x00b'"),
        ({"files": {"a": {"sha256": "0" * 64, "size": -1, "stage": "x"}}}, r"size is -1"),
        ({"files": {"a": {"sha256": "0", "size": 1, "stage": "x"}}}, "expected 64 hexadecimal digits"),
        ({"files": {"a" * 256: {}}}, "has a part of 256 bytes; expected at most 255"),
        ({"files": {"a\nb": {}}}, "is not a plain relative name"),
        ({"files": {"a/./b": {}}}, "is not a plain relative name"),
        ({"model": ["rt_detr"]}, r"model is \['rt_detr'\]"),
        ({"more": 1}, "unknown key 'more'"),
        ({"schema": True}, "schema is True"),
        ({"schema": 3}, "schema is 3, this version reads 1 to 2"),
    ],
)
def test_a_wrong_value_is_named_with_what_was_expected(bundle, change, words):
    where = bundle.path / "bundle.json"
    raw = {key: value for key, value in json.loads(where.read_text()).items() if key != "digest"}
    where.write_text(json.dumps({**raw, **change}))
    with pytest.raises(BundleError, match=words) as caught:
        Bundle.open(bundle.path)
    assert str(where) in str(caught.value)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, '{"budget": ' + "9" * 5000 + "}", "\xff", "{"])
def test_hostile_json_is_one_error(bundle, text):
    (bundle.path / "bundle.json").write_text(text, encoding="latin-1")
    with pytest.raises(BundleError, match=r"bundle\.json"):
        Bundle.open(bundle.path)


def test_a_pipe_named_bundle_json_does_not_hang(bundle):
    (bundle.path / "bundle.json").unlink()
    os.mkfifo(bundle.path / "bundle.json")
    with pytest.raises(BundleError, match="not a plain file"):
        Bundle.open(bundle.path)


def test_what_could_not_be_read_back_is_not_written(bundle):
    before = (bundle.path / "bundle.json").read_bytes()
    with pytest.raises(BundleError, match="budget is 101"):
        bundle.update(budget=101.0)
    assert (bundle.path / "bundle.json").read_bytes() == before


@pytest.mark.parametrize("name", ["results", "report", "train"])
def test_a_linked_folder_is_neither_read_nor_written_through(bundle, tmp_path, name):
    outside = tmp_path / "thesis"
    outside.mkdir()
    (outside / "verify.json").write_text("years of work")
    (outside / ".x.0123abcd-1.y.tmp").write_text("not ours")
    if (bundle.path / name).is_dir():
        os.rename(bundle.path / name, tmp_path / "old")
    (bundle.path / name).symlink_to(outside)
    with (
        pytest.raises(BundleError, match="a link; expected plain files and folders"),
        bundle.add(f"{name}/verify.json", stage="test") as path,
    ):
        path.write_text("replaced")
    with pytest.raises(BundleError, match="a link"):
        bundle.inside(f"{name}/verify.json")
    assert {path.name: path.read_text() for path in outside.iterdir()} == {
        "verify.json": "years of work",
        ".x.0123abcd-1.y.tmp": "not ours",
    }


def test_a_linked_file_is_refused_though_its_content_fits(bundle, tmp_path):
    os.rename(bundle.path / "ranges.json", tmp_path / "elsewhere.json")
    (bundle.path / "ranges.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(BundleError, match=r"ranges\.json: a link"):
        bundle.require("ranges.json")


def test_the_bundle_itself_may_be_a_link(bundle, tmp_path):
    (tmp_path / "current").symlink_to(bundle.path)
    opened = Bundle.open(tmp_path / "current")
    put(opened, "model.onnx", "graph")
    assert opened.require("results/verify.json").read_text() == "{}"
    assert Bundle.open(bundle.path).has("model.onnx")


@pytest.mark.parametrize("path", ["a" * 300, "a\0b", "x/" * 3000])
def test_a_path_that_no_file_system_takes_is_one_error(path):
    with pytest.raises(BundleError):
        Bundle.open(path)
