"""What shapes the matrices of a type's layers have, from the text of transformers' classes: no class is imported.

A class makes its layers in `__init__`, nearly always by sums and products of what config.json says. Those are
computed; whatever is more (a loop, a function, another file's class) is unknown, and of what is unknown nothing is
said.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from glmchat.checkpoints.spec import Shape
from glmchat.checkpoints.transformers_text import classes_in, fields_of, module_of, settings_class, settings_classes

_UNKNOWN: Any = object()
_MOST_REPEATED = 100_000
_BASE = ("PreTrainedConfig", "PretrainedConfig")  # of all classes of settings; it adds no measures
_TABLE: Mapping[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod,
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt,
    ast.GtE: operator.ge, ast.Is: operator.is_, ast.IsNot: operator.is_not,
    ast.In: lambda one, all_: one in all_, ast.NotIn: lambda one, all_: one not in all_,
}  # fmt: skip
_FUNCTIONS: Mapping[str, Callable[..., Any]] = {"int": int, "max": max, "min": min, "abs": abs, "len": len}
# Layer -> its first arguments by name, and whether its matrix is [second, first].
_LAYERS = {
    "nn.Linear": (("in_features", "out_features"), True),
    "nn.Embedding": (("num_embeddings", "embedding_dim"), False),
    "Conv1D": (("nf", "nx"), True),
}


@dataclass(frozen=True, slots=True)
class LayerShapes:
    """Of layers and lists of layers by their attribute's name; nothing of a name of which not everything is known.

    matrices: each shape that a layer of this name may have, as files hold it. counts: of a list, how many layers.
    across: names of layers that hold [in, out].
    """

    matrices: Mapping[str, frozenset[Shape]] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)
    across: frozenset[str] = frozenset()


class _Record(dict[str, Any]):
    """The attributes of an object."""


def layer_shapes(config: Mapping[str, Any]) -> LayerShapes:
    """Of a config.json's type with its measures; nothing for a type that transformers has no file of."""
    kind = str(config.get("model_type"))
    settings = _settings(kind, config)
    if settings is None:
        return LayerShapes()
    module = module_of(kind)
    classes = classes_in(f"models/{module}/modeling_{module}.py")
    found: dict[str, set[Any]] = {}
    counts: dict[str, set[Any]] = {}
    across: set[str] = set()
    for made in classes.values():
        start = next((f for f in made.body if isinstance(f, ast.FunctionDef) and f.name == "__init__"), None)
        if start is not None and not _is_of_another(start, settings_class(kind)):
            reader = _Reader(classes, found, counts, across)
            reader.run(start.body, _arguments(start, settings, settings_class(kind)))
    return LayerShapes(
        {name: frozenset(shapes) for name, shapes in found.items() if _UNKNOWN not in shapes},
        {name: min(numbers) for name, numbers in counts.items() if _UNKNOWN not in numbers},
        frozenset(across),
    )


def _settings(kind: str, config: Mapping[str, Any]) -> _Record | None:
    """What the class of settings makes of a config.json; None where another file has a part in it."""
    classes = settings_classes(kind)
    names = {made.name for made in classes} | set(_BASE)
    if not classes or any(_name(base) not in names for made in classes for base in made.bases):
        return None
    other: dict[str, str] = {}  # a general name -> the type's own
    for made in reversed(classes):
        for line in made.body:
            if isinstance(line, ast.Assign) and [_name(target) for target in line.targets] == ["attribute_map"]:
                other |= {str(key): str(value) for key, value in _literal(line.value, {}).items()}
    fields = fields_of(kind)
    own = _Record({name: known.default for name, known in fields.items()})
    own |= {other.get(name, name): value for name, value in config.items()}
    for made in classes:
        after = next((f for f in made.body if isinstance(f, ast.FunctionDef) and f.name == "__post_init__"), None)
        if after is not None:
            more = _Record({key: value for key, value in config.items() if key not in fields})
            _Reader({}, {}, {}, set()).run(after.body, _Record(self=own, kwargs=more))
            own |= more  # set last, by the base of all
    for name, value in other.items():
        own.setdefault(name, own.get(value, _UNKNOWN))
    return own


def _literal(node: ast.expr, default: Any) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        return default


