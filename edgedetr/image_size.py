"""Reads sizes of images, HEIGHTxWIDTH in pixels, for every option and argument."""

from __future__ import annotations

import re

from edgedetr.errors import UsageError

LARGEST_SIDE = 16_384  # pixels; 8K video is 7,680 wide, and a typing error would cost gigabytes
EXPECTED = f"expected HEIGHTxWIDTH in pixels, each side 1 to {LARGEST_SIDE}, for example 1080x1920"


def parse_size(text: str, what: str = "size") -> tuple[int, int]:
    """ "1080x1920" -> (1080, 1920): height, width; `what` opens the message. Errors: UsageError."""
    # [0-9], because \d also matches other digits (², ١); at most five, because int() refuses thousands.
    found = re.fullmatch(r"\s*([0-9]{1,5})\s*[xX]\s*([0-9]{1,5})\s*", text) if isinstance(text, str) else None
    if found is None:
        raise UsageError(f"{what} is {str(text)[:40]!r}; {EXPECTED}")
    return check_size((int(found[1]), int(found[2])), what)


def check_size(size: object, what: str = "size") -> tuple[int, int]:
    """Check two whole numbers of pixels, (height, width), and return them. Errors: UsageError."""
    if not (
        isinstance(size, (tuple, list))
        and len(size) == 2
        and all(isinstance(side, int) and not isinstance(side, bool) and 1 <= side <= LARGEST_SIDE for side in size)
    ):
        try:
            shown = f"{size[0]}x{size[1]}" if isinstance(size, tuple) and len(size) == 2 else repr(size)
        except ValueError:  # whole numbers of more than 4300 digits
            shown = "numbers of thousands of digits"
        raise UsageError(f"{what} is {shown[:60]!r}; {EXPECTED}")
    return size[0], size[1]
