"""The table of published detectors: one record each, read from detectors.toml beside this file."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal

from edgedetr.errors import EdgedetrError, UsageError
from edgedetr.options import one_of
from edgedetr.storage.reading import read_toml

TABLE = Path(__file__).with_name("detectors.toml")
Three = tuple[float, float, float]  # of R, G, B
# Mean and deviation of a pixel / 255.
NORMALIZATIONS: dict[str, tuple[Three, Three]] = {
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
LISTED = "edgedetr models --published"


@dataclass(frozen=True)
class License:
    """On which terms weights may be used.

    permissive   whether everybody may use them, also commercially, without accepting further terms: only such weights
                 are a default
    terms        address of the text
    """

    name: str
    permissive: bool
    terms: str


@dataclass(frozen=True)
class PublishedDetector:
    """One published detector. detectors.toml says what each field means and where it was read.

    input    pixels: (height, width), or with resize "aspect" (shorter, longest side)
    ap       on COCO val2017, points
    params   millions; None where the source says nothing
    """

    name: str
    family: str
    member: str
    license: License
    input: tuple[int, int]
    resize: Literal["stretch", "aspect"]
    normalize: Literal["none", "imagenet"]
    classes: Literal["coco80", "coco91"]
    ap: float
    source: str
    params: float | None = None
    hub: str = ""
    hub_source: str = ""
    url: str = ""
    page: str = ""
    file: str = ""
    revision: str = ""
    sha256: str = ""
    pinned: str = ""
    recipe: str = ""

    def __post_init__(self) -> None:
        one_of("resize", self.resize, ("stretch", "aspect"), EdgedetrError)
        one_of("normalize", self.normalize, tuple(NORMALIZATIONS), EdgedetrError)
        one_of("classes", self.classes, ("coco80", "coco91"), EdgedetrError)

    @property
    def where(self) -> str:
        """Where the weights are: the id on the hub, or an address."""
        return self.hub or self.url or self.page

    @property
    def weight_file(self) -> str:
        """Name of the file at `url`."""
        return self.url.rsplit("/", 1)[-1]

    @property
    def class_rows(self) -> int:
        """Rows of its class head: COCO's 80 classes in order, or 91 by category id."""
        return 80 if self.classes == "coco80" else 91

    @property
    def mean_and_std(self) -> tuple[Three, Three]:
        """What is taken from a pixel / 255, and what it is divided by then, for R, G and B."""
        return NORMALIZATIONS[self.normalize]

    def to_json(self) -> dict[str, object]:
        """The keys of `edgedetr models --published --json`."""
        return {**asdict(self), "license": self.license.name, "permissive": self.license.permissive}

    def require_accepted(self, accepted: Iterable[str]) -> None:
        """Errors: LicenseError unless everybody may use the weights, or their license is in `accepted`."""
        names = {name.casefold() for name in accepted}
        if self.license.permissive or self.license.name.casefold() in names:
            return
        raise LicenseError(
            f"{self.name}: its weights have the license {self.license.name}, whose terms you have to accept: read "
            f"{self.license.terms}, then add --accept-license {self.license.name}"
        )


class LicenseError(UsageError):
    """The license of published weights was not accepted."""


@cache
def published() -> dict[str, PublishedDetector]:
    """Every published detector by its name, in the order of the table."""
    raw = read_toml(TABLE, EdgedetrError, fix="this installation is damaged; install it again")
    licenses = {name: License(name, **values) for name, values in raw["licenses"].items()}
    return {
        name: _record(name, row, raw["families"][row["family"]], licenses) for name, row in raw["detectors"].items()
    }


def _record(name: str, row: dict[str, Any], family: dict[str, Any], licenses: dict[str, License]) -> PublishedDetector:
    """A row with what holds for its family filled in; `hub_source` belongs to an id on the hub alone."""
    values: dict[str, Any] = {**family, **row}
    if "hub" not in values:
        values.pop("hub_source", None)
    if "url" in row or "hub" in row:
        values.pop("page", None)
    known = {field.name for field in fields(PublishedDetector)}
    if unknown := sorted(set(values) - known):
        raise EdgedetrError(f"{TABLE}: {name} has unknown keys: {', '.join(unknown)}")
    values["license"] = licenses[values["license"]]
    values["input"] = tuple(values["input"])
    return PublishedDetector(name=name, **values)


def known(name: str) -> PublishedDetector | None:
    """The detector of this name, or of this id on the hub; None for anything else."""
    rows = published()
    return rows.get(name) or next((row for row in rows.values() if row.hub and row.hub == name), None)


def find(name: str) -> PublishedDetector:
    """The detector of this name or id. Errors: UsageError that names the nearest one."""
    row = known(name)
    if row is None:
        raise UsageError(f"no published detector {name!r}{nearest(name)}; they are listed by: {LISTED}")
    return row


def nearest(name: str) -> str:
    """`; did you mean 'rtdetrv2-r18'?` for the nearest names or ids, or an empty string."""
    ids = {word: row.name for row in published().values() for word in (row.name, row.hub.rpartition("/")[2]) if word}
    folded = {word.casefold(): word for word in ids}
    near = difflib.get_close_matches(name.rpartition("/")[2].casefold(), folded, n=3, cutoff=0.5)
    names = list(dict.fromkeys(ids[folded[word]] for word in near))
    return f"; did you mean {' or '.join(map(repr, names))}?" if names else ""
