"""Fingerprints of functions: a hash of the syntax tree, equal for functions with the same code.

Models of transformers are generated from one another, so that the same lines are in a hundred files. By its fingerprint
a class is recognized under any name, and no longer once its code has changed.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

_SILENT = {"annotation", "returns", "decorator_list", "ctx", "kind", "type_comment", "type_params"}


def fingerprint(function: Callable[..., Any]) -> str | None:
    """Return 16 hexadecimal digits for the code of a function, or None if its source cannot be read.

    Name, annotations, decorators, comments and docstrings do not count; names of arguments do.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    except (OSError, TypeError, SyntaxError):  # built in, or from a notebook
        return None
    return digest(tree.body[0])


def digest(node: ast.AST) -> str:
    """Return the fingerprint of a function's syntax tree."""
    return hashlib.sha256(_code(node, outermost=True).encode()).hexdigest()[:16]


def _code(node: Any, *, outermost: bool = False) -> str:
    """A syntax tree as a text that does not depend on the version of Python."""
    if isinstance(node, list):
        return "[" + ",".join(map(_code, node)) + "]"
    if isinstance(node, ast.AnnAssign) and node.value is not None:
        node = ast.Assign([node.target], node.value)
    if not isinstance(node, ast.AST):
        return repr(node)
    parts = []
    for name, value in ast.iter_fields(node):
        if name in _SILENT or (outermost and name == "name") or value is None or value == []:
            continue
        has_docstring = name == "body" and isinstance(value, list) and _is_text(value[0])
        parts.append(f"{name}={_code(value[1:] if has_docstring else value)}")
    return f"{type(node).__name__}({','.join(parts)})"


def _is_text(statement: ast.AST) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )
