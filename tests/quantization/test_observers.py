"""Histograms and range choices against numpy and brute force."""

from __future__ import annotations

from typing import get_args, get_type_hints

import numpy as np
import pytest

from edgedetr.errors import ExportError, RecipeError
from edgedetr.quantization.config import QuantConfig
from edgedetr.quantization.observers import BINS, LEARNED, OBSERVERS, Histogram, divergence, squared_error


def histogram(*batches: np.ndarray, per_image: int | None = None) -> Histogram:
    found = Histogram("t", per_image)
    for values in batches:
        found.observe(values)
    return found


def test_largest_value_is_exact_whatever_the_order_of_the_images(rng):
    batches = [rng.normal(0, scale, 5000).astype(np.float32) for scale in (0.1, 30, 1, 7)]
    expected = max(float(np.abs(values).max()) for values in batches)
    for order in (batches, batches[::-1]):
        assert histogram(*order).amax("minmax") == expected


def test_growing_values_double_the_range_and_lose_no_count(rng):
    found = histogram(*[rng.uniform(-1, 1, 1000).astype(np.float32) * 3**i for i in range(8)])
    assert found.counts.sum() == 8000
    assert found.largest <= found.limit < 2 * found.largest * 1.001
    assert found.counts.shape == (BINS,)


@pytest.mark.parametrize("percentile", [50, 90, 99, 99.9, 99.99])
@pytest.mark.parametrize("kind", ["normal", "laplace", "uniform", "relu"])
def test_percentiles_are_numpys_to_one_bin(rng, kind, percentile):
    draw = {"normal": rng.normal, "laplace": rng.laplace, "uniform": rng.uniform, "relu": rng.normal}[kind]
    values = draw(size=200_000).astype(np.float32)
    values = np.maximum(values, 0) if kind == "relu" else values
    found = histogram(*np.split(values, 10))
    expected = float(np.percentile(np.abs(values), percentile))
    # One bin is all that the histogram knows; in the tail, half a rank of 200,000 values is between two samples.
    gap = np.diff(np.percentile(np.abs(values), [max(percentile - 1e-3, 0), min(percentile + 1e-3, 100)]))[0]
    assert found.amax("percentile", percentile) == pytest.approx(expected, abs=found.limit / BINS + gap)


@pytest.mark.parametrize("kind", ["normal", "outlier", "uniform"])
def test_mse_range_is_as_good_as_a_brute_force_search_on_the_values_themselves(rng, kind):
    values = rng.uniform(-1, 1, 4000) if kind == "uniform" else rng.normal(0, 1, 4000)
    if kind == "outlier":
        values[0] = 60.0

    def error(amax: float) -> float:
        step = amax / 127
        return float(((np.clip(np.round(values / step), -127, 127) * step - values) ** 2).sum())

    chosen = histogram(values.astype(np.float32)).amax("mse")
    best = min(error(amax) for amax in np.linspace(0.01, 1, 400) * np.abs(values).max())
    # The bins (1/2048 of the range, a step is 1/127) and the 100 candidates blur the optimum by a few per cent.
    assert error(chosen) <= 1.1 * best
    if kind == "outlier":
        assert chosen < 60, "one value in 4,000 must not cost all others their resolution"


def test_squared_error_equals_a_loop():
    centers, counts = np.array([0.1, 0.5, 1.3]), np.array([5, 2, 1])
    expected = 0.0
    for center, count in zip(centers, counts):
        level = min(round(center / (1.0 / 127)), 127) / 127
        expected += count * (level - center) ** 2
    assert squared_error(centers, counts, 1.0) == pytest.approx(expected)


