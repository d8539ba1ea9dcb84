"""The sensitivity of a bundle: which images, which rows, what is kept, and the command."""

from __future__ import annotations

import csv
import io
import json
import shutil
from xml.etree import ElementTree

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from scipy.stats import spearmanr

import edgedetr
from edgedetr.artifacts import ONNX, SENSITIVITY
from edgedetr.bundle import Bundle
from edgedetr.cli import cli
from edgedetr.errors import ExportError
from edgedetr.onnx_graph.index import GraphIndex
from edgedetr.quantization.calibration_set import choose_images
from edgedetr.quantization.concat_split import split_concats
from edgedetr.quantization.config import QuantConfig
from edgedetr.quantization.groups import groups_of
from edgedetr.quantization.policy import load_policy
from edgedetr.quantization.rank_correlation import split_half_correlation
from edgedetr.quantization.sensitivity import sensitivity
from edgedetr.quantization.sensitivity_state import SensitivityState
from edgedetr.storage.digests import digest

CONFIG = QuantConfig(images=8)  # of 10 in the train split, so that 2 are left


@pytest.fixture(scope="module")
def measured(float_detr, tmp_path_factory):
    """A bundle after one measurement, and its result; read only."""
    path = tmp_path_factory.mktemp("sensitive") / "detr.bundle"
    shutil.copytree(float_detr.path, path)
    bundle = Bundle.open(path)
    return bundle, sensitivity(bundle, config=CONFIG)


@pytest.fixture
def bundle(measured, tmp_path):
    shutil.copytree(measured[0].path, tmp_path / "b")
    return Bundle.open(tmp_path / "b")


def stored(bundle):
    return json.loads(bundle.require(SENSITIVITY.file).read_text())


def test_every_group_has_a_row_and_the_most_sensitive_is_first(measured):
    bundle, result = measured
    model = split_concats(onnx.load(bundle.require(ONNX.file)))
    groups = {group.id: group for group in groups_of(GraphIndex(model), load_policy("default"))}
    assert {row.name: row.macs for row in result.rows} == {name: group.macs for name, group in groups.items()}
    assert all((row.int8 == "yes") == groups[row.name].default for row in result.rows)
    found = [row.distance for row in result.rows]
    assert found == sorted(found, reverse=True) and found[0] > 0
    assert result.forwards < 0.8 * result.forwards_whole


def test_the_images_calibrate_and_verify_nothing(measured, dataset):
    bundle, result = measured
    used = {image for row in stored(bundle)["distances"].values() for image in row}
    train = [digest(path) for path in sorted((dataset / "images" / "train").iterdir())]
    verify = {digest(path) for path in (dataset / "images" / "val").iterdir()}
    assert result.images == len(used) == 2 and result.splits == ("train",)
    assert used < set(train) and not used & verify


def test_what_is_measured_is_not_measured_again(bundle, measured):
    again = sensitivity(bundle, config=CONFIG)
    assert again.forwards == 0
    assert again.rows == measured[1].rows


def test_an_interrupted_measurement_goes_on(bundle, measured):
    state = stored(bundle)
    dropped = list(state["distances"])[:3]
    for key in dropped:
        del state["distances"][key]
    with bundle.add(SENSITIVITY.file, stage=SENSITIVITY.step, made_from=SENSITIVITY.made_from) as path:
        path.write_text(json.dumps(state))

    def stop(what, done, total):
        if what == "sensitivity":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sensitivity(bundle, config=CONFIG, progress=stop)
    assert sum(len(stored(bundle)["distances"].get(key, {})) for key in dropped) == 1
    counted = []
    result = sensitivity(bundle, config=CONFIG, progress=lambda what, done, total: counted.append(done))
    assert len(counted) == 2 * len(dropped) - 1
    assert {row.name: row.distance for row in result.rows} == {row.name: row.distance for row in measured[1].rows}


def test_parts_hold_all_groups(bundle, measured):
    result = sensitivity(bundle, config=CONFIG, level="part")
    assert sum(row.macs for row in result.rows) == sum(row.macs for row in measured[1].rows)
    assert {"backbone.stem", "encoder.layers.0", "decoder.layers.1"} <= {row.name for row in result.rows}
    assert {row.int8 for row in result.rows} == {"yes", "no", "partly"}


def reopened(bundle, config=CONFIG):
    return SensitivityState.open(bundle, load_policy("default"), config, choose_images(bundle, None, config.images))


@pytest.mark.parametrize("other", [QuantConfig(images=9), QuantConfig(images=8, observer="minmax")])
def test_another_calibration_or_observer_is_measured_anew_and_that_is_said(bundle, caplog, other):
    assert reopened(bundle).distances
    assert not caplog.messages or "measured anew" not in caplog.text
    state = reopened(bundle, other)
    assert not state.distances and not state.ranges
    assert "was measured with another model, policy, observer or other calibration images" in caplog.text


def test_a_damaged_file_is_measured_anew_and_that_is_said(bundle, caplog):
    with bundle.add(SENSITIVITY.file, stage=SENSITIVITY.step, made_from=SENSITIVITY.made_from) as path:
        path.write_text('{"schema": 1, "key": "x", "ranges": {"a": "wide"}, "distances": {}}')
    assert not reopened(bundle).distances
    assert "cannot be read (expected finite numbers); it is measured anew" in caplog.text


def test_without_an_image_left_the_error_names_a_way(bundle):
    with pytest.raises(ExportError, match=r"no image is left to compare on: all 10 of train .* --data DIR"):
        sensitivity(bundle, config=QuantConfig(images=10))


def test_without_its_data_the_bundle_needs_a_folder(bundle, tmp_path):
    bundle.update(data=None)
    with pytest.raises(ExportError, match="does not record where its data are"):
        sensitivity(bundle, config=CONFIG)


def test_the_rank_correlation_is_spearmans(rng):
    distances = rng.gamma(1.0, 1.0, (12, 1)) * rng.gamma(4.0, 0.25, (12, 9))
    distances[3] = distances[4]  # equal values share a rank
    expected = spearmanr(distances[:, ::2].mean(axis=1), distances[:, 1::2].mean(axis=1)).statistic
    assert split_half_correlation(distances) == pytest.approx(expected)
    assert split_half_correlation(np.ones((5, 4))) is None
    assert split_half_correlation(distances[:, :1]) is None


def test_the_command_prints_the_rows_and_writes_table_and_figure(bundle, tmp_path):
    arguments = ["sensitivity", str(bundle.path), "--set", "quant.images=8", "--json"]
    files = ["--csv", str(tmp_path / "s.csv"), "--plot", str(tmp_path / "s.svg")]
    result = CliRunner().invoke(cli, [*arguments, *files], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["rows"]
    assert "2 images of train" in result.stderr and "less sensitive ones (--all)" in result.stderr
    assert "rank correlation between two halves of the images" in result.stderr
    table = list(csv.DictReader(io.StringIO((tmp_path / "s.csv").read_text())))
    assert [row["name"] for row in table] == [row["name"] for row in rows]
    assert float(table[0]["distance"]) == rows[0]["distance"]
    figure = (tmp_path / "s.svg").read_text()
    assert ElementTree.fromstring(figure).tag.endswith("svg")
    assert "memory_projection" in figure


def test_an_unknown_level_is_refused(measured):
    with pytest.raises(edgedetr.EdgedetrError, match="level"):
        edgedetr.sensitivity(measured[0], level="node")  # type: ignore[arg-type]
