"""``$`` expressions of a config that is not trusted: worked out here, never handed to Python.

Arithmetic on constants and references, a few harmless functions, and the constants of numpy, torch and monai.
"""

from __future__ import annotations

import ast
import operator
import os.path
from collections.abc import Callable, Mapping
from enum import Enum
from functools import partial
from typing import Any

import monai.utils
import numpy as np
import torch
from monai.bundle.reference_resolver import ReferenceResolver
from torch import nn

from ima_seg.monai.configfile import DEEPEST, Refused, shown

#: Characters of an expression, items of what comes out of it, bits of a number, and the largest exponent.
_LONGEST, _MOST, _MOST_BITS, _LARGEST = 1_000, 2_000, 1_024, 64
#: Stands for an ``@reference`` in what is parsed.
_REFERENCE = "ima_seg_reference_"

_OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow,
    ast.Not: operator.not_, ast.USub: operator.neg, ast.UAdd: operator.pos,
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt,
    ast.GtE: operator.ge, ast.Is: operator.is_, ast.IsNot: operator.is_not,
    ast.In: lambda a, b: a in b, ast.NotIn: lambda a, b: a not in b,
}  # fmt: skip
_METHODS = ("eval", "float", "to")


def evaluate(text: str, reference: Callable[[str], Any], functions: Mapping[str, Callable[..., Any]]) -> Any:
    """The value of an expression, without its ``$``.

    Args:
        text: of the expression.
        reference: id -> the item of the config with this id.
        functions: those that it may call beside our own, by dotted name.

    Raises:
        Refused: it does anything else, or too much.
    """
    found: dict[str, str] = {}

    def name(match: Any) -> str:
        found[key := f"{_REFERENCE}{len(found)}"] = match.group()[1:]
        return key

    try:
        if len(text) > _LONGEST or _REFERENCE in text:
            raise ValueError
        tree = ast.parse(ReferenceResolver.id_matcher.sub(name, text).strip(), mode="eval").body
        level: list[ast.AST] = [tree]
        for _ in range(DEEPEST):
            level = [child for node in level for child in ast.iter_child_nodes(node)]
        if level:
            raise ValueError
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise Refused(_code(text)) from None
    return _Expression(text, {key: partial(reference, ids) for key, ids in found.items()}, functions).value(tree)


def _code(text: str) -> str:
    return f"would run code beyond the networks, transforms and inferers of monai and torch: {shown('$' + text)}"


