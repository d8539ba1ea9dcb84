"""What is in a bundle: its description, and each file's size and state."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from edgedetr.bundle import Bundle
from edgedetr.errors import BundleError


@dataclass(frozen=True)
class FileState:
    """One listed file; `state` is "ok", or what is wrong with it and the command that makes it again."""

    name: str
    size: int
    sha256: str
    stage: str
    state: str


@dataclass(frozen=True)
class BundleContents:
    """A bundle as a reader wants to see it."""

    path: str
    model: str
    classes: tuple[str, ...]
    input: str
    data: str
    budget: float
    synthetic: bool
    files: tuple[FileState, ...]

    def to_json(self) -> dict[str, object]:
        return asdict(self)

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
            ["budget", f"{self.budget} points of AP"],
        ]

    def file_rows(self) -> list[list[object]]:
        return [[f.name, f"{f.size / 1e6:.2f}", f.stage, f.state] for f in self.files]


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
        budget=manifest.budget,
        synthetic=manifest.synthetic,
        files=tuple(files),
    )
