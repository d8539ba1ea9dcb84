"""The peers by name. A new one is a file here with its `PEERS`, and an entry in edgedetr/artifacts.py."""

from __future__ import annotations

from collections.abc import Mapping

from edgedetr.quantization.peers import modelopt_peer, nncf_peer, onnxruntime_peer
from edgedetr.quantization.peers.peer import Peer

PEERS: Mapping[str, Peer] = {
    peer.name: peer for module in (modelopt_peer, onnxruntime_peer, nncf_peer) for peer in module.PEERS
}
