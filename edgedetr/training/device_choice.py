"""Chooses the devices of a training from the user's word, and refuses one that this machine cannot meet."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace

import torch

from edgedetr.errors import DeviceError, UsageError
from edgedetr.recipe import Recipe
from edgedetr.training.config import RunConfig

EXPECTED = "expected cpu, cuda (or gpu), mps, or numbers of GPUs as in 0 or 0,1"


@dataclass(frozen=True)
class DeviceChoice:
    """accelerator  Fabric's word; "auto": the GPUs where there are any, else the CPU
    gpus         numbers of the GPUs to use; () = the first train.devices ones
    """

    accelerator: str = "auto"
    gpus: tuple[int, ...] = ()

    def of_fabric(self, config: RunConfig) -> int | list[int]:
        """What Fabric takes as `devices`."""
        return list(self.gpus) or config.devices


ANY_DEVICE = DeviceChoice()


def choose_device(word: str | None) -> DeviceChoice:
    """ "cpu", "cuda", "gpu", "cuda:1", "0,1", "mps", "auto" or None -> the choice.

    Errors: UsageError for another word, DeviceError that names what is here where this machine does not have it.
    """
    text = "auto" if word is None else word.strip().lower() if isinstance(word, str) else repr(word)
    text = "cuda" if text == "gpu" else text
    if text == "auto":
        return ANY_DEVICE
    if text == "cpu":
        return DeviceChoice("cpu")
    if text == "mps":
        if not torch.backends.mps.is_available():
            raise DeviceError(f"device is 'mps', which PyTorch does not have here; there is {present()}")
        return DeviceChoice("mps")
    found = re.fullmatch(r"(?:cuda:)?([0-9]{1,4}(?:,[0-9]{1,4})*)", text.replace(" ", ""))
    if text != "cuda" and found is None:
        raise UsageError(f"device is {str(word)[:60]!r}; {EXPECTED}")
    if not torch.cuda.is_available():
        why = (
            f"this PyTorch ({torch.__version__}) was built without CUDA"
            if torch.version.cuda is None
            else "PyTorch finds no GPU (nvidia-smi shows whether the driver works)"
        )
        raise DeviceError(f"device is {word!r}, but {why}; there is {present()}; leave --device out, or name cpu")
    gpus = tuple(int(number) for number in found[1].split(",")) if found else ()
    if len(set(gpus)) < len(gpus):
        raise UsageError(f"device is {word!r}, which names a GPU twice; {EXPECTED}")
    if gpus and max(gpus) >= torch.cuda.device_count():
        raise DeviceError(f"device is {word!r}, but there is no GPU {max(gpus)}; there is {present()}")
    return DeviceChoice("cuda", gpus)


def with_devices(recipe: Recipe, choice: DeviceChoice) -> Recipe:
    """The recipe with train.devices as many as the GPUs that were chosen by number.

    Errors: UsageError where the recipe asks for another number of several.
    """
    count = len(choice.gpus)
    if count in (0, recipe.train.devices):
        return recipe
    if recipe.train.devices != 1:
        raise UsageError(
            f"--device names {count} GPUs and train.devices is {recipe.train.devices}; expected the same number"
        )
    return replace(recipe, train=replace(recipe.train, devices=count))


def present() -> str:
    """The devices of this machine that PyTorch can use, for messages."""
    cpu = f"the CPU ({os.cpu_count()} cores)"
    if torch.cuda.is_available():
        names = [f"{number} {torch.cuda.get_device_name(number)}" for number in range(torch.cuda.device_count())]
        return f"{cpu}, and GPUs: {', '.join(names)}"
    return f"{cpu}, and mps" if torch.backends.mps.is_available() else cpu
