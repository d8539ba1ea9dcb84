"""Costs for TensorRT from the profile that `edgedetr build --profile` made on the device.

A layer goes to the groups whose ONNX nodes it stands for, a reformat to those of the layer that it converts for. So
what a group's INT8 needs converted, at nodes that are in no group, is in the group's own cost. What two groups of
unequal precision need is a penalty between them, from the conversions that the INT8 engine has.
"""

from __future__ import annotations

import logging
import shlex
from collections.abc import Mapping, Sequence

from edgedetr.artifacts import FP16, INT8_PROFILED, PROFILE, TENSORRT
from edgedetr.bundle import Bundle
from edgedetr.errors import ExportError
from edgedetr.onnx_graph.index import GraphIndex
from edgedetr.quantization.groups import Group
from edgedetr.quantization.search.conversions import ConversionTime, edges_between, elements_of
from edgedetr.quantization.search.costs import Costs, GroupCost, Timed, group_costs, ungrouped_ms
from edgedetr.quantization.search.owners import PAIR, shares_of
from edgedetr.runtime.tensorrt.layer_profile import LayerProfile, LayerTime

log = logging.getLogger(__name__)

# Without a conversion in the engine: two bytes read and one written at 50 GB/s, a quarter to a half of an Orin's memory
# bus, and 5 microseconds for a kernel's start.
OTHERWISE = ConversionTime(0.005, 6e-8)
WITHOUT = f"remove {PROFILE.file}, to search without measured times"
FEWEST_FOUND = 0.5  # of the groups that have a layer in both engines: with fewer, the names cannot be relied on


def read_profile(bundle: Bundle) -> LayerProfile | None:
    """The bundle's profile; None where it has none.

    The file names its graphs by their digests, so it may be copied from the device alone.
    Errors: BundleError for a damaged file, ExportError for a profile of other graphs, with the command to run.
    """
    path = bundle.inside(PROFILE.file)
    if not path.is_file():
        return None
    profile = LayerProfile.load(path)
    for engine, name in ((profile.float, FP16.file), (profile.int8, INT8_PROFILED.file)):
        now = bundle.manifest.files[bundle.require(name).name].sha256
        if engine.onnx_sha256 != now:
            raise ExportError(
                f"{path}: measured on {device_of(profile)}, graph {engine.onnx[:80]} {engine.onnx_sha256:.8}; expected "
                f"{name} {now:.8}, which the bundle has; {profile_command(bundle)}; or {WITHOUT}"
            )
    return profile


def profile_command(bundle: Bundle) -> str:
    """What to run, and where, so that a search has measured times."""
    where = shlex.quote(str(bundle.path))
    return (
        f"copy {where} to the device, run there: {PROFILE.command.format(path=where)}, and copy {PROFILE.file} back "
        "into it"
    )


def device_of(profile: LayerProfile) -> str:
    """ "Orin with TensorRT 10.3.0"."""
    return f"{profile.device} with TensorRT {profile.tensorrt}"


def device_costs(
    graph: GraphIndex, groups: Sequence[Group], quantized: Mapping[str, Sequence[str]], profile: LayerProfile
) -> Costs:
    """The costs of all groups on the device of a profile; a group without a layer in both engines gains nothing.

    graph       the float graph with split convolutions
    quantized   {tensor that is quantized where every group is INT8: nodes that read it dequantized}

    Errors: ExportError where the layers do not name the nodes of this graph.
    """
    shares = shares_of(graph, groups)
    floats, integers = (
        [Timed(shares(layer.nodes), layer.ms, layer.error_ms) for layer in engine.layers]
        for engine in (profile.float, profile.int8)
    )
    costs = group_costs(groups, floats, integers)
    _require_found(costs, profile)
    seen = [layer for layer in profile.int8.layers if _converts(layer)]
    each = ConversionTime.fitted([(layer.elements, layer.ms) for layer in seen], OTHERWISE)
    # A tensor with a conversion of its own is converted where both of its sides are INT8, so no edge would save it.
    converted = {name for layer in seen for name in _tensors(layer)}
    return Costs(
        TENSORRT,
        f"a profile of {device_of(profile)}, {profile.runs} runs of each engine in turns",
        True,
        costs,
        edges_between(graph, groups, quantized, lambda tensor: each.of(elements_of(graph, tensor)), converted),
        profile.float.ms,
        ungrouped_ms(floats),
        profile.float.reformat_ms,
        profile.int8.reformat_ms,
    )


def _require_found(costs: dict[str, GroupCost], profile: LayerProfile) -> None:
    """Groups without a layer in one of the engines gain nothing. Errors: ExportError where those are most groups."""
    missing = [name for name, cost in costs.items() if not (cost.float_ms > 0 and cost.int8_ms > 0)]
    if len(missing) > (1 - FEWEST_FOUND) * len(costs):
        raise ExportError(
            f"{PROFILE.file}: of {len(costs)} groups of layers, {len(costs) - len(missing)} are named by layers of "
            f"both engines of {device_of(profile)}; expected at least half, so that their times are known; update "
            f"TensorRT, or {WITHOUT}"
        )
    if missing:
        log.warning(
            "%d of %d groups have no layer of their own in the engines of %s, so they stay float: %s",
            len(missing),
            len(costs),
            device_of(profile),
            ", ".join(missing[:3]),
        )
    for name in missing:
        costs[name] = GroupCost(costs[name].float_ms, costs[name].float_ms, costs[name].sigma_ms)


def _converts(layer: LayerTime) -> bool:
    """Whether a layer only converts a tensor to integers or back: a reformat, or Q and DQ nodes on their own."""
    if layer.reformats:
        return "int8" in (layer.source, layer.target) and layer.source != layer.target
    return bool(layer.nodes) and all(node.endswith(PAIR) for node in layer.nodes)


def _tensors(layer: LayerTime) -> list[str]:
    """The tensors that a conversion converts; the nodes of a reformat are those of another layer."""
    if layer.reformats:
        return [layer.tensor]
    return [node.removesuffix(PAIR[0]).removesuffix(PAIR[1]) for node in layer.nodes]
