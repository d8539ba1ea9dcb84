"""Whether a host on the network can be reached, answered within seconds also where nothing answers."""

from __future__ import annotations

import os
import socket
import threading
import time
import urllib.parse
import urllib.request

LIMIT = 3.0  # seconds for the look-up of the name and the connection together; an answer is usual within a tenth
REMEMBERED = 60.0  # seconds for which a host that did not answer is not asked again
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")  # variables by which users say that there is no network

_unreachable: dict[str, tuple[float, str]] = {}  # host and port -> when it did not answer, and why


def why_unreachable(address: str) -> str:
    """Why the host of an https address, or the proxy in front of it, does not answer; "" where it does.

    The name is looked up in a thread of its own, because the C library waits for a name server as long as it likes.
    """
    if reason := offline_by_choice():
        return reason
    host, port = _first_host(address)
    place = f"{host}:{port}"
    when, reason = _unreachable.get(place, (0.0, ""))
    if reason and time.monotonic() - when < REMEMBERED:
        return reason
    answer: list[str] = []
    thread = threading.Thread(target=lambda: answer.append(_connect(host, port)), daemon=True)
    thread.start()
    thread.join(LIMIT)
    reason = answer[0] if answer else f"{host} did not answer within {LIMIT:g} s"
    if reason:
        _unreachable[place] = time.monotonic(), reason
    return reason


def offline_by_choice() -> str:
    """Why the network must not be used: a variable of the environment says so; "" where none does."""
    for name in OFFLINE:
        if os.environ.get(name, "").strip().upper() in ("1", "ON", "YES", "TRUE"):
            return f"{name} is set"
    return ""


def _connect(host: str, port: int) -> str:
    try:
        socket.create_connection((host, port), timeout=LIMIT).close()
    except OSError as error:
        return f"{host}: {error.strerror or error}"
    return ""


def _first_host(address: str) -> tuple[str, int]:
    """Host and port of the proxy for an address, or of the address itself."""
    target = urllib.parse.urlsplit(address)
    host = target.hostname or ""
    proxy = urllib.request.getproxies().get(target.scheme, "")
    if proxy and not urllib.request.proxy_bypass(host):
        through = urllib.parse.urlsplit(proxy if "//" in proxy else f"//{proxy}")
        return through.hostname or "", through.port or (443 if through.scheme == "https" else 80)
    return host, target.port or (80 if target.scheme == "http" else 443)
