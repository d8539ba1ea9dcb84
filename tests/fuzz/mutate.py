"""Damage to files: bits, cuts, spliced pieces, hostile words, and values of the wrong kind inside JSON."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from typing import Any

WORDS = [
    b"NaN",
    b"Infinity",
    b"-1",
    b"0",
    b"1e308",
    b"1e400",
    b"9" * 5000,
    b"null",
    b"true",
    b'""',
    b"[]",
    b"{}",
    b"\x00",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    "é".encode("latin-1"),
    "木".encode("gbk"),
    b"../../etc/passwd",
    b"/dev/zero",
    b"C:\\x",
    b"a" * 300,
    b"\n\n",
    b"\r",
    b"\t",
    b" " * 5000,
    b"[" * 3000,
    b"{" * 3000,
    b'{"a":' * 3000,
    b"&lol;",
    b"<!DOCTYPE x>",
    b'!!python/object/apply:os.system ["true"]',
    b"&a [*a]",
    b"\x1b[31m",
    b"%s%n",
    b"\xe2\x80\xae",
    b"1 2 3 4 5",
]
VALUES: list[Callable[[random.Random], Any]] = [
    lambda r: None,
    lambda r: r.choice([True, False]),
    lambda r: r.choice([0, -1, 1, 2**31, 2**63, -(2**63), 10**30]),
    lambda r: r.choice([0.5, -0.0, 1e-320, 1e308, float("nan"), float("inf")]),
    lambda r: "",
    lambda r: "x" * 400,
    lambda r: r.choice(["../x", "/abs", "a\x00b", "a\nb", "\x1b[2J", "1", "1.5", "nan", "\ud7ff\u202e"]),
    lambda r: [],
    lambda r: {},
    lambda r: [[[[]]]],
    lambda r: {"": {}},
    lambda r: [1, "x", None],
    lambda r: list(range(50)),
]


def mutate(seed: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    """One to four damages of `seed`, pieces of `others` among them."""
    found = seed
    if rng.random() < 0.5 and (changed := _json(found, rng)) is not None:
        found = changed
        if rng.random() < 0.7:
            return found
    for _ in range(rng.randint(1, 4)):
        found = rng.choice(BYTES)(found, others, rng)
    return found[:4_000_000]


def _position(data: bytes, rng: random.Random) -> int:
    # Heads decide more than bodies do.
    return rng.randint(0, min(len(data), 200)) if rng.random() < 0.4 else rng.randint(0, len(data))


def _flip(data: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    if not data:
        return data
    at = min(_position(data, rng), len(data) - 1)
    return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]


def _bytes(data: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    at, count = _position(data, rng), rng.choice([1, 2, 4, 8])
    new = bytes(rng.choice([0, 255, 127, 128, rng.randrange(256)]) for _ in range(count))
    return data[:at] + new + data[at + count :]


def _cut(data: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    return data[: _position(data, rng)]


def _remove(data: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    at = _position(data, rng)
    return data[:at] + data[at + rng.choice([1, 4, 16, 200]) :]


def _repeat(data: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    at, count = _position(data, rng), rng.choice([1, 16, 200])
    return data[:at] + data[at : at + count] * rng.choice([2, 3, 50]) + data[at + count :]


def _word(data: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    at = _position(data, rng)
    return data[:at] + rng.choice(WORDS) + data[at + rng.choice([0, 0, 1, 4]) :]


def _splice(data: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    other = rng.choice(others)
    return data[: _position(data, rng)] + other[_position(other, rng) :]


def _line(data: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    lines = data.split(b"\n")
    at = rng.randrange(len(lines))
    lines[at] = rng.choice([b"", rng.choice(WORDS), lines[rng.randrange(len(lines))], lines[at] * 2, lines[at][::-1]])
    return b"\n".join(lines)


BYTES = (_flip, _bytes, _cut, _remove, _repeat, _word, _word, _splice, _line)


def _json(data: bytes, rng: random.Random) -> bytes | None:
    """A JSON document in which one or two values, keys or items were changed; None where `data` is none."""
    if data[:1] not in (b"{", b"["):
        return None
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        return None
    for _ in range(rng.randint(1, 2)):
        holders = [holder for holder in _holders(tree) if holder]
        if not holders:
            break
        holder = rng.choice(holders)
        key = rng.choice(list(holder)) if isinstance(holder, dict) else rng.randrange(len(holder))
        act = rng.randrange(5)
        if act == 0:
            del holder[key]
        elif act == 1 and isinstance(holder, dict):
            holder[rng.choice(["", "x", key + "x", "a\x00", "__class__"])] = holder.pop(key)
        elif act == 2 and isinstance(holder, list):
            holder.extend([holder[key]] * rng.choice([1, 5]))
        else:
            holder[key] = rng.choice(VALUES)(rng)
    return json.dumps(tree).encode()


def _holders(tree: Any) -> list[Any]:
    found, waiting = [], [tree]
    while waiting:
        one = waiting.pop()
        if isinstance(one, (dict, list)):
            found.append(one)
            waiting.extend(one.values() if isinstance(one, dict) else one)
    return found
