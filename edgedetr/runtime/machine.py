"""Which machine this is: an engine is executable code, so one that was built elsewhere must be recognized."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import stat
from pathlib import Path

MACHINE_ID = Path("/etc/machine-id")
L4T_RELEASE = Path("/etc/nv_tegra_release")
OWN_ID = "machine-id"  # in the user's cache, where the system has none: in most containers
FORM = re.compile(r"[0-9a-f]{32}")


def user_cache() -> Path:
    """The user's cache folder of edgedetr."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "edgedetr"


def host(*, make: bool = False) -> str:
    """A digest that is this machine's own; empty where it has no id.

    The id itself is confidential (man machine-id), so only a digest with a word of our own is kept, and not even that
    is shown: with it, a stranger could write an engine that seems to have been built here.

    make   give the machine an id in the user's cache where the system has none: whoever builds an engine needs one
    """
    identity = _system_id() or _own_id(make)
    return hashlib.sha256(f"edgedetr engine {identity}".encode()).hexdigest()[:16] if identity else ""


def jetpack() -> str:
    """The release of Jetson Linux, "R36.4.3" (JetPack 6.2); empty where this is no Jetson."""
    try:
        found = re.search(r"R(\d+)[^,]*,\s*REVISION:\s*([\d.]+)", L4T_RELEASE.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return ""
    return f"R{found[1]}.{found[2]}" if found else ""


def _system_id() -> str:
    """Empty too where it is no id: systemd writes "uninitialized" into images, which all their machines would share."""
    try:
        text = MACHINE_ID.read_text(encoding="ascii").strip().lower()
    except (OSError, ValueError):
        return ""
    return text if FORM.fullmatch(text) and set(text) != {"0"} else ""


def _own_id(make: bool) -> str:
    """The id in the user's cache: a file that nobody else can have written."""
    try:
        path = user_cache() / OWN_ID
        if make and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
            with os.fdopen(handle, "w", encoding="ascii") as stream:
                stream.write(secrets.token_hex(16))
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
        with os.fdopen(handle, "rb") as stream:
            about = os.fstat(stream.fileno())
            if not stat.S_ISREG(about.st_mode) or about.st_mode & 0o022 or about.st_uid not in (0, os.geteuid()):
                return ""
            text = stream.read(64).decode("ascii").strip()
    except (OSError, ValueError, RuntimeError):  # RuntimeError: no home directory can be found
        return ""
    return text if FORM.fullmatch(text) else ""
