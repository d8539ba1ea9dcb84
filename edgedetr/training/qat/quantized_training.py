"""Quantization-aware training of a bundle: its recipe, what is trained, and the ranges that come back."""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from edgedetr.artifacts import ONNX, PLACEMENT, RANGES, RECIPE, WEIGHTS
from edgedetr.bundle import Bundle
from edgedetr.errors import TrainingError, UsageError
from edgedetr.models.deploy import bundle_detector, fuse, load_fused
from edgedetr.models.detector import DetrModel
from edgedetr.onnx_graph.index import GraphIndex
from edgedetr.progress import Progress
from edgedetr.quantization.calibration import calibrate
from edgedetr.quantization.calibration_set import choose_images
from edgedetr.quantization.concat_split import split_concats
from edgedetr.quantization.config import QuantConfig
from edgedetr.quantization.observers import LEARNED
from edgedetr.quantization.placement import Placement, plan_for
from edgedetr.quantization.policy import Policy, QuantizationPlan, check_policy, load_policy
from edgedetr.quantization.quantize import read_onnx
from edgedetr.quantization.quantized_tensors import tensors_to_observe
from edgedetr.quantization.ranges import Ranges, share_pool_ranges
from edgedetr.recipe import Recipe
from edgedetr.storage.atomic import atomic_write
from edgedetr.storage.reading import read_json
from edgedetr.training.config import TrainConfig, resolved
from edgedetr.training.fine_tuning import DEFAULTS
from edgedetr.training.optimizer import parameter_groups
from edgedetr.training.output import FOLDER
from edgedetr.training.qat.distill import QuantizedTraining
from edgedetr.training.qat.quantizers import require_modelopt
from edgedetr.training.qat.student import RANGES as STUDENT_RANGES
from edgedetr.training.qat.student import layer_quantizers, learned_ranges, make_student
from edgedetr.training.trainer import Parts, Wanted

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

log = logging.getLogger(__name__)

LEARNED_RANGES = RANGES.file  # in the bundle's folder train/: what the weights of this moment were trained with

SHARE = 0.1  # of the epochs of the float training
# Of its learning rate: weights that are trained move little, or they forget (NNCF: at most a tenth; ultralytics and
# Paddle's ACT: 1e-5 to 3e-5 in all).
LR_SHARE = 0.05
FINAL_LR = 0.1  # of the rate, at the end of the cosine (ultralytics)
# A step changes a range by a hundredth at most. With ranges that clip 1 % of the values (the demonstration's rt_detr,
# everything INT8, 50 steps), a thousandth left 2.28 AP of a drop of 11.78, and a hundredth 1.96.
RANGE_LR = 1e-2


def quantized_recipe(recipe: Recipe, images: int, sets: Iterable[str] = ()) -> Recipe:
    """The recipe of a quantization-aware training that follows the training of `recipe`.

    images   of the train split
    sets     `section.key=value` strings over it
    """
    train, start = recipe.train, DEFAULTS
    batch = start.batch if train.batch == "auto" else train.batch
    epochs = start.whole_images / max(images, 1) if train.epochs == "auto" else train.epochs
    lr = start.whole_lr * (batch / start.batch) ** start.lr_power if train.lr == "auto" else train.lr
    changed = replace(
        recipe,
        train=replace(
            train,
            start="",
            epochs=max(int(epochs * SHARE), 1),
            minutes=0.0,
            lr=lr * LR_SHARE,
            schedule="cosine",
            step_epochs=(),
            final_lr_factor=FINAL_LR,
            warmup_steps="auto",
            growth=(),
            sizes=(),
            ema_decay="auto",
            ema_warmup="auto",
            eval_every=1,
            patience=0,
            precision="32",  # 8 bits of a bfloat16's mantissa would round the levels again
            drop_path=0.0,
            freeze=(),
            lora_rank=0,
            denoising=0,
            teacher="",
            feature_teacher="",
        ),
        # Flips alone: the ranges are those of images as they are deployed on.
        augment=replace(recipe.augment, off_for_first=1.0, mix_until=0.0),
        quant=replace(recipe.quant, observer=LEARNED, bias_correction=False),
    )
    found = Recipe.from_dict(tomllib.loads(changed.to_toml()), where="quantization-aware training", sets=sets)
    _require_unchanged(found, changed)
    if found.quant.observer != LEARNED:
        raise UsageError(
            f"quant.observer is {found.quant.observer!r} for quantization-aware training, which learns the ranges; "
            "leave it out; to observe them afterwards: edgedetr export OUT --int8 --set quant.observer=mse"
        )
    return found


# What a student is not trained with: its weights, its teacher and its layers are those of the bundle.
FIXED = ("start", "accept_license", "teacher", "feature_teacher", "denoising", "drop_path", "freeze", "lora_rank")


