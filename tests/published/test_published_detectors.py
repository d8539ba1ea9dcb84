"""The table of published detectors: each row has a source, names are found, and licenses that bind must be accepted."""

from __future__ import annotations

import json
import re
from urllib.parse import urlsplit

import pytest

from edgedetr import cli
from edgedetr.errors import UsageError
from edgedetr.package_data import recipes_directory
from edgedetr.published.published_detectors import LicenseError, find, known, nearest, published

ROWS = list(published().values())


def test_there_are_forty_weights_of_ten_families() -> None:
    assert len(ROWS) >= 40
    assert len({row.family for row in ROWS}) >= 10


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_row_says_where_the_weights_are_and_where_that_was_read(row) -> None:
    assert sum(map(bool, (row.hub, row.url, row.page))) == 1
    assert re.search(r"\w+/[\w-]+, \S+|card|repositor", row.source)
    assert bool(row.hub) == bool(row.hub_source)
    assert bool(row.revision or row.sha256) == bool(row.pinned)
    assert not row.hub or re.fullmatch(r"[\w.-]+/[\w.-]+", row.hub)
    for address in filter(None, (row.url, row.page, row.license.terms)):
        assert urlsplit(address).scheme == "https"
    assert 20 < row.ap < 65 and (row.params is None or 0.3 < row.params < 150)
    assert not row.revision or re.fullmatch("[0-9a-f]{40}", row.revision)
    assert not row.sha256 or re.fullmatch("[0-9a-f]{8}|[0-9a-f]{64}", row.sha256)
    assert not row.recipe or (recipes_directory() / f"{row.recipe}.toml").is_file()


def test_no_two_rows_are_the_same_weights() -> None:
    places = [(row.hub, row.url, row.sha256) for row in ROWS if not row.page]
    assert len(places) == len(set(places))


def test_a_row_is_found_by_its_name_and_by_its_id() -> None:
    row = find("rtdetrv2-r18")
    assert row.hub == "PekingU/rtdetr_v2_r18vd" and find("PekingU/rtdetr_v2_r18vd") is row
    assert known("PekingU/rtdetr_v2_r19vd") is None


@pytest.mark.parametrize(
    "typed, meant", [("rtdetrv2_r18", "rtdetrv2-r18"), ("rf-detr-nano", "rfdetr-nano"), ("DFINE-S", "dfine-s")]
)
def test_the_nearest_name_is_named(typed: str, meant: str) -> None:
    with pytest.raises(UsageError, match=rf"no published detector '{typed}'; did you mean '{meant}'.*--published"):
        find(typed)
    assert nearest("yolo11n") == ""


def test_only_a_license_that_binds_nobody_needs_no_acceptance() -> None:
    find("rtdetrv2-r18").require_accepted(())
    bound = find("rfdetr-xlarge")
    with pytest.raises(LicenseError, match=r"license PML-1.0.*read https://\S+, then add --accept-license PML-1.0"):
        bound.require_accepted(["DINOv3"])
    bound.require_accepted(["pml-1.0"])
    with pytest.raises(LicenseError):
        find("deimv2-s").require_accepted(())
    assert {row.license.name for row in ROWS if not row.license.permissive} == {"DINOv3", "PML-1.0"}


def test_the_command_lists_them(capsys) -> None:
    assert cli.run(["models", "--published", "--json"]) == 0
    printed = capsys.readouterr()
    listed = {row["name"]: row for row in json.loads(printed.out)}
    assert len(listed) == len(ROWS)
    assert listed["rfdetr-xlarge"]["license"] == "PML-1.0" and listed["rfdetr-xlarge"]["permissive"] is False
    assert listed["detr-r50"]["ap"] == 42.0 and listed["detr-r50"]["input"] == [800, 1333]
    line = next(line for line in printed.err.splitlines() if line.startswith("detr-r50 "))
    assert "42.0" in line and "Apache-2.0" in line and "facebookresearch/detr" in line
