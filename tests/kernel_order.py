"""The kernels of a session in the order in which ONNX Runtime runs them."""

from __future__ import annotations

import json
from pathlib import Path

from edgedetr.onnx_graph import session as sessions
from edgedetr.runtime.backends.onnxruntime import plain_session


class KernelOrder:
    """Profiles the sessions that are opened in memory from now on."""

    def __init__(self, monkeypatch, folder: Path) -> None:
        self._sessions = []

        def opened(model, **options):
            self._sessions.append(plain_session(model, profile=folder / f"{len(self._sessions)}", **options))
            return self._sessions[-1]

        monkeypatch.setattr(sessions, "plain_session", opened)

    def of(self, number: int, operators: set[str]) -> list[tuple[str, str]]:
        """(operator, node) of all runs of the session that was opened as this one; only these operators."""
        events = json.loads(Path(self._sessions[number].end_profiling()).read_text(encoding="utf-8"))
        ran = [event for event in events if event["name"].endswith("_kernel_time")]
        found = [(event["args"]["op_name"], event["name"].removesuffix("_kernel_time")) for event in ran]
        return [pair for pair in found if pair[0] in operators]