def _require_unchanged(found: Recipe, changed: Recipe) -> None:
    """Errors: UsageError where `found` sets what the training does not read, compared with `changed`."""
    keys = [f"train.{name}" for name in FIXED if getattr(found.train, name) != getattr(changed.train, name)]
    keys += [f"[{name}]" for name in ("model", "input") if getattr(found, name) != getattr(changed, name)]
    if keys:
        raise UsageError(
            f"--set {keys[0]} beside --qat: quantization-aware training takes model, input and weights from the "
            "bundle, which is also the teacher, and trains all of them; leave it out"
        )


@dataclass(frozen=True)
class PlannedGraph:
    """The float graph of a bundle after `split_concats`, and which of its nodes are INT8."""

    graph: GraphIndex
    policy: Policy
    plan: QuantizationPlan

    @classmethod
    def of(cls, bundle: Bundle, quant: QuantConfig, placement: Placement | None = None) -> PlannedGraph:
        """As `edgedetr export --int8` plans it. Errors: TrainingError for what cannot be trained."""
        model = split_concats(read_onnx(bundle.require(ONNX.file)))
        policy, graph = load_policy(quant.policy), GraphIndex(model)
        check_policy(model, policy)
        if quant.smooth or (placement is not None and placement.smooth):
            raise TrainingError(
                f"{bundle.path}: quantization-aware training does not support SmoothQuant; add: --set quant.smooth=0"
            )
        plan = plan_for(graph, policy, placement)
        if plan.products:
            raise TrainingError(
                f"{bundle.path}: {plan.products[0].node} is a product of two activations and INT8 in this placement; "
                "quantization-aware training supports layers with weights; leave it float"
            )
        return cls(graph, policy, plan)

    def amax(self, bundle: Bundle, quant: QuantConfig, progress: Progress | None = None) -> dict[str, float]:
        """The range of every activation: those of the bundle where they are for this policy, else observed now.

        Nothing is written: the bundle's own INT8 graphs stay fresh.
        """
        tensors = tensors_to_observe(self.graph, self.plan)
        if bundle.has(RANGES.file):
            present = Ranges.load(bundle.require(RANGES.file))
            if present.policy == self.policy.name and set(tensors) <= set(present.amax):
                return present.amax
        return self.observed(bundle, tensors, quant, progress)

    def observed(
        self, bundle: Bundle, tensors: Sequence[str], quant: QuantConfig, progress: Progress | None = None
    ) -> dict[str, float]:
        """Ranges of some activations on the bundle's calibration images."""
        paths = choose_images(bundle, None, quant.images).paths
        model = self.graph.model
        return share_pool_ranges(model, calibrate(model, tensors, paths, bundle.manifest.input, quant, progress))


def quantized_detector(
    start: Bundle, quant: QuantConfig, placement: Placement | None = None, progress: Progress | None = None
) -> QuantizedDetector:
    """What is trained, from a bundle with model.onnx.

    placement   which groups are INT8; None = as the policy chooses
    """
    planned = PlannedGraph.of(start, quant, placement)
    amax = planned.amax(start, quant, progress)
    content = hashlib.sha256(start.manifest.files[WEIGHTS.file].sha256.encode())
    content.update(json.dumps([amax, [layer.node for layer in planned.plan.layers]], sort_keys=True).encode())
    return QuantizedDetector(start, planned.graph, planned.plan, amax, content.hexdigest())


@dataclass(frozen=True)
class QuantizedDetector:
    """What is trained: the detector of a bundle, rounded at the places of a plan; see `trainer.TrainingKind`.

    start    the bundle
    graph    its float graph after `split_concats`
    amax     the ranges that the training starts with
    digest   of what the training starts from
    """

    start: Bundle
    graph: GraphIndex
    plan: QuantizationPlan
    amax: Mapping[str, float]
    digest: str

    def parts(self, wanted: Wanted) -> Parts:
        """A student and its teacher, whose weights are the bundle's also where a checkpoint replaces the student's."""
        known = [item.name for item in self.start.manifest.classes]
        found = [item.name for item in wanted.classes]
        if found != known:
            raise TrainingError(
                f"{self.start.path} knows {', '.join(known)}, and the data set has {', '.join(found)}; expected the "
                "same classes: quantization-aware training changes no class; train first: edgedetr train --data DIR "
                "--start BUNDLE"
            )
        recipe, device = wanted.recipe, wanted.fabric.device
        config = resolved(recipe.train)
        detector = bundle_detector(self.start)
        size = (recipe.input.height, recipe.input.width)
        student = make_student(detector, self.graph, self.plan, self.amax, size=size)
        student.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's stubs
        fuse(detector)
        teacher = detector.to(device).eval().requires_grad_(False)
        teacher.progress(1.0)
        class_loss = recipe.model.config.class_loss
        whole = calls_as_deployed(student, size)
        if not whole:
            log.info("losses of the last decoder layer alone: a layer that is INT8 is called otherwise for all layers")
        module = QuantizedTraining(student, teacher, config, class_loss, every_layer=whole)
        return Parts(student, module, _optimizer(student, config), teachers=self.digest)

    def plain(self, model: DetrModel, folder: Path) -> DetrModel:
        """The detector of the recipe whose fused form has the student's weights; its ranges go to `folder`."""
        manifest = self.start.manifest
        detector = bundle_detector(self.start)
        load_fused(detector, model)
        with atomic_write(folder / LEARNED_RANGES) as path:
            path.write_text(json.dumps(learned_ranges(model), indent=1, allow_nan=False) + "\n", encoding="utf-8")
        log.debug("%s: %d ranges", manifest.model, len(learned_ranges(model)))
        return detector


