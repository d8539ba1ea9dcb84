"""Memory of a training on a CPU: what one step frees, the next one takes, without asking the system in between."""

from __future__ import annotations

import ctypes

# mallopt's parameters and what they become, of <malloc.h>: the sizes from which blocks are mapped one by one, from
# which free memory goes back to the system, and by which it is asked for.
_MALLOPT = {-3: 1 << 30, -1: 2**31 - 1, -2: 1 << 26}


def keep_freed() -> bool:
    """Tell the C library of this process to keep freed memory; True where it is one that can be told (glibc).

    Else each large tensor is mapped anew, and the system clears its pages one at a time, in every operation. A step of
    `deformable_detr` at 320 px takes 2.9 instead of 3.5 s, and no more memory at its peak (docs/benchmarks.md).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl and macOS have none; Windows has no such handle
        return False
    taken = [mallopt(name, value) for name, value in _MALLOPT.items()]
    return all(taken)
