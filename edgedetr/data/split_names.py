"""Names of splits: what tools call them, and the three that edgedetr uses."""

from __future__ import annotations

import re

_SAME = {"training": "train", "valid": "val", "validation": "val", "testing": "test"}


def canonical(name: str) -> str:
    """train, val or test for their usual names (valid, train2017, ...); any other name as it is, in lower case."""
    lower = name.lower()
    bare = re.sub(r"[-_]?(19|20)\d\d$", "", lower)
    bare = _SAME.get(bare, bare)
    return bare if bare in ("train", "val", "test") else lower
