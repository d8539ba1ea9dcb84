"""What stays of a training: metrics.jsonl, one JSON object a line, and the same numbers for TensorBoard."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgedetr.bundle import atomic_write
from edgedetr.errors import TrainingError
from edgedetr.packages import missing
from edgedetr.storage.atomic import naming
from edgedetr.storage.reading import parse_json, read_bytes

log = logging.getLogger(__name__)


class Record:
    """Appends to `folder`/metrics.jsonl; a resume first cuts away what lies after its step, so no line comes twice."""

    def __init__(self, folder: Path, step: int) -> None:
        self._path = folder / "metrics.jsonl"
        self._board = _tensorboard(folder / "tensorboard", step)
        kept = [line for line in _lines(self._path) if _step(line) <= step] if step else []
        with atomic_write(self._path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")

    def write(self, kind: str, step: int, values: Mapping[str, object]) -> None:
        """One line {"kind": "train" or "eval", "step": ..., values...}."""
        with naming(self._path), open(self._path, "a", encoding="utf-8") as stream:
            stream.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self._board.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        if self._board is not None:
            self._board.close()


def _step(line: dict[str, Any]) -> float:
    step = line.get("step", 0)
    return step if isinstance(step, (int, float)) else 0


def _lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of the file; a kill while writing may have left half a line at the end."""
    lines = []
    for text in read_bytes(path, TrainingError).splitlines() if path.is_file() else []:
        try:
            line = parse_json(text, str(path), TrainingError)
        except TrainingError:
            continue
        if isinstance(line, dict):
            lines.append(line)
    return lines


def _tensorboard(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        log.info("only metrics.jsonl is written: %s", missing("tensorboard"))
        return None
    return SummaryWriter(str(folder), purge_step=step + 1 if step else None)
