"""Which names of TensorRT a source file uses, found without running it, and whether a version has them.

`trt` is the module in every file. What a variable holds follows from what it is assigned: `builder = trt.Builder(...)`
makes an instance, and a method's result is what NVIDIA's docstring says that it returns. One name means one thing in a
file, so a parameter `config` is what another function of that file assigns to `config`.
"""

from __future__ import annotations

import ast
import inspect
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

ROOT = "trt"
RENAMED = {"IParserError": "ParserError"}  # as docstrings call it -> as the module does


@dataclass(frozen=True)
class Use:
    """One use: `path` of a class or module member, what is asked of it, and for a call its arguments.

    owner      "" for trt itself, "Builder" for an instance of it, "ILogger.Severity" for a class
    arguments  (number of positional ones, names of the others); None where it is no call
    """

    owner: str
    name: str
    line: int
    instance: bool
    arguments: tuple[int, tuple[str, ...]] | None = None

    def __str__(self) -> str:
        return f"{ROOT}.{self.owner + '.' if self.owner else ''}{self.name}"


def uses(source: str, versions: Mapping[str, Mapping[str, Any]], given: Mapping[str, str] | None = None) -> list[Use]:
    """Every use of TensorRT in a source text.

    versions   bindings.described(): for what methods return
    given      variable -> class, for objects that are made in another file
    """
    return list(_Reader(ast.parse(source), versions, given or {}).uses())


def missing(use: Use, described: Mapping[str, Any]) -> str:
    """Why this version does not have what is used, or nothing."""
    description = _find(use.owner, use.name, described)
    if description is None:
        return f"line {use.line}: {use} does not exist"
    forms = description.get("parameters") if description["kind"] == "method" else None
    if use.arguments is None or not forms:
        return ""
    number, keywords = use.arguments
    for form in forms:
        signature = inspect.Signature(
            [
                inspect.Parameter(word.partition("=")[0], inspect.Parameter.POSITIONAL_OR_KEYWORD)
                for word in form
                if "=" not in word
            ]
            + [
                inspect.Parameter(word.partition("=")[0], inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None)
                for word in form
                if "=" in word
            ]
        )
        try:
            signature.bind(*[None] * (number + use.instance), **dict.fromkeys(keywords))
            return ""
        except TypeError as error:
            reason = str(error)
    return f"line {use.line}: {use}: {reason}"


def _find(owner: str, name: str, described: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The description of a member, its own or inherited."""
    if not owner:
        return described.get(name)
    kind: Any = {"members": described, "bases": []}
    for part in owner.split("."):
        kind = kind["members"].get(part)
        if kind is None:
            return None
    if kind["kind"] == "enum":
        return {"kind": "member"} if name in kind["members"] or name in ("name", "value") else None
    if name in kind["members"]:
        found = kind["members"][name]
        return found if isinstance(found, dict) else {"kind": "member"}
    if any(name in nested["members"] for nested in kind["members"].values() if nested["kind"] == "enum"):
        return {"kind": "member"}  # pybind11 exports the values of a nested enum
    return next((found for base in kind["bases"] if (found := _find(base, name, described)) is not None), None)


class _Reader:
    """What every variable of one file holds, and the uses that follow. A type is (class path, whether an instance)."""

    def __init__(self, tree: ast.AST, versions: Mapping[str, Mapping[str, Any]], given: Mapping[str, str]) -> None:
        self.tree, self.versions = tree, versions
        self.holds: dict[str, set[tuple[str, bool]]] = defaultdict(set)
        self.holds.update({name: {(owner, True)} for name, owner in given.items()})
        before = -1
        while before != (before := sum(map(len, self.holds.values()))):
            for node in ast.walk(tree):
                for target, value in _assignments(node):
                    name = target.id if isinstance(target, ast.Name) else getattr(target, "attr", "")
                    if name and value is not None:
                        self.holds[name] |= self.types(value)

    def types(self, node: ast.expr) -> set[tuple[str, bool]]:
        if isinstance(node, ast.Name):
            return {("", False)} if node.id == ROOT else self.holds.get(node.id, set())
        if isinstance(node, ast.IfExp):
            return self.types(node.body) | self.types(node.orelse)
        if isinstance(node, ast.Attribute):
            found = set(self.holds.get(node.attr, set()))
            for owner, instance in self.types(node.value):
                path = f"{owner}.{node.attr}" if owner else node.attr
                if not instance and self._is_class(path):
                    found.add((path, False))
            return found
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            found = {(path, True) for path, instance in self.types(node.func) if path and not instance}
            for owner, _ in self.types(node.func.value):
                for described in self.versions.values():
                    description = _find(owner, node.func.attr, described) or {}
                    returned = RENAMED.get(description.get("returns", ""), description.get("returns", ""))
                    if returned in described:
                        found.add((returned, True))
            return found
        return set()

    def _is_class(self, path: str) -> bool:
        outer, _, inner = path.rpartition(".")
        return any(
            (_find(outer, inner, described) or {}).get("kind") in ("class", "enum")
            for described in self.versions.values()
        )

    def uses(self) -> Iterator[Use]:
        calls = {id(node.func): node for node in ast.walk(self.tree) if isinstance(node, ast.Call)}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Attribute):
                call = calls.get(id(node))
                starred = call is not None and (
                    any(isinstance(a, ast.Starred) for a in call.args) or any(k.arg is None for k in call.keywords)
                )
                arguments = (
                    None if call is None or starred else (len(call.args), tuple(k.arg for k in call.keywords if k.arg))
                )
                for owner, instance in self.types(node.value):
                    yield Use(owner, node.attr, node.lineno, instance, arguments)
            elif isinstance(node, ast.ClassDef):
                # A public method of a class that TensorRT calls must be one that it knows.
                for base in node.bases:
                    for owner, _ in self.types(base):
                        yield from (
                            Use(owner, item.name, item.lineno, False)
                            for item in node.body
                            if isinstance(item, ast.FunctionDef) and not item.name.startswith("_")
                        )


def _assignments(node: ast.AST) -> Iterator[tuple[ast.expr, ast.expr | None]]:
    if isinstance(node, ast.Assign):
        for target in node.targets:
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                yield from zip(target.elts, node.value.elts)
            else:
                yield target, node.value
    elif isinstance(node, (ast.AnnAssign, ast.NamedExpr)):
        yield node.target, node.value