class _Expression:
    def __init__(
        self, text: str, references: Mapping[str, Callable[[], Any]], functions: Mapping[str, Callable[..., Any]]
    ) -> None:
        self.text, self.references, self.functions = text, references, _FUNCTIONS | dict(functions)

    def value(self, node: ast.AST) -> Any:
        match node:
            case ast.Constant(value=value):
                # MONAI puts references into texts too, with quotes of its own.
                self.require(not (isinstance(value, str) and _REFERENCE in value))
                return value
            case ast.Name(id=name) if name in self.references:
                return self.references[name]()
            case ast.Attribute():
                return self.constant(ast.unparse(node))
            case ast.List(elts=items):
                return [self.value(item) for item in items]
            case ast.Tuple(elts=items):
                return tuple(self.value(item) for item in items)
            case ast.Dict(keys=keys, values=values) if None not in keys:
                return {self.value(key): self.value(item) for key, item in zip(keys, values, strict=True) if key}
            case ast.IfExp(test=test, body=body, orelse=other):
                return self.value(body if self.value(test) else other)
            case ast.BoolOp(op=op, values=values):
                result = None
                for item in values:
                    result = self.value(item)
                    if bool(result) == isinstance(op, ast.Or):
                        break
                return result
            case ast.UnaryOp(op=op, operand=operand) if type(op) in _OPERATORS:
                return self.operation(op, self.value(operand))
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
                return self.operation(op, self.value(left), self.value(right))
            case ast.Compare(left=left, ops=ops, comparators=others):
                values = [self.value(item) for item in (left, *others)]
                self.require(all(map(_is_flat, values)))
                return all(_OPERATORS[type(op)](*values[i : i + 2]) for i, op in enumerate(ops))
            case ast.Subscript(value=container, slice=index):
                whole = self.value(container)
                self.require(isinstance(whole, dict | list | tuple | str))
                return whole[self.value(index)]
            case ast.Slice(lower=lower, upper=upper, step=step):
                return slice(*(None if part is None else self.value(part) for part in (lower, upper, step)))
            case ast.Call(func=function, args=arguments, keywords=keywords):
                return self.call(function, arguments, keywords)
        raise self.refused()

    def refused(self) -> Refused:
        return Refused(_code(self.text))

    def require(self, fine: bool) -> None:
        if not fine:
            raise self.refused()

    def constant(self, name: str) -> Any:
        """A data type or number of numpy or torch, or a member of an enumeration of monai.utils."""
        *library, last = name.split(".")
        found: Any = None
        if library in (["np"], ["numpy"], ["torch"]):
            found = vars(torch if library == ["torch"] else np).get(last)
            fine = isinstance(found, torch.dtype | float) or (isinstance(found, type) and issubclass(found, np.generic))
        elif library[:2] == ["monai", "utils"] and len(library) == 3:
            kind = vars(monai.utils).get(library[2])
            fine = isinstance(kind, type) and issubclass(kind, Enum) and last in kind.__members__
            found = kind[last] if fine else None
        else:
            fine = False
        self.require(fine)
        return found

    def operation(self, op: ast.AST, *operands: Any) -> Any:
        """The result of an operator on numbers, texts, lists and tuples, if it cannot become large."""
        if isinstance(op, ast.Not):
            return not operands[0]
        self.require(all(isinstance(item, str | list | tuple) or _is_number(item) for item in operands))
        numbers = all(map(_is_number, operands))
        if isinstance(op, ast.Pow):
            self.require(numbers and abs(operands[0]) <= _MOST and abs(operands[1]) <= _LARGEST)
        elif not numbers:
            sizes = [item if isinstance(item, int) else len(item) for item in operands if not isinstance(item, float)]
            self.require(isinstance(op, ast.Add) or (isinstance(op, ast.Mult) and sizes[0] * sizes[-1] <= _MOST))
            self.require(sum(sizes) <= _MOST)
        return _OPERATORS[type(op)](*operands)

    def call(self, function: ast.expr, arguments: list[ast.expr], keywords: list[ast.keyword]) -> Any:
        name = ast.unparse(function)
        if isinstance(function, ast.Attribute) and name not in self.functions:
            owner = self.value(function.value) if function.attr in _METHODS else None
            self.require(isinstance(owner, nn.Module))
            called = getattr(owner, function.attr)
        else:
            self.require(name in self.functions)
            called = self.functions[name]
        named = {keyword.arg: self.value(keyword.value) for keyword in keywords if keyword.arg is not None}
        self.require(len(named) == len(keywords))
        return called(*map(self.value, arguments), **named)


def _is_flat(value: Any) -> bool:
    """Whether a value has no items with items of their own, which may repeat each other without end."""
    items = value if isinstance(value, list | tuple | dict) else ()
    return len(items) <= _MOST and not any(isinstance(item, list | tuple | dict) for item in items)


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or (isinstance(value, int) and value.bit_length() <= _MOST_BITS)


def _limited(function: Callable[..., Any], fine: Callable[..., bool]) -> Callable[..., Any]:
    """The function, where its arguments are ``fine``."""

    def called(*arguments: Any) -> Any:
        if not fine(*arguments):
            name = getattr(function, "__name__", "a function")
            raise Refused(f"would compute more than the config of a bundle needs, by {name}")
        return function(*arguments)

    return called


def _numbers(*arguments: Any) -> bool:
    return all(
        _is_number(x) for item in arguments for x in (item if isinstance(item, list | tuple | range) else [item])
    )


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "abs": abs, "bool": bool, "dict": dict, "float": float, "int": int, "len": len, "list": list, "tuple": tuple,
    "max": _limited(max, _numbers), "min": _limited(min, _numbers), "sum": _limited(sum, _numbers),
    "range": _limited(range, lambda *limits: len(range(*limits)) <= _MOST),
    "round": _limited(round, lambda _, digits=0: abs(digits or 0) <= _LARGEST),
    "str": _limited(str, _is_flat),
    "torch.cuda.is_available": torch.cuda.is_available, "torch.from_numpy": torch.from_numpy,
    "os.path.join": os.path.join,
}  # fmt: skip
