"""What lies in a data set's folder and is in no split: images that nothing lists, and label files that nothing reads.

A loose images/a.jpg beside images/train/, a labels/test/ whose images are not there, a split that data.yaml does not
name: nobody would miss them before the score is poor. Images are notes, for a list may leave them out on purpose.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from edgedetr.data.detection_set import DataIssue
from edgedetr.data.listing import files, images_in
from edgedetr.data.yolo_labels import Labels, object_lines

NAMED = 8  # files that a issue about many of them names


def leftovers(root: Path, layout: str, listed: Iterable[Path], said: Iterable[DataIssue]) -> list[DataIssue]:
    """Findings about a set's own folder, one for each folder in it.

    listed   images of every split
    said     issues up to now: what they are about is not said again
    """
    broken: list[Path] = []
    there = images_in(root, broken=broken)
    told = list(said)
    known = {os.path.realpath(path) for path in listed} | {os.path.realpath(issue.where) for issue in told}
    counted = {os.path.abspath(issue.where) for issue in told if issue.kind == "unlisted-image"}
    loose = [
        path
        for path in there
        if os.path.realpath(path) not in known
        and not any(os.path.abspath(parent) in counted for parent in path.parents)
    ]
    labels = Labels(root, 0, None) if layout == "yolo" else None
    found = []
    for folder, paths in _by_folder(loose).items():
        texts = [file for path in paths if labels is not None and (file := labels.file_of(path)) is not None]
        objects = sum(map(object_lines, texts))
        found.append(
            DataIssue(
                "unlisted-image",
                str(folder),
                f"{len(paths)} images are in no split{f', with {objects} objects' if objects else ''}: {_names(paths)}",
                False,
                objects,
            )
        )
    if labels is not None:
        used = {os.path.realpath(file) for path in there if (file := labels.file_of(path)) is not None}
        texts = [path for path in files(root) if path.suffix.lower() == ".txt" and path.parent != root]
        alone = [path for path in texts if (real := os.path.realpath(path)) not in used and real not in known]
        for folder, paths in _by_folder(alone).items():
            objects = sum(map(object_lines, paths))
            if objects:
                found.append(
                    DataIssue(
                        "label-without-image",
                        str(folder),
                        f"{len(paths)} label files with {objects} "
                        f"objects are read for no image: {_names(paths)}; expected them beside their "
                        "images, or in labels/ where those are in images/",
                        True,
                        objects,
                    )
                )
    told_links = {os.path.abspath(issue.where) for issue in told}
    found += [
        DataIssue("broken-link", str(path), "a link to what is not there; copy the file, or make the link anew", True)
        for path in broken
        if os.path.abspath(path) not in told_links
    ]
    return found


def _by_folder(paths: Iterable[Path]) -> dict[Path, list[Path]]:
    found = defaultdict(list)
    for path in paths:
        found[path.parent].append(path)
    return found


def _names(paths: list[Path]) -> str:
    return ", ".join(path.name for path in paths[:NAMED]) + (", ..." if len(paths) > NAMED else "")