def _arguments(start: ast.FunctionDef, settings: _Record, name: str | None) -> _Record:
    """The names that `__init__` begins with; a configuration of another class is unknown."""
    known = _Record(self=_Record())
    for argument in start.args.args[1:]:
        is_ours = argument.arg == "config" and (argument.annotation is None or _name(argument.annotation) == name)
        known[argument.arg] = _Record(settings) if is_ours else _UNKNOWN  # a class may change what it is given
    return known


def _is_of_another(start: ast.FunctionDef, name: str | None) -> bool:
    """Whether a class takes the settings of another type, as what also sees does: it is no part of this network."""
    named = [_name(a.annotation) for a in start.args.args if a.arg == "config" and a.annotation is not None]
    return bool(named) and named[0] != name and named[0].endswith("Config") and named[0] not in _BASE


def _name(node: ast.AST) -> str:
    return ast.unparse(node)


class _Reader:
    """The statements of a function followed on plain values."""

    def __init__(
        self,
        classes: Mapping[str, ast.ClassDef],
        found: dict[str, set[Any]],
        counts: dict[str, set[Any]],
        across: set[str],
    ) -> None:
        self._classes, self._found, self._counts, self._across = classes, found, counts, across

    def run(self, lines: Sequence[ast.stmt], names: _Record) -> bool:
        """False where a line leaves the function."""
        return all(self._line(line, names) for line in lines)

    def _line(self, line: ast.stmt, names: _Record) -> bool:
        match line:
            case ast.Assign(targets=targets, value=value):
                for target in targets:
                    self._assign(target, value, names)
            case ast.AnnAssign(target=target, value=ast.expr() as value):
                self._assign(target, value, names)
            case ast.Return() | ast.Raise():
                return False
            case ast.If(test=test, body=body, orelse=orelse):
                return self._branch(test, body, orelse, names)
            case ast.For() | ast.While() | ast.With() | ast.Try() | ast.AugAssign():
                _forget(line, names)
                for part in ast.iter_child_nodes(line):
                    if isinstance(part, ast.stmt):
                        self._line(part, names)
                _forget(line, names)
        return True

    def _branch(self, test: ast.expr, body: list[ast.stmt], orelse: list[ast.stmt], names: _Record) -> bool:
        said = self._value(test, names)
        if said is not _UNKNOWN:
            return self.run(body if said else orelse, names)
        for part in (body, orelse):
            self.run(part, _copy(names))
        for line in (*body, *orelse):
            _forget(line, names)
        return True

    def _assign(self, target: ast.expr, value: ast.expr, names: _Record) -> None:
        if isinstance(target, ast.Name):
            names[target.id] = self._value(value, names)
        elif isinstance(target, ast.Attribute):
            holder = self._value(target.value, names)
            if isinstance(holder, _Record):
                holder[target.attr] = self._value(value, names)
            if _name(target.value) == "self":
                self._made(target.attr, value, names)
        else:
            _forget(target, names)

    # what is made ---------------------------------------------------------------------------------------------------

    def _made(self, attribute: str, value: ast.expr, names: _Record) -> None:
        if isinstance(value, ast.IfExp):
            said = self._value(value.test, names)
            for part in (value.body, value.orelse) if said is _UNKNOWN else (value.body if said else value.orelse,):
                self._made(attribute, part, names)
        if not isinstance(value, ast.Call):
            return
        if _name(value.func) == "nn.ModuleList":
            self._counts.setdefault(attribute, set()).add(self._count(value, names))
            return
        kind = self._kind(_name(value.func))
        if kind is None:
            self._found.setdefault(attribute, set()).add(_UNKNOWN)
            return
        words, turned = _LAYERS[kind]
        given = dict(zip(words, value.args, strict=False)) | {word.arg: word.value for word in value.keywords}
        sizes = [self._value(given[word], names) if word in given else _UNKNOWN for word in words]
        known = all(isinstance(size, int) and not isinstance(size, bool) for size in sizes)
        shape = tuple(reversed(sizes)) if turned else tuple(sizes)
        self._found.setdefault(attribute, set()).add(shape if known else _UNKNOWN)
        if kind == "Conv1D":
            self._across.add(attribute)

    def _kind(self, name: str) -> str | None:
        """The layer of torch that a class is, if it makes it of its own first arguments."""
        if name in _LAYERS:
            return name
        made = self._classes.get(name)
        base = _name(made.bases[0]) if made is not None and made.bases else ""
        if made is None or base not in _LAYERS:
            return None
        start = next((f for f in made.body if isinstance(f, ast.FunctionDef) and f.name == "__init__"), None)
        if start is None:
            return base
        first = start.body[0].value if start.body and isinstance(start.body[0], ast.Expr) else None
        passed = [_name(part) for part in first.args[:2]] if isinstance(first, ast.Call) else []
        return base if passed == [part.arg for part in start.args.args[1:3]] else None

    def _count(self, call: ast.Call, names: _Record) -> Any:
        """How many layers `nn.ModuleList([… for … in range(count)])` holds."""
        match call.args:
            case [ast.ListComp(generators=[ast.comprehension(iter=ast.Call(func=ast.Name(id="range"), args=[count]),
                                                             ifs=[])])]:  # fmt: skip
                said = self._value(count, names)
                return said if isinstance(said, int) else _UNKNOWN
        return _UNKNOWN

    # values ---------------------------------------------------------------------------------------------------------

    def _value(self, node: ast.expr, names: _Record) -> Any:
        value = partial(self._value, names=names)
        match node:
            case ast.Constant(value=said):
                return said
            case ast.Name(id=name):
                return names.get(name, _UNKNOWN)
            case ast.Attribute(value=holder, attr=name):
                found = value(holder)
                return found.get(name, _UNKNOWN) if isinstance(found, _Record) else _UNKNOWN
            case ast.List(elts=parts) | ast.Tuple(elts=parts):
                values = [value(part) for part in parts]
                return _UNKNOWN if _UNKNOWN in values else values
            case ast.BinOp(left=left, op=op, right=right) | ast.Compare(left=left, ops=[op], comparators=[right]):
                return _apply(_TABLE.get(type(op)), value(left), value(right))
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return _apply(operator.not_, value(operand))
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return _apply(operator.neg, value(operand))
            case ast.BoolOp(op=op, values=parts):
                for part in parts:
                    said = value(part)
                    if said is _UNKNOWN or bool(said) is isinstance(op, ast.Or):
                        return said
                return said
            case ast.IfExp(test=test, body=body, orelse=orelse):
                said = value(test)
                return _UNKNOWN if said is _UNKNOWN else value(body if said else orelse)
            case ast.Call(func=ast.Name(id="getattr"), args=[holder, ast.Constant(value=str(name)), *default]):
                return self._attribute(value(holder), name, default, names)
            case ast.Call(
                func=ast.Attribute(value=holder, attr="pop" | "get"), args=[ast.Constant(value=str(name)), *default]
            ):
                return self._attribute(value(holder), name, default, names)
            case ast.Call(func=ast.Name(id=name), args=parts, keywords=[]) if name in _FUNCTIONS:
                return _apply(_FUNCTIONS[name], *(value(part) for part in parts))
        return _UNKNOWN

    def _attribute(self, holder: Any, name: str, default: Sequence[ast.expr], names: _Record) -> Any:
        if not isinstance(holder, _Record) or (name not in holder and (not default or holder is names["self"])):
            return _UNKNOWN
        return holder[name] if name in holder else self._value(default[0], names)


def _apply(function: Callable[..., Any] | None, *values: Any) -> Any:
    if function is None or _UNKNOWN in values or any(isinstance(value, _Record) for value in values):
        return _UNKNOWN
    is_long = any(isinstance(value, int) and value > _MOST_REPEATED for value in values)
    if any(isinstance(value, str | list) for value in values) and (
        function is operator.mod or (function is operator.mul and is_long)
    ):
        return _UNKNOWN  # a text or a list that a number of config.json would make as long as it likes
    try:
        return function(*values)
    except (TypeError, ValueError, ArithmeticError):
        return _UNKNOWN


def _copy(names: _Record) -> _Record:
    return _Record({name: _Record(value) if isinstance(value, _Record) else value for name, value in names.items()})


def _forget(node: ast.AST, names: _Record) -> None:
    """Everything that is assigned anywhere in a statement is unknown from here on."""
    for part in ast.walk(node):
        if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
            names[part.id] = _UNKNOWN
        elif isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store):
            holder = names.get(_name(part.value))
            if isinstance(holder, _Record):
                holder[part.attr] = _UNKNOWN
