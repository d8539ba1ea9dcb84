"""Reads the splits of a training, and makes batches of their images, augmented differently in each epoch.

What an image becomes is a function of (seed, epoch, index) alone, and the order of an epoch of (seed, epoch): a resumed
training sees exactly the batches that it would have seen, with any number of workers.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from edgedetr.boxes import xyxy_to_cxcywh
from edgedetr.bundle import InputContract
from edgedetr.data import layouts
from edgedetr.data.detection_set import DataConfig, DetectionSet, Sample, without_empty_classes
from edgedetr.data.images import decode
from edgedetr.errors import DataError
from edgedetr.models.backbones.backbone import SIZE_MULTIPLE
from edgedetr.runtime.cpu import bounded
from edgedetr.runtime.preprocess import Geometry, averaged, resize
from edgedetr.training.config import AugmentConfig
from edgedetr.training.data.transforms import SourceImage, augment, transform

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Splits:
    """The splits that a training reads: one to learn from, one to select the best epoch by.

    folder  of the data set
    config  with the names of all splits filled in
    """

    folder: Path
    config: DataConfig
    train: DetectionSet
    select: DetectionSet

    @property
    def selects(self) -> bool:
        """Whether the best epoch may be selected. Not on the verify split: its figures would be too good then."""
        return self.config.select_split != self.config.verify_split


def open_splits(folder: Path, config: DataConfig) -> Splits:
    """Read both splits. Errors: DataError where one has no objects, or where their classes differ."""
    config = config.resolve(layouts.splits(folder))
    train = layouts.load(folder, config.train_split, strict=config.strict)
    train = without_empty_classes(train) if config.drop_empty_classes else train
    select = layouts.load(folder, config.select_split, strict=config.strict, classes=train.classes, owner=train.name)
    if not _has_objects(train):
        raise DataError(
            f"{train.root}: the split {train.name!r} has {len(train)} usable images and no objects "
            f"to learn; run: edgedetr data check {train.root}"
        )
    if not _has_objects(select):
        raise DataError(
            f"{train.root}: the split {select.name!r} has {len(select)} usable images and no objects, so "
            "its AP is undefined and cannot select an epoch; name another split with "
            "--set data.select_split=NAME, or label it"
        )
    if train.classes != select.classes:
        ours, theirs = (", ".join(c.name for c in part.classes) for part in (train, select))
        raise DataError(
            f"{train.root}: classes differ between {train.name} ({ours}) and {select.name} ({theirs}); "
            "expected the same in every split"
        )
    known = {sample.path for sample in train.samples}
    if shared := [sample.path for sample in select.samples if sample.path in known]:
        log.warning(
            "%d of %d images of %s are training images too (%s): its AP is higher than on new images; name another "
            "split with --set data.select_split=NAME",
            len(shared),
            len(select),
            select.name,
            shared[0].name,
        )
    return Splits(folder, config, train, select)


def _has_objects(samples: DetectionSet) -> bool:
    return any((~sample.crowd).any() for sample in samples.samples)


def warn_of_crowded_images(samples: DetectionSet, queries: int) -> None:
    """Log which images hold more objects than the model has queries: the others can be neither found nor learned."""
    counts = [(int((~sample.crowd).sum()), sample.path) for sample in samples.samples]
    crowded = [(count, path) for count, path in counts if count > queries]
    if crowded:
        most, path = max(crowded)
        log.warning(
            "%d of %d training images hold more objects than the model has queries: up to %d (%s), and "
            "model.queries is %d, so at most %d of them can be found; expected --set model.queries=%d or more",
            len(crowded),
            len(samples),
            most,
            path,
            queries,
            queries,
            most,
        )


@dataclass(frozen=True)
class Target:
    """The objects of one image.

    labels  [T] int64, contiguous class index
    boxes   [T, 4] float32, cx, cy, w, h in 0..1 of the input image
    """

    labels: Tensor
    boxes: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class PaddedTargets:
    """The objects of B images, padded to the T of the image with the most.

    labels  [B, T] int64, padding 0
    boxes   [B, T, 4] float32, padding the whole image (it has an area, so that no overlap divides by 0)
    counts  objects of each image, as Python ints
    """

    labels: Tensor
    boxes: Tensor
    counts: list[int]

    @property
    def valid(self) -> Tensor:
        """[B, T] bool, True where there is an object."""
        counts = torch.tensor(self.counts, device=self.labels.device)
        return torch.arange(self.labels.shape[1], device=self.labels.device)[None] < counts[:, None]

    def to(self, device: torch.device) -> PaddedTargets:
        labels, boxes = (part.to(device, non_blocking=True) for part in (self.labels, self.boxes))
        return PaddedTargets(labels, boxes, self.counts)


def pad(targets: Sequence[Target]) -> PaddedTargets:
    """The targets of a batch, padded to the same length."""
    counts = [len(target) for target in targets]
    most, device = max(counts, default=0), targets[0].labels.device
    labels = torch.zeros(len(counts), most, dtype=torch.int64, device=device)
    boxes = torch.tensor([0.5, 0.5, 1.0, 1.0], device=device).repeat(len(counts), most, 1)
    for row, target in enumerate(targets):
        labels[row, : counts[row]] = target.labels
        boxes[row, : counts[row]] = target.boxes
    return PaddedTargets(labels, boxes, counts)


@dataclass(frozen=True)
class Batch:
    """images [B, 3, H, W] uint8, RGB; the target of each; their indices in the set."""

    images: Tensor
    targets: list[Target]
    indices: list[int]


@dataclass(frozen=True)
class SampleKey:
    """What `TrainingSet` is indexed with: epoch, index in the set, input size (None: the set's), and augmentation.

    strong  all augmentations; False: flips only
    mixes   several images may become one
    """

    epoch: int
    index: int
    strong: bool = True
    mixes: bool = True
    contract: InputContract | None = None


class TrainingSet(Dataset):
    """The augmented images of a split. `set_[SampleKey]` -> (pixels [3, H, W] uint8, Target, index).

    strict    an image that cannot be decoded is an error; otherwise the next one replaces it
    cache_mb  decoded images are kept in memory up to this size
    multiple  of the model's input sides, pixels: drawn sizes are rounded to it
    """

    def __init__(
        self,
        samples: DetectionSet,
        contract: InputContract,
        config: AugmentConfig,
        *,
        seed: int,
        cache_mb: int,
        multiple: int = SIZE_MULTIPLE,
        strict: bool = False,
    ) -> None:
        self.samples, self.contract, self.config, self.seed, self.strict = samples, contract, config, seed, strict
        self.multiple = multiple
        self.cache: dict[int, SourceImage] = {}
        self._free_bytes = cache_mb * 2**20

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: SampleKey) -> tuple[Tensor, Target, int]:
        index, image = self._readable(key.index)
        rng = np.random.default_rng((self.seed, key.epoch, key.index))
        contract = key.contract or self.contract
        if key.strong:
            example = transform(
                image,
                lambda: self._readable(int(rng.integers(len(self))))[1],
                contract,
                self.config,
                rng,
                mixes=key.mixes,
            )
        else:
            example = augment(image, contract, self.config, rng, flips_only=True)
        width, height = contract.width, contract.height
        boxes = torch.from_numpy(xyxy_to_cxcywh(example.boxes) / [width, height, width, height])
        return example.pixels, Target(torch.from_numpy(example.labels), boxes.float().reshape(-1, 4)), index

    def fill_cache(self) -> None:
        """Decode images into the cache until it is full, before worker processes are forked that share it."""
        with ThreadPoolExecutor() as pool:  # decoding releases Python's lock
            for number in range(0, len(self), 64):
                if self._free_bytes <= 0:
                    break
                list(pool.map(self._try, range(number, min(number + 64, len(self)))))

    def _try(self, index: int) -> None:
        with contextlib.suppress(DataError):  # reported when the image is used
            self._image(index)

    def _readable(self, index: int) -> tuple[int, SourceImage]:
        """The image at an index, or the next one that can be decoded; with `strict`, a failure is an error."""
        for step in range(len(self.samples)):
            at = (index + step) % len(self.samples)
            try:
                return at, self._image(at)
            except DataError as error:
                if self.strict:
                    raise
                log.warning("%s; training goes on without it", error)
        raise DataError(f"{self.samples.root}: none of the {len(self.samples)} training images can be decoded")

    def _image(self, index: int) -> SourceImage:
        if index in self.cache:
            return self.cache[index]
        image = load(self.samples.samples[index], self.contract)
        if image.pixels.numel() <= self._free_bytes:
            self._free_bytes -= image.pixels.numel()
            self.cache[index] = image
        return image


def load(sample: Sample, contract: InputContract) -> SourceImage:
    """Decode an image and run the averaging half of the resize; augmentation runs the interpolating half."""
    image = decode(sample.path)
    geometry = Geometry.of(image.shape[0], image.shape[1], contract)
    rows = geometry.used_height // averaged(geometry.source_height, geometry.content_height)
    columns = geometry.used_width // averaged(geometry.source_width, geometry.content_width)
    if (rows, columns) != image.shape[:2]:
        image = resize(image, InputContract(rows, columns))[0]
    scale = np.array([columns / geometry.used_width, rows / geometry.used_height])
    real = ~sample.crowd
    return SourceImage(
        torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1),
        sample.boxes[real] * np.tile(scale, 2),
        sample.labels[real].astype(np.int64),
        frame_height=rows * contract.height / geometry.content_height,
        frame_width=columns * contract.width / geometry.content_width,
    )


def epoch_order(samples: int, batch: int, *, seed: int, epoch: int) -> np.ndarray:
    """Shuffled indices of one epoch, [steps, batch]: an incomplete batch is left out, too few images are repeated."""
    indices = np.random.default_rng((seed, epoch)).permutation(samples)
    if samples < batch:
        indices = np.resize(indices, batch)
    steps = len(indices) // batch
    return indices[: steps * batch].reshape(steps, batch)


def batches(
    dataset: TrainingSet,
    rows: np.ndarray,
    epoch: int,
    *,
    strong: bool = True,
    mixes: bool = True,
    workers: int = 0,
    contracts: Sequence[InputContract] | None = None,
) -> Iterator[Batch]:
    """One batch per row of indices [steps, batch of this process].

    strong, mixes  as in `SampleKey`
    contracts      the input size of each batch; None: the set's
    """
    sizes = contracts or [dataset.contract] * len(rows)
    keys = [[SampleKey(epoch, int(index), strong, mixes, size) for index in row] for row, size in zip(rows, sizes)]
    workers = bounded(workers, "train.workers")
    return iter(
        DataLoader(
            dataset,
            batch_sampler=keys,
            num_workers=workers,
            collate_fn=_collate,
            pin_memory=torch.cuda.is_available(),
            prefetch_factor=4 if workers else None,
        )
    )


def _collate(items: list[tuple[Tensor, Target, int]]) -> Batch:
    images, targets, indices = zip(*items)
    return Batch(torch.stack(images), list(targets), list(indices))


def draw_sizes(
    contract: InputContract, fractions: Sequence[float], steps: int, *, multiple: int, seed: int, epoch: int
) -> list[InputContract]:
    """The input size of every batch of an epoch, drawn from fractions of its sides; the same in every process.

    multiple  what the sides are rounded to, pixels
    """
    drawn = np.random.default_rng((seed, epoch, len(fractions))).choice(fractions, steps)
    return [scaled(contract, float(fraction), multiple) for fraction in drawn]


def scaled(contract: InputContract, fraction: float, multiple: int) -> InputContract:
    """The contract with both sides multiplied by `fraction` and rounded to multiples of `multiple` pixels."""
    if fraction == 1:
        return contract
    height, width = (max(round(side * fraction / multiple), 1) * multiple for side in (contract.height, contract.width))
    return replace(contract, height=height, width=width)
