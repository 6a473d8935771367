"""Checkpoints in a template's syntax tree, where Jinja offers no hook of its own."""

from __future__ import annotations

from typing import Any, cast

from jinja2 import nodes
from jinja2.visitor import NodeTransformer


class Checkpoints(NodeTransformer):
    """Puts a checkpoint before every statement and around every expression that Jinja evaluates without a hook.

    They call `checkpoint`, `passing` and `joined` of the environment.
    """

    def generic_visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> nodes.Node:
        super().generic_visit(node, *args, **kwargs)
        for name in ("body", "else_"):
            body = getattr(node, name, None)
            if isinstance(body, list):
                setattr(node, name, [part for child in cast("list[nodes.Node]", body) for part in _checked(child)])
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        node.expr = _call("passing", node.expr)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            node.node = _call("passing", node.node)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _call("joined", nodes.List(node.nodes, lineno=node.lineno))

    def _visit_container(self, node: nodes.Expr) -> nodes.Node:
        self.generic_visit(node)
        return _call("passing", node) if getattr(node, "ctx", "load") == "load" else node

    visit_List = visit_Tuple = visit_Dict = _visit_container


def _call(name: str, *arguments: nodes.Expr) -> nodes.Call:
    line = arguments[0].lineno
    return nodes.Call(nodes.EnvironmentAttribute(name), list(arguments), [], None, None, lineno=line)


def _checked(statement: nodes.Node) -> list[nodes.Node]:
    characters = 0
    if isinstance(statement, nodes.Output):
        characters = sum(len(part.data) for part in statement.nodes if isinstance(part, nodes.TemplateData))
    tick = nodes.ExprStmt(
        _call("checkpoint", nodes.Const(characters, lineno=statement.lineno)), lineno=statement.lineno
    )
    return [tick, statement]
