"""Each fault of the matrix has tests, and each of these tests is there."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest
from fault_matrix import HERE, MATRIX


@cache
def functions(path: Path) -> frozenset[str]:
    return frozenset(
        node.name
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    )


@pytest.mark.parametrize("fault", MATRIX)
def test_every_fault_is_injected_by_tests_that_exist(fault):
    for test in MATRIX[fault]:
        file, _, name = test.partition("::")
        assert functions(HERE / file) and (not name or name in functions(HERE / file)), test


def test_the_matrix_has_twenty_rows():
    assert len(MATRIX) == 20
