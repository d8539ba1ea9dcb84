"""The verdict as a table of text and as one sentence: the same on the terminal and on the page."""

from __future__ import annotations

from edgedetr.evaluation.verdict import ArtifactVerdict, Verdict

HEAD = ("artifact", "backend", "AP", "AP50", "drop", "drop, upper 95 %", "p50 ms", "p99 ms", "MB", "verdict")
NOTHING_TO_LOSE = "nothing to lose"


def artifact_rows(verdict: Verdict) -> tuple[tuple[str, ...], list[list[str | None]]]:
    """Head and rows of the table of artifacts; None where nothing was measured."""
    nothing_to_lose = failed_reference(verdict) is not None
    rows: list[list[str | None]] = []
    for artifact in verdict.artifacts:
        drops = [None, None] if artifact.is_reference else [_signed(artifact.drop), _signed(artifact.drop_upper95)]
        rows.append(
            [
                artifact.name,
                artifact.backend,
                _decimal(artifact.ap),
                _decimal(artifact.ap50),
                *drops,
                _decimal(artifact.p50_ms),
                _decimal(artifact.p99_ms),
                _decimal(artifact.size_mb),
                NOTHING_TO_LOSE if nothing_to_lose else verdict_word(artifact, verdict.tolerance),
            ]
        )
    return HEAD, rows


def failed_reference(verdict: Verdict) -> ArtifactVerdict | None:
    """The reference, where its AP is so low that no artifact can lose a significant amount; else None."""
    return next((artifact for artifact in verdict.artifacts if artifact.is_reference and not artifact.passed), None)


def verdict_word(artifact: ArtifactVerdict, tolerance: float) -> str:
    """reference, within, not certified (the drop is within the tolerance, its bound is not) or beyond.

    "peer: " stands before it for the graph of another quantizer, which has no part in the verdict.
    """
    if artifact.is_reference:
        return "reference"
    peer = "peer: " if artifact.quantizer else ""
    if artifact.passed:
        return f"{peer}within"
    return peer + ("not certified" if artifact.drop <= tolerance else "beyond")


def notes(verdict: Verdict) -> list[str]:
    """The notes on artifacts: faults, and backends that do not compute what the graph says; equal ones are one line."""
    labels: dict[str, list[str]] = {}
    for artifact in verdict.artifacts:
        if artifact.note:
            labels.setdefault(artifact.note, []).append(artifact.label)
    return [f"{', '.join(artifacts)}: {note}" for note, artifacts in labels.items()]


def integer_lines(verdict: Verdict) -> list[str]:
    """How many quantized layers really ran in integers, for each artifact with quantized layers."""
    return [f"{artifact.label}: {artifact.integers}" for artifact in verdict.artifacts if artifact.integers is not None]


def verdict_sentence(verdict: Verdict) -> str:
    """The table's result in one sentence."""
    tolerance = verdict.tolerance
    if (reference := failed_reference(verdict)) is not None:
        return (
            f"NOT PASSED, NOTHING TO LOSE: the model itself reaches AP {reference.ap:.2f}, and the tolerance is "
            f"{tolerance:g}, so the loss of the other files cannot be judged. Check the data (edgedetr data check "
            f"DIR) and train longer, or set a smaller tolerance with --max-drop."
        )
    others = [artifact for artifact in verdict.delivered if not artifact.is_reference]
    if verdict.passed:
        imported = any(artifact.name == "reference" for artifact in verdict.artifacts)
        largest = max((artifact.drop_upper95 for artifact in others), default=0.0)
        return (
            f"PASSED: no file loses more than {max(largest, 0):.2f} AP against "
            f"{'the imported file' if imported else 'PyTorch'} (upper 95 % bound); the tolerance is {tolerance:g}."
        )
    failed = [artifact for artifact in others if not artifact.passed]
    if any(artifact.drop > tolerance for artifact in failed):
        worst = max(failed, key=lambda artifact: artifact.drop)
        return f"NOT PASSED: {worst.name} on {worst.backend} loses {worst.drop:.2f} AP; the tolerance is {tolerance:g}."
    return (
        f"NOT PASSED: the drops are within the tolerance of {tolerance:g}, but this set is too small to certify it; "
        f"the smallest tolerance it can certify is {verdict.certifiable:.2f}."
    )


def _signed(points: float) -> str:
    return f"{round(points, 2) + 0.0:+.2f}"  # + 0.0: no "-0.00"


def _decimal(value: float | None) -> str | None:
    return None if value is None else f"{round(value, 2) + 0.0:.2f}"