def brute_divergence(counts: np.ndarray, keep: int) -> float:
    """The same definition written as loops over bins and levels."""
    reference = [float(c) for c in counts[:keep]]
    reference[-1] += float(counts[keep:].sum())
    approximated = [0.0] * keep
    for level in range(128):
        members = [i for i in range(keep) if i * 128 // keep == level and reference[i] > 0]
        mass = sum(float(counts[i]) for i in range(keep) if i * 128 // keep == level)
        for i in members:
            approximated[i] = mass / len(members)
    p_total, q_total = sum(reference), sum(approximated)
    pairs = [(p / p_total, q / q_total) for p, q in zip(reference, approximated) if p > 0]
    return sum(p * np.log(p / max(q, 1e-12)) for p, q in pairs)


@pytest.mark.parametrize("keep", [128, 200, 777, 2048])
def test_divergence_equals_loops(rng, keep):
    counts = rng.poisson(np.linspace(200, 0, BINS)).astype(np.int64)
    assert divergence(counts, keep) == pytest.approx(brute_divergence(counts, keep), rel=1e-9, abs=1e-12)


def test_entropy_clips_lone_outliers_and_keeps_a_flat_distribution(rng):
    tail = rng.normal(size=100_000).astype(np.float32)
    tail[:3] = 40.0
    assert histogram(tail).amax("entropy") < 20
    flat = rng.uniform(0, 1, 100_000).astype(np.float32)
    assert histogram(flat).amax("entropy") > 0.95


@pytest.mark.parametrize("fraction", [0.3, 0.6, 0.95])
def test_entropy_takes_the_range_that_it_takes_without_the_zeros_of_a_relu(rng, fraction):
    alive = np.abs(rng.normal(size=40_000)).astype(np.float32) + np.float32(1e-3)
    zeros = np.zeros(round(len(alive) * fraction / (1 - fraction)), np.float32)
    mixed = rng.permutation(np.concatenate([alive, zeros]))
    batches = [mixed * np.float32(scale) for scale in (0.2, 1.0)]  # the second doubles the reach of the first
    chosen = histogram(*batches).amax("entropy")
    assert chosen == histogram(*(values[values != 0] for values in batches)).amax("entropy")
    inside = (alive <= chosen).mean()
    assert inside > 0.97, f"{100 * (1 - inside):.0f} % of the values of the larger image are clipped at {chosen}"


def test_entropy_of_a_tensor_whose_only_values_were_not_sampled_is_the_largest():
    values = np.zeros(10_000, np.float32)
    values[1] = 7.0
    assert histogram(values, per_image=100).amax("entropy") == 7.0


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_refused_with_the_tensors_name(poison):
    with pytest.raises(ExportError, match="'conv7' holds NaN or infinity"):
        Histogram("conv7").observe(np.array([1.0, poison], dtype=np.float32))


def test_the_table_of_observers_is_what_a_recipe_accepts():
    hint = get_type_hints(QuantConfig)["observer"]
    assert get_args(hint) == (*OBSERVERS, LEARNED) == ("minmax", "percentile", "entropy", "mse", "qat")
    options = {name: observer.option for name, observer in OBSERVERS.items()}
    assert options == {"minmax": None, "percentile": "percentile", "entropy": None, "mse": None}
    for name, observer in OBSERVERS.items():
        config = QuantConfig(observer=name, percentile=95)
        assert config.observer_option == (95 if observer.option else None)
        assert config.observer_label == ("percentile 95" if observer.option else name)
        assert 10 < len(observer.summary) < 100


@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_every_observer_chooses_a_range_within_the_observed_one_and_in_its_unit(rng, observer, scale):
    values = rng.laplace(size=20_000).astype(np.float32)
    option = QuantConfig(observer=observer).observer_option
    chosen = histogram(values * np.float32(scale)).amax(observer, option)
    assert 0 < chosen <= float(np.abs(values * np.float32(scale)).max())
    assert chosen / scale == pytest.approx(histogram(values).amax(observer, option), rel=0.02)  # a bin, a candidate


@pytest.mark.parametrize("observer", OBSERVERS)
def test_a_tensor_that_is_always_zero_has_range_zero(observer):
    option = QuantConfig(observer=observer).observer_option
    assert histogram(np.zeros(100, np.float32), np.zeros(100, np.float32)).amax(observer, option) == 0.0


def test_percentile_without_its_number_and_unknown_observers_are_errors():
    values = histogram(np.ones(100, np.float32))
    with pytest.raises(ExportError, match="'percentile' was called without its percentile"):
        values.amax("percentile")
    with pytest.raises(RecipeError, match="quant.observer is 'mean'; expected one of 'minmax'"):
        values.amax("mean")


def test_large_tensors_are_sampled_evenly_and_their_extremes_are_still_exact(rng):
    values = rng.normal(size=(64, 50, 50)).astype(np.float32)
    values[3, 2, 1] = -99.0
    found = histogram(values, per_image=5000)
    assert found.counts.sum() <= 5000
    assert found.amax("minmax") == 99.0
    whole = histogram(values)
    # 5,000 of 160,000 values: the standard error of the median's rank is 0.7 %.
    assert found.amax("percentile", 50) == pytest.approx(whole.amax("percentile", 50), rel=0.05)


def test_entropy_never_chooses_a_range_that_holds_almost_nothing():
    """Pixels of bright images: none near 0, but for one; the smallest range alone has two equal distributions."""
    bright = np.linspace(0.5, 1.0, 50_000, dtype=np.float32)
    bright[0] = 127.5 / BINS  # in the last bin of the smallest range that is tried
    found = histogram(bright)
    assert divergence(found.counts, 128) == 0.0
    assert found.amax("entropy") > 0.95


@pytest.mark.parametrize("scales", [[1, 1, 1, 1], [0.1, 3, 0.5, 20, 1], [0, 0, 2, 1], [0, 0]])
def test_the_halves_are_the_histograms_of_every_second_image(rng, scales):
    batches = [rng.normal(0, 1, 3000).astype(np.float32) * np.float32(scale) for scale in scales]
    found = histogram(*batches)
    for start, half in enumerate(found.halves()):
        values = np.abs(np.concatenate(batches[start::2]))
        assert half.largest == values.max()
        assert half.counts.sum() == len(values)
        assert half.zeros == np.count_nonzero(values == 0)
        edges = np.linspace(0, found.limit or 1, BINS + 1)
        # A value on the border of two bins may fall into either of them.
        assert np.abs(np.cumsum(half.counts) - np.cumsum(np.histogram(values, edges)[0])).max() <= 3
