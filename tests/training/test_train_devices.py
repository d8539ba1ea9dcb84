"""The message about the device that a training runs on."""

from __future__ import annotations

import micro
import pytest

from edgedetr.training import train


@pytest.mark.parametrize("precision, tiles, advised", [("32", True, True), ("32", False, False), ("bf16", True, False)])
def test_bfloat16_is_advised_where_it_is_faster_and_not_set(
    precision: str, tiles: bool, advised: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(train, "tiles_bfloat16", lambda: tiles)
    with caplog.at_level("INFO"):
        fabric = train.start_devices(micro.recipe(precision=precision).train)
    if fabric.device.type != "cpu":
        pytest.skip("this machine trains on a GPU")
    assert ("--set train.precision=bf16" in caplog.text) is advised
