"""Run one peer in a process of its own: what it prints, patches, leaks or crashes stays there.

`python -m edgedetr.quantization.peers.worker` reads a `Request` as JSON from standard input. Exit code 0: the graph is
written; 1: the last line of standard error says why not.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from edgedetr import telemetry
from edgedetr.quantization.peers.peer import CalibrationBatches
from edgedetr.quantization.peers.registry import PEERS
from edgedetr.storage.manifest import input_from_json


@dataclass(frozen=True)
class Request:
    """What the process is asked for: the peer by name, its input and output files, and the images to calibrate on."""

    peer: str
    model: str
    out: str
    images: list[str]
    contract: dict[str, object]


def main() -> None:
    telemetry.switch_off()
    request = Request(**json.load(sys.stdin))
    peer = PEERS[request.peer]
    images = CalibrationBatches([Path(path) for path in request.images], input_from_json(request.contract))
    peer.run(Path(request.model), images, Path(request.out), peer.settings)


if __name__ == "__main__":
    main()
