"""What members declare is true: each pattern names something, and nothing that it should name is missing."""

from __future__ import annotations

from dataclasses import fields, replace
from fnmatch import fnmatchcase

import pytest
import torch
from members import CLASSES, SMALL

from edgedetr.errors import ModelError
from edgedetr.models import FAMILY, build, member
from edgedetr.models.detector import DetrModel
from edgedetr.models.member import ROLES, Member

every = pytest.mark.parametrize("name", FAMILY)


def forms(name: str, classes: int = CLASSES) -> list[DetrModel]:
    """A member at its default configuration and at the tests', which switch on other parts; shapes alone."""
    configs = [FAMILY[name].config(), SMALL[name]]
    if hasattr(SMALL[name], "denoising"):
        configs.append(replace(SMALL[name], denoising=True))
    with torch.device("meta"):
        return [build(name, config, classes) for config in configs]


@every
def test_every_pattern_of_a_role_names_a_module(name: str) -> None:
    paths = {path for model in forms(name) for path, _ in model.named_modules()}
    for pattern, role in FAMILY[name].roles.items():
        assert any(fnmatchcase(path, pattern) for path in paths), f"{pattern} names no module of {name}"
        assert role in ROLES
        assert any(FAMILY[name].role_of(path) == role for path in paths), f"{pattern} is hidden by an earlier pattern"


@every
def test_decoder_and_selection_have_a_role_and_the_backbone_has_none_but_for_patches(name: str) -> None:
    for path, _ in forms(name)[0].named_modules():
        slot = path.partition(".")[0]
        role = FAMILY[name].role_of(path)
        if slot == "decoder":
            assert role in ("decoder", "memory_projection", "dynamic_head", "box_distribution"), path
        elif slot == "selector":
            assert role in ("query_selection", "memory_projection"), path
        elif slot == "encoder":
            assert role in (None, "sampling_offsets", "attention_weights", "dynamic_relu", "projector"), path
        else:
            assert role == ("patch_embedding" if path.startswith("backbone.patch") else None), path


@every
def test_what_reads_the_memory_once_for_all_queries_has_a_role_of_its_own(name: str) -> None:
    """By its input: the modules inside the decoder that are given one row per memory token."""
    torch.manual_seed(0)
    model, read = build(name, SMALL[name], CLASSES).eval(), set()
    images = torch.rand(1, 3, 128, 160)
    tokens = model.encode(images).tokens.shape[1]
    for path, module in model.decoder.named_modules():
        if isinstance(module, torch.nn.Linear):

            def note(_module: object, inputs: tuple[torch.Tensor, ...], path: str = path) -> None:
                if inputs[0].ndim == 3 and inputs[0].shape[1] == tokens:
                    read.add(f"decoder.{path}")

            module.register_forward_pre_hook(note)
    with torch.no_grad():
        model(images)
    # The position of the tokens is projected apart, by a layer that is small compared with those of their content.
    found = {path for path in read if not path.endswith("k_position")}
    declared = {
        path
        for path, module in model.named_modules()
        if path.startswith("decoder.") and isinstance(module, torch.nn.Linear)
        if FAMILY[name].role_of(path) == "memory_projection"
    }
    assert found == declared


@every
def test_every_pattern_of_slow_parameters_and_of_first_weights_names_a_parameter(name: str) -> None:
    names = {parameter for model in forms(name) for parameter, _ in model.named_parameters()}
    for pattern in (*FAMILY[name].slow_parameters, *(FAMILY[name].original_init or {})):
        assert any(fnmatchcase(parameter, pattern) for parameter in names), f"{pattern} names no parameter of {name}"


@every
def test_what_depends_on_the_classes_is_what_changes_its_size_with_their_number(name: str) -> None:
    for one, other in zip(forms(name, 3), forms(name, 4)):
        sizes = {parameter: tensor.shape for parameter, tensor in other.state_dict().items()}
        changed = {parameter for parameter, tensor in one.state_dict().items() if tensor.shape != sizes[parameter]}
        assert changed == {parameter for parameter in sizes if FAMILY[name].is_per_class(parameter)}


@every
def test_what_is_read_from_tensors_or_named_unreadable_is_a_field(name: str) -> None:
    known = {item.name for item in fields(FAMILY[name].config)}
    assert {*FAMILY[name].readers, *FAMILY[name].unreadable} <= known
    assert len(set(FAMILY[name].unreadable)) == len(FAMILY[name].unreadable)


def test_the_family_is_listed_by_the_date_of_its_papers_and_by_the_names_of_its_files() -> None:
    assert list(FAMILY) == sorted(FAMILY, key=lambda name: FAMILY[name].published)
    for name, found in FAMILY.items():
        assert found.builder.__module__ == f"edgedetr.models.members.{name}" and found.builder.__name__ == name
        assert member(name) is found and isinstance(found, Member)


def test_a_built_model_knows_its_member() -> None:
    assert forms("detr")[0].member is FAMILY["detr"]


def test_a_member_refuses_the_configuration_of_another() -> None:
    with pytest.raises(ModelError, match="detr takes a DetrConfig; got RtDetrConfig"):
        build("detr", FAMILY["rt_detr"].config(), 3)


def test_a_role_that_no_policy_knows_is_refused_where_it_is_declared() -> None:
    with pytest.raises(ModelError, match="a role of detr is 'decodr'; expected one of .*did you mean 'decoder'"):
        replace(FAMILY["detr"], roles={"decoder.*": "decodr"})
