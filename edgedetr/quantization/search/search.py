"""`edgedetr export --int8 --max-drop B`: the fastest INT8 graph for a target whose loss of AP is proved to be within B.

Costs and distances of single groups give a front of placements (front.py). Each of them is built as export builds it,
timed against the float graph in turns, and compared with it on images for that purpose. Then the verify split decides,
in the order of risk (sequential.py). Each result is kept in the bundle's folder search/, so that an interrupted search
goes on, and a search for another budget only verifies.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np

from edgedetr.artifacts import ONNX, PLACEMENT, REFERENCE, SEARCH
from edgedetr.bundle import Bundle
from edgedetr.errors import ExportError, UsageError, did_you_mean
from edgedetr.evaluation.coco_metrics import evaluate
from edgedetr.evaluation.config import VerifyConfig
from edgedetr.evaluation.reference import GroundTruth
from edgedetr.progress import Progress
from edgedetr.quantization.config import QuantConfig
from edgedetr.quantization.placement import Placement
from edgedetr.quantization.policy import load_policy
from edgedetr.quantization.rank_correlation import rank_correlation
from edgedetr.quantization.search import costs as costing
from edgedetr.quantization.search.costs import Costs
from edgedetr.quantization.search.decisions import expected_start, in_order_of_risk, placed, predicted_latency
from edgedetr.quantization.search.device_costs import device_costs, profile_command, read_profile
from edgedetr.quantization.search.front import front
from edgedetr.quantization.search.image_sets import ImageSets, image_sets
from edgedetr.quantization.search.search_report import Candidate, SearchReport
from edgedetr.quantization.search.search_state import SearchState
from edgedetr.quantization.search.sequential import LookResult, certify
from edgedetr.quantization.search.verify_split import VerifySplit
from edgedetr.quantization.search.workbench import ALPHA, TARGETS, Workbench
from edgedetr.runtime.latency import error_of_median, rotated

log = logging.getLogger(__name__)

IMAGES = 64  # to compare placements on; their distances are means of smooth values, not AP
ROUNDS, MOST_ROUNDS, STEADY = 20, 100, 0.01  # timing a candidate: until twice its error is below 1 % of the float time
RANDOM = 4  # random placements that check whether distances of single groups add up
SENSITIVE = 10  # groups for which a second observer is tried
BETTER = 0.9  # of the distance, at most, with an observer that replaces quant.observer: less is chance
LEAST_AP = 1.0  # points; as for verify, a model below it has nothing to lose


def search(
    bundle: Bundle | str | Path,
    *,
    max_drop: float,
    target: str = "onnxruntime",
    images: int = IMAGES,
    calib: Path | None = None,
    config: QuantConfig | None = None,
    verify: VerifyConfig | None = None,
    cure_for: Sequence[str] | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> SearchReport:
    """Search, and write results/search.json, and placement.json where a placement is faster and certified.

    max_drop   points of AP that the graph may lose against PyTorch, with 95 % confidence
    target     "onnxruntime", "openvino" or "tensorrt": which latency is minimized
    images     to compare placements on: labeled, and neither for calibration nor for verification
    calib      calibration images; None = those of the present ranges.json, or of the calibration split
    cure_for   backends whose known faults are cured; None = those on which verify judges the target's file
    threads    of one inference; None = all cores

    Errors: UsageError, ExportError, BundleError, DataError.
    """
    bundle = Bundle.open(bundle)
    if target not in TARGETS:
        raise UsageError(f"target is {target!r}; expected one of {', '.join(TARGETS)}{did_you_mean(target, TARGETS)}")
    if not 0 < max_drop <= 100:
        raise UsageError(f"the budget is {max_drop:g}; expected points of AP, more than 0 and at most 100")
    config, verify = config or QuantConfig(), verify or VerifyConfig.from_bundle(bundle)
    if config.smooth:
        raise UsageError(
            f"quant.smooth is {config.smooth:g}: a search itself decides which layers to smooth; add: "
            "--set quant.smooth=0"
        )
    sets = image_sets(bundle, config, calib, images, verify.seed)
    policy = load_policy(config.policy)
    state = SearchState(
        bundle,
        {
            "model": bundle.manifest.files[ONNX.file].sha256,
            "policy": policy.sha256(),
            "settings": f"{config.observer_label} {config.cpu_weights} {config.bias_correction}",
            "images": sets.digest(),
        },
    )
    bench = Workbench(
        bundle, TARGETS[target], config, sets, state, cure_for=cure_for, threads=threads, progress=progress
    )
    return _Search(bench, max_drop, verify).run()


class _Search:
    def __init__(self, bench: Workbench, budget: float, verify: VerifyConfig) -> None:
        self.bench, self.budget, self.verify = bench, budget, verify
        self.sets: ImageSets = bench.sets
        truth, found = self.sets.reference.truth, self.sets.reference.detections
        self.ap = evaluate(truth, found, by_size=False).ap or 0.0
        if self.ap < max(LEAST_AP, budget):
            raise ExportError(
                f"{bench.bundle.path}: the model reaches AP {self.ap:.2f} on the verify split, so a budget of "
                f"{budget:g} proves nothing; train it first, or give a smaller --max-drop"
            )

    def run(self) -> SearchReport:
        bench = self.bench
        costs = self._costs()
        worth = [name for name in costs.worth_trying() if costs.groups[name].float_ms > 0]
        distances = dict(zip(worth, self._distances([Placement((name,)) for name in worth])))
        observers = self._better_observers(distances)
        smooth = self._better_smoothed(distances, observers)
        points = front(costs.choices(distances), costs.edges_among(distances))
        candidates = [
            Candidate(
                f"front {n + 1}", placed(point.int8, observers, smooth), costs.change(point.int8).ms, point.distance
            )
            for n, point in enumerate(points)
        ]
        candidates.append(self._default(costs, distances))
        candidates = [self._measured(candidate, costs) for candidate in candidates]
        report = SearchReport(
            target=bench.target.name,
            budget=self.budget,
            images={
                "calibration": len(self.sets.calibration.images),
                "search": len(self.sets.search.digests),
                "verify": len(self.sets.verify),
            },
            image_sets=self.sets.digest(),
            reference_ap=self.ap,
            costs=costs,
            distances=distances,
            rank_correlation=self._interaction(candidates, distances),
            candidates=tuple(candidates),
        )
        order = in_order_of_risk([c for c in candidates if c.faster])
        if not order:
            return self._record(replace(report, outcome="float"))
        start = expected_start(order, self.budget, self._slope(candidates))
        drops = VerifySplit(bench, self.verify).drops(order)
        found = certify(len(order), start, self.budget, drops, len(self.sets.verify), seen=self._tell)
        named = tuple(order[i].name for i in range(len(order)))
        report = replace(report, order=named, looks=found.looks, certifiable=found.certifiable, outcome="none")
        if found.accepted is not None:
            report = replace(report, outcome="accepted", accepted=order[found.accepted].name)
        return self._record(report)

    # ------------------------------------------------------------------------------------------ costs and distances

    def _costs(self) -> Costs:
        bench = self.bench
        if not bench.target.here:
            return self._costs_elsewhere()

        def make() -> dict[str, object]:
            return costing.measured_costs(
                bench.graph,
                bench.groups,
                bench.graph.model.SerializeToString(),
                bench.model(bench.everything, corrected=False).SerializeToString(),
                bench.quantized_readers(),
                bench.target.backend,
                bench.search_batches[0],
                threads=bench.threads,
                progress=bench.progress,
            ).to_json()

        return Costs.from_json(bench.state.value(["costs", bench.target.name, bench.threads], make))

    def _costs_elsewhere(self) -> Costs:
        """Of a target that is not here: from the profile of a device, else from a model, with what to run for one."""
        bench = self.bench
        bench.write_profiled_graph()
        profile = read_profile(bench.bundle)
        if profile is not None:
            return device_costs(bench.graph, bench.groups, bench.quantized_readers(), profile)
        log.warning(
            "no times from a device: placements are compared by multiply-accumulates; for measured times %s, then run "
            "this command again, which keeps what it has measured here",
            profile_command(bench.bundle),
        )
        return costing.modelled_costs(bench.graph, bench.groups, bench.quantized_readers(), bench.target.name)

    def _distances(self, placements: Sequence[Placement]) -> list[float]:
        """Mean distance of each placement's detections from the float graph's on the search images."""
        bench, images = self.bench, len(self.sets.search.digests)

        def about(placement: Placement) -> list[object]:
            return ["distance", placement.sha256()]

        # A smoothed group is measured where its input is smoothed already (all placements are smoothed, or none is).
        meter = bench.smoothed_meter if any(placement.smooth for placement in placements) else bench.meter
        missing = [placement for placement in placements if not bench.state.has(about(placement))]
        parts: list[dict[int, float]] = [{} for _ in missing]

        def report(number: int, image: int, distance: float) -> None:
            parts[number][image] = distance
            if len(parts[number]) == images:
                values = [parts[number][i] for i in range(images)]
                bench.state.value(about(missing[number]), lambda: values)

        if missing:
            meter.measure(
                [replace(one, smooth={}) for one in missing],
                images,
                bench.search_batches.__getitem__,
                report=report,
                progress=bench.progress,
            )
        return [float(np.mean(bench.state.value(about(one), list))) for one in placements]

    def _better_observers(self, distances: dict[str, float]) -> dict[str, str]:
        """{group: the other observer} where it is better; `distances` of those groups become the lower ones.

        Only the groups that matter most are tried; for the others both observers are about equally good.
        """
        other = self.bench.other_observer
        tried = sorted(distances, key=lambda name: -distances[name])[:SENSITIVE]
        found = self._distances([Placement((name,), {name: other}) for name in tried])
        better = {name: value for name, value in zip(tried, found) if value < BETTER * distances[name]}
        distances.update(better)
        return dict.fromkeys(better, other)

    def _better_smoothed(self, distances: dict[str, float], observers: Mapping[str, str]) -> dict[str, float]:
        """{group: alpha of SmoothQuant} where it is better, as `_better_observers`; it costs no time."""
        tried = sorted(distances, key=lambda name: -distances[name])[:SENSITIVE]
        tried = [name for name in tried if name in self.bench.smoothable]
        chosen = dict.fromkeys(tried, ALPHA)
        found = self._distances([placed((name,), observers, chosen) for name in tried]) if tried else []
        better = {name: value for name, value in zip(tried, found) if value < BETTER * distances[name]}
        distances.update(better)
        return dict.fromkeys(better, ALPHA)

    def _default(self, costs: Costs, distances: dict[str, float]) -> Candidate:
        """What the policy chooses, as one more candidate: the search must not end below it."""
        placement = Placement.of_policy(self.bench.groups)
        distance = sum(distances.get(name, 0.0) for name in placement.int8)
        return Candidate("policy", placement, costs.change(placement.int8).ms, distance)

    def _measured(self, candidate: Candidate, costs: Costs) -> Candidate:
        """A candidate with its latency, and with its distance and AP drop on the search images."""
        bench = self.bench
        key = bench.key(candidate.placement)
        if bench.target.here:
            times = bench.state.value(["latency", key, bench.threads], lambda: self._latency(candidate))
        else:
            times = predicted_latency(candidate.placement, costs)
        compared = bench.state.value(["compared", key], lambda: self._compared(candidate))
        return replace(candidate, **times, **compared)

    def _latency(self, candidate: Candidate) -> dict[str, float]:
        """Milliseconds of the float graph and of the candidate, in turns, and the error of their difference."""
        bench = self.bench
        runners = [bench.open(bench.graph.model), bench.open_file(bench.candidate_graph(candidate.placement))]
        batch = bench.search_batches[0]
        # One thread: the time of the CPU, which other processes disturb less.
        clock = time.process_time if bench.threads == 1 else time.perf_counter
        times: list[list[float]] = [[], []]
        for number in range(MOST_ROUNDS + 2):
            for index in rotated((0, 1), number):
                began = clock()
                runners[index].run(batch)
                if number >= 2:  # the first runs plan memory
                    times[index].append(clock() - began)
            if bench.progress:
                bench.progress(f"time {candidate.name}", number + 1, MOST_ROUNDS + 2)
            if number % ROUNDS == 1 and number > ROUNDS and 2 * _error(times) < STEADY * float(np.median(times[0])):
                break
        a, b = (np.asarray(values) for values in times)
        middle = float(np.median(a))
        return {
            "float_ms": middle * 1e3,
            "int8_ms": (middle + float(np.median(b - a))) * 1e3,
            "error_ms": _error(times) * 1e3,
        }

    def _compared(self, candidate: Candidate) -> dict[str, float]:
        """Distance from the float graph on the search images, and the AP lost against it there, points."""
        bench = self.bench
        outputs = bench.outputs(candidate.placement, f"compare {candidate.name}")
        distances = bench.distances(outputs)
        found = evaluate(self._search_truth, bench.search_detections(outputs), by_size=False).ap or 0.0
        return {"distance": float(np.mean(distances)), "search_drop": self._float_ap - found}

    @cached_property
    def _search_truth(self) -> GroundTruth:
        return GroundTruth.of(self.sets.search.dataset)

    @cached_property
    def _float_ap(self) -> float:
        found = self.bench.search_detections(self.bench.float_outputs)
        return evaluate(self._search_truth, found, by_size=False).ap or 0.0

    def _interaction(self, candidates: Sequence[Candidate], distances: dict[str, float]) -> float | None:
        """Rank correlation of summed and measured distances over the candidates and some random placements."""
        if len(distances) < 2:
            return None
        rng = np.random.default_rng(0)
        names = list(distances)
        pairs = [(c.predicted_distance, c.distance) for c in candidates if c.distance is not None]
        drawn = [tuple(name for name in names if rng.random() < 0.5) for _ in range(RANDOM)]
        for chosen, measured in zip(drawn, self._distances([Placement(chosen) for chosen in drawn])):
            pairs.append((sum(distances[name] for name in chosen), measured))
        return rank_correlation(*zip(*pairs))

    def _slope(self, candidates: Sequence[Candidate]) -> float:
        """Points of AP per unit of distance: least squares through the origin over the candidates, at least 0."""
        pairs = [(c.distance or 0.0, c.search_drop or 0.0) for c in candidates]
        square = sum(d * d for d, _ in pairs)
        return max(0.0, sum(d * drop for d, drop in pairs) / square) if square else 0.0

    # --------------------------------------------------------------------------------------------------- the record

    def _tell(self, look: LookResult) -> None:
        seen = look.candidate, look.images, look.drop, look.upper, look.outcome
        log.info("candidate %d, %d images: drop %.3f, bound %.3f: %s", *seen)

    def _record(self, report: SearchReport) -> SearchReport:
        bundle = self.bench.bundle
        accepted = report.accepted_candidate
        if accepted is not None:
            with bundle.add(PLACEMENT.file, stage=PLACEMENT.step, made_from=PLACEMENT.made_from) as temporary:
                accepted.placement.save(temporary)
        with bundle.add(SEARCH.file, stage=SEARCH.step, made_from=(ONNX.file, REFERENCE.file)) as temporary:
            report.save(temporary)
        return report


def _error(times: Sequence[Sequence[float]]) -> float:
    """Standard error of the median difference of two candidates that were timed in turns, seconds."""
    return error_of_median(np.asarray(times[1]) - np.asarray(times[0]))
