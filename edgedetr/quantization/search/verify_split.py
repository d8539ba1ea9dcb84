"""The AP that placements lose on the verify images, resampled; their detections are kept, so none is made twice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np

from edgedetr.data.detection_set import Sample
from edgedetr.evaluation.bootstrap import draw, resampled_ap, with_identity
from edgedetr.evaluation.coco_metrics import evaluate
from edgedetr.evaluation.config import VerifyConfig
from edgedetr.evaluation.reference import GroundTruth
from edgedetr.quantization.search.search_report import Candidate
from edgedetr.quantization.search.workbench import Workbench
from edgedetr.runtime.backends.base import Runner
from edgedetr.runtime.postprocess import Detections

CHUNK = 32  # images whose detections are kept together: an interruption repeats no more


class VerifySplit:
    """The verify images of a search."""

    def __init__(self, bench: Workbench, config: VerifyConfig) -> None:
        self._bench, self._sets, self._config = bench, bench.sets, config

    def drops(self, order: Sequence[Candidate]) -> Callable[[int, int], np.ndarray]:
        """What `certify` asks for: the resampled drops of a candidate on the first n verify images."""
        truth = self._sets.reference.truth

        @cache
        def subset(n: int) -> tuple[GroundTruth, np.ndarray, np.ndarray]:
            ids = [sample.image_id for sample in self._sets.verify[:n]]
            part = truth.subset(ids)
            counts = with_identity(draw(n, self._config.bootstrap, self._config.seed))
            found = {i: self._sets.reference.detections[i] for i in ids}
            return part, counts, resampled_ap(evaluate(part, found, by_size=False).matches, counts)

        def drops(index: int, n: int) -> np.ndarray:
            part, counts, reference = subset(n)
            found = self._verified(order[index], n)
            return reference - resampled_ap(evaluate(part, found, by_size=False).matches, counts)

        return drops

    def _verified(self, candidate: Candidate, n: int) -> dict[int, Detections]:
        """Detections of a candidate on the first n verify images; what is kept is not computed again."""
        bench = self._bench
        key = bench.key(candidate.placement)

        @cache
        def runner() -> Runner:
            return bench.open_file(bench.candidate_graph(candidate.placement))

        found: dict[int, Detections] = {}
        for start in range(0, n, CHUNK):
            chunk = self._sets.verify[start : start + CHUNK]

            def make(chunk: Sequence[Sample] = chunk, start: int = start) -> dict[int, Detections]:
                made = {}
                for number, sample in enumerate(chunk):
                    made[sample.image_id] = bench.detect(runner(), sample.path)
                    if bench.progress:
                        bench.progress(f"verify {candidate.name}", start + number + 1, len(self._sets.verify))
                return made

            classes = bench.bundle.manifest.classes
            found |= bench.state.detections(["verify", key, start], classes, make)
        return {sample.image_id: found[sample.image_id] for sample in self._sets.verify[:n]}
