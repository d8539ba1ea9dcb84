"""Describe a bundle for `edgedetr inspect` and the report: the manifest, and the size and state of each file."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from edgedetr.bundle import Bundle
from edgedetr.errors import BundleError


@dataclass(frozen=True)
class FileState:
    """One file of the manifest; `state` is "ok", or the problem and the command that makes the file again."""

    name: str
    size: int
    sha256: str
    made_by: str  # the step of bundle.json: "train", "export", ...
    state: str


@dataclass(frozen=True)
class BundleContents:
    """A bundle in text and numbers."""

    path: str
    model: str
    classes: tuple[str, ...]
    input: str
    data: str
    tolerance: float
    synthetic: bool
    files: tuple[FileState, ...]

    def to_json(self) -> dict[str, object]:
        """The keys of bundle.json: "budget" for the tolerance, and "stage" for the step that made a file."""
        names = {"tolerance": "budget", "made_by": "stage"}

        def renamed(pairs: list[tuple[str, object]]) -> dict[str, object]:
            return {names.get(name, name): value for name, value in pairs}

        return asdict(self, dict_factory=renamed)

    def rows(self) -> list[list[object]]:
        names = ", ".join(self.classes[:12]) + (
            f", ... ({len(self.classes)} classes)" if len(self.classes) > 12 else ""
        )
        return [
            ["bundle", self.path],
            ["model", self.model],
            ["classes", names],
            ["input", self.input],
            ["data", self.data + (" (synthetic)" if self.synthetic else "")],
            ["tolerance", f"{self.tolerance} points of AP"],
        ]

    def file_rows(self) -> list[list[object]]:
        return [[f.name, f"{f.size / 1e6:.2f}", f.made_by, f.state] for f in self.files]


def inspect_bundle(bundle: Bundle) -> BundleContents:
    """Read the manifest and check every listed file against its digest and what it was made from."""
    manifest, contract = bundle.manifest, bundle.manifest.input
    files = []
    for name, entry in manifest.files.items():
        try:
            bundle.require(name)
            state = "ok"
        except BundleError as error:
            state = str(error)
        files.append(FileState(name, entry.size, entry.sha256, entry.stage, state))
    data = manifest.data
    return BundleContents(
        path=str(bundle.path),
        model=manifest.model,
        classes=tuple(c.name for c in manifest.classes),
        input=f"images [B, 3, {contract.height}, {contract.width}] RGB 0..255, {contract.resize}",
        data=f"{data.path}, verify on {data.verify_split}, calibrate on {data.calib_split}" if data else "not recorded",
        tolerance=manifest.budget,
        synthetic=manifest.synthetic,
        files=tuple(files),
    )