def _optimizer(student: DetrModel, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over the weights, by the recipe's groups, and over the ranges, which have their own rate and no decay."""
    config = resolved(config)
    ranges = {id(parameter): parameter for parameter in getattr(student, STUDENT_RANGES).parameters()}
    learned = [parameter for parameter in ranges.values() if parameter.requires_grad]
    groups: list[dict[str, object]] = []  # the log shows the rate of the last one, which is that of the weights
    if learned:
        groups.append({"params": learned, "base_lr": RANGE_LR, "weight_decay": 0.0})
    for group in parameter_groups(student, config):
        parameters = [one for one in group["params"] if id(one) not in ranges]  # type: ignore[attr-defined]
        if parameters:
            groups.append({**group, "params": parameters})
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=config.precision != "16")


@torch.no_grad()
def calls_as_deployed(student: DetrModel, size: tuple[int, int]) -> bool:
    """Whether layers with one quantizer per call are called as often for all decoder layers as for the last alone."""
    device = next(student.parameters()).device
    student(student.normalize(torch.zeros(1, 3, *size, device=device)))
    return all(len(one.parts[0].ranges) in (1, one.calls) for one in layer_quantizers(student))


def write_ranges(
    bundle: Bundle, quant: QuantConfig, placement: Placement | None = None, progress: Progress | None = None
) -> Ranges:
    """ranges.json of a trained bundle: learned ranges, and observed ones of what only another target rounds.

    quant       how the others are observed
    placement   with which it was trained; its groups go into the bundle, without its observers, which learning replaced
    Errors: TrainingError where no ranges were learned for this graph.
    """
    if placement is not None:
        placement = Placement(placement.int8)
        if not bundle.has(PLACEMENT.file):
            with bundle.add(PLACEMENT.file, stage=PLACEMENT.step, made_from=PLACEMENT.made_from) as temporary:
                placement.save(temporary)
    planned = PlannedGraph.of(bundle, quant, placement)
    tensors = tensors_to_observe(planned.graph, planned.plan)
    path = bundle.path / FOLDER / LEARNED_RANGES
    fix = f"run: edgedetr train --qat B --out {bundle.path} --resume"
    raw = read_json(path, TrainingError, fix=fix)
    strange = [name for name in raw if name not in tensors] if isinstance(raw, dict) else ["no object"]
    if strange:
        raise TrainingError(f"{path}: {strange[0]} is not quantized in this {ONNX.file}; {fix}")
    others = [name for name in tensors if name not in raw]
    amax = planned.observed(bundle, others, quant, progress) if others else {}
    amax = share_pool_ranges(planned.graph.model, {**amax, **raw})
    images = choose_images(bundle, None, quant.images).images
    ranges = Ranges({name: amax[name] for name in tensors}, LEARNED, planned.policy.name, quant.images, "", images)
    with bundle.add(RANGES.file, stage=RANGES.step, made_from=RANGES.made_from) as temporary:
        ranges.save(temporary)
    return ranges


def require_trainable(bundle: Bundle, data: str | Path | None = None) -> None:
    """Errors: TrainingError for a bundle that cannot be trained for INT8, and where modelopt is missing.

    data   in place of the set that the bundle records
    """
    files = bundle.manifest.files
    if ONNX.file in files and files[ONNX.file].stage == "import":
        raise TrainingError(
            f"{bundle.path} holds an imported graph, whose weights cannot be trained; expected a bundle of edgedetr "
            "train, or of edgedetr import with weights"
        )
    for name in (RECIPE.file, WEIGHTS.file):
        bundle.require(name)
    if bundle.manifest.data is None and data is None:
        raise TrainingError(
            f"{bundle.path} does not record a data set, so there is nothing to train on; name it: --data DIR"
        )
    require_modelopt()
