"""The role of a node: what its layer is for in the detector ("decoder", "query_selection", "memory_projection", ...).

`edgedetr export` writes the role that the member declares (edgedetr/models/member.py lists the words) into the node's
metadata in model.onnx, and `edgedetr import` writes the role that it infers from the graph. Policies decide by roles,
so they hold for every member, whatever its modules are called.
"""

from __future__ import annotations

from fnmatch import fnmatchcase

from onnx import ModelProto, NodeProto

KEY = "edgedetr.role"  # in NodeProto.metadata_props

# Versions 0.1 and 0.2 wrote no roles; their policy matched node names, which are module paths. The first pattern that
# fits decides. The table is for their files, and never grows: a new layer gets its role from the member's declaration.
ROLE_BY_NAME = {
    "*/cross_attention/value/*": "memory_projection",
    "*/cross_attention/k/*": "memory_projection",
    "*/cross_attention/v/*": "memory_projection",
    "*/interaction/weights/*": "dynamic_head",
    "*/interaction/out/*": "dynamic_head",
    "*/decoder/*": "decoder",
    "*/selector/project/*": "memory_projection",
    "*/selector/*": "query_selection",
    "*/encoder/*/offset*": "sampling_offsets",
    "*/encoder/*/activation/*": "dynamic_relu",
    "*/attention/offsets/*": "sampling_offsets",
    "*/attention/weights/*": "attention_weights",
}


def set_role(node: NodeProto, role: str) -> None:
    """Write a role into a node's metadata, in place of the one it may have; "" removes it."""
    kept = [item for item in node.metadata_props if item.key != KEY]
    del node.metadata_props[:]
    node.metadata_props.extend(kept)
    if role:
        node.metadata_props.add(key=KEY, value=role)


def get_role(node: NodeProto) -> str:
    """The role in a node's metadata; "" where it has none."""
    return next((item.value for item in node.metadata_props if item.key == KEY), "")


def role_from_name(name: str) -> str:
    """The role that follows from a node's name, as in files of versions 0.1 and 0.2; "" for a name without one."""
    return next((role for pattern, role in ROLE_BY_NAME.items() if fnmatchcase(name, pattern)), "")


def node_roles(model: ModelProto) -> dict[str, str]:
    """{node name: role} of the nodes that have a role.

    Read from the metadata; in a graph without any role, which 0.1 or 0.2 wrote, derived from the names.
    """
    roles = {node.name: role for node in model.graph.node if (role := get_role(node))}
    if not roles:
        roles = {node.name: role for node in model.graph.node if (role := role_from_name(node.name))}
    return roles
