"""Training images as batches: decoded once, varied anew each epoch, the same whatever the number of workers.

What an image becomes is a function of (seed, epoch, index) alone, and the order of an epoch of (seed, epoch), so a
resumed training sees exactly what it would have seen.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from edgedetr.boxes import xyxy_to_cxcywh
from edgedetr.bundle import InputContract
from edgedetr.data.detection_set import DetectionSet, Sample
from edgedetr.data.images import decode
from edgedetr.errors import DataError
from edgedetr.runtime.cpu import bounded
from edgedetr.runtime.preprocess import Geometry, averaged, resize
from edgedetr.training.config import AugmentConfig
from edgedetr.training.data.transforms import Picture, compose, vary
from edgedetr.training.ground_truth import Target

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """images [B, 3, H, W] uint8, RGB; targets of each; indices of the samples in the set."""

    images: Tensor
    targets: list[Target]
    indices: list[int]


@dataclass(frozen=True)
class Pick:
    """Which sample of the set, in which epoch, at which size (None: the set's); `plain` switches all but flips off."""

    epoch: int
    index: int
    plain: bool
    contract: InputContract | None = None


class TrainingSet(Dataset):
    """Varied images of a set. `set_[Pick]` -> (pixels [3, H, W] uint8, Target, index)."""

    def __init__(
        self,
        samples: DetectionSet,
        contract: InputContract,
        augment: AugmentConfig,
        *,
        seed: int,
        cache_mb: int,
        strict: bool = False,
    ) -> None:
        self.samples, self.contract, self.augment, self.seed, self.strict = samples, contract, augment, seed, strict
        self.room = cache_mb * 2**20
        self.cache: dict[int, Picture] = {}

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, pick: Pick) -> tuple[Tensor, Target, int]:
        index, picture = self._readable(pick.index)
        rng = np.random.default_rng((self.seed, pick.epoch, pick.index))
        contract = pick.contract or self.contract
        if pick.plain:
            example = vary(picture, contract, self.augment, rng, flips_only=True)
        else:
            example = compose(
                picture, lambda: self._readable(int(rng.integers(len(self))))[1], contract, self.augment, rng
            )
        width, height = contract.width, contract.height
        centered = torch.from_numpy(xyxy_to_cxcywh(example.boxes) / [width, height, width, height])
        return example.pixels, Target(torch.from_numpy(example.labels), centered.float().reshape(-1, 4)), index

    def fill(self) -> None:
        """Decode into the cache now, as far as it has room, so that worker processes share it."""
        with ThreadPoolExecutor() as pool:  # decoding releases Python's lock
            for number in range(0, len(self), 64):
                if self.room <= 0:
                    break
                list(pool.map(self._try, range(number, min(number + 64, len(self)))))

    def _try(self, index: int) -> None:
        with contextlib.suppress(DataError):  # told when its turn comes
            self._picture(index)

    def _readable(self, index: int) -> tuple[int, Picture]:
        """The sample, or the next one that can be decoded; with strict, the first failure ends it."""
        for step in range(len(self.samples)):
            at = (index + step) % len(self.samples)
            try:
                return at, self._picture(at)
            except DataError as error:
                if self.strict:
                    raise
                log.warning("%s; training goes on without it", error)
        raise DataError(f"{self.samples.root}: none of the {len(self.samples)} training images can be decoded")

    def _picture(self, index: int) -> Picture:
        if index in self.cache:
            return self.cache[index]
        picture = load(self.samples.samples[index], self.contract)
        if picture.pixels.numel() <= self.room:
            self.room -= picture.pixels.numel()
            self.cache[index] = picture
        return picture


def load(sample: Sample, contract: InputContract) -> Picture:
    """Decode an image and do the averaging half of the one resize; the interpolating half is done per example."""
    image = decode(sample.path)
    geometry = Geometry.of(image.shape[0], image.shape[1], contract)
    rows = geometry.used_height // averaged(geometry.source_height, geometry.content_height)
    columns = geometry.used_width // averaged(geometry.source_width, geometry.content_width)
    if (rows, columns) != image.shape[:2]:
        image = resize(image, InputContract(rows, columns))[0]
    scale = np.array([columns / geometry.used_width, rows / geometry.used_height])
    real = ~sample.crowd
    return Picture(
        torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1),
        sample.boxes[real] * np.tile(scale, 2),
        sample.labels[real].astype(np.int64),
        frame_height=rows * contract.height / geometry.content_height,
        frame_width=columns * contract.width / geometry.content_width,
    )


def order(samples: int, batch: int, *, seed: int, epoch: int) -> np.ndarray:
    """Indices of one epoch, shuffled: [steps, batch]; what does not fill a batch is left out, too few are repeated."""
    indices = np.random.default_rng((seed, epoch)).permutation(samples)
    if samples < batch:
        indices = np.resize(indices, batch)
    steps = len(indices) // batch
    return indices[: steps * batch].reshape(steps, batch)


def batches(
    dataset: TrainingSet,
    plan: np.ndarray,
    epoch: int,
    *,
    plain: bool,
    workers: int,
    contracts: Sequence[InputContract] | None = None,
) -> Iterator[Batch]:
    """Batches of one process by a plan [steps, batch of this process], at the set's own size or one for each step."""
    sizes = contracts or [dataset.contract] * len(plan)
    picks = [[Pick(epoch, int(index), plain, size) for index in row] for row, size in zip(plan, sizes)]
    workers = bounded(workers, "train.workers")
    return iter(
        DataLoader(
            dataset,
            batch_sampler=picks,
            num_workers=workers,
            collate_fn=_collate,
            pin_memory=torch.cuda.is_available(),
            prefetch_factor=4 if workers else None,
        )
    )


def _collate(items: list[tuple[Tensor, Target, int]]) -> Batch:
    images, targets, indices = zip(*items)
    return Batch(torch.stack(images), list(targets), list(indices))


def drawn(
    contract: InputContract, shares: Sequence[float], steps: int, *, seed: int, epoch: int
) -> list[InputContract]:
    """The contract at one of the shares of its sides, for every step of an epoch; the same in every process."""
    picked = np.random.default_rng((seed, epoch, len(shares))).choice(shares, steps)
    return [smaller(contract, float(share)) for share in picked]


def smaller(contract: InputContract, share: float) -> InputContract:
    """The contract with its sides scaled to multiples of 32, the coarsest stride; also larger."""
    if share == 1:
        return contract
    height, width = (max(round(side * share / 32), 1) * 32 for side in (contract.height, contract.width))
    return replace(contract, height=height, width=width)
