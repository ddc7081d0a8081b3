"""Changes that are known to help, each found by the shape of the code at a refusal's line."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator

from torch import nn

from cachefree.advice.change import Change
from cachefree.advice.code import Code, code_at, code_of
from cachefree.errors import CacheFreeError, CacheNotFoundError, Refusal

__all__ = ["changes_for"]


def changes_for(
    model: nn.Module, error: CacheFreeError, growing_axes: frozenset[int] = frozenset()
) -> tuple[Change, ...]:
    """The changes that are known for an error, the smallest first.

    Args:
        model: The model that was refused.
        error: The refusals.
        growing_axes: The axes on which the cache's tensors grow, where they were found.
    """
    found = [
        change
        for refusal in error.refusals
        for change in (_evaluation(model, refusal), *_at_its_lines(refusal))
        if change is not None
    ]
    forward = code_of(type(model).forward)
    if forward is not None and isinstance(error, CacheNotFoundError):
        found += _returned_cache(forward)
    if forward is not None and len(growing_axes) == 1:
        found += _length_of_another_axis(model, next(iter(growing_axes)))
    return tuple(dict.fromkeys(found))


def _evaluation(model: nn.Module, refusal: Refusal) -> Change | None:
    """``model.eval()``: dropout and batch statistics belong to training."""
    if not model.training or "random numbers" not in refusal.what:
        return None
    if refusal.where is not None and _undropped(refusal) is not None:
        return None
    return Change(
        "Dropout is switched off in evaluation mode.",
        "",
        1,
        ("cachefree.rewrite(model)",),
        ("cachefree.rewrite(model.eval())",),
    )


def _at_its_lines(refusal: Refusal) -> Iterator[Change | None]:
    for where in (refusal.where, *refusal.also):
        code = code_at(where)
        if code is None or where is None:
            continue
        for known in _KNOWN:
            yield from known(code, where.line, refusal)


def _undropped(refusal: Refusal) -> Change | None:
    code = code_at(refusal.where)
    if code is None or refusal.where is None:
        return None
    return next(_functional_dropout(code, refusal.where.line, refusal), None)


def _functional_dropout(code: Code, line: int, refusal: Refusal) -> Iterator[Change]:
    """``F.dropout(x, p)`` drops in evaluation mode too."""
    if "dropout" not in refusal.what:
        return
    for call in code.walk(ast.Call):
        name = call.func.attr if isinstance(call.func, ast.Attribute) else ""
        told = {word.arg for word in call.keywords}
        is_there = call.lineno <= line <= (call.end_lineno or line)
        if is_there and name == "dropout" and "training" not in told and len(call.args) < 3:
            if code.text(call.func).startswith("self."):
                continue
            inner = ", ".join(map(code.text, (*call.args, *call.keywords)))
            text = f"{code.text(call.func)}({inner}, training=self.training)"
            yield from _some(
                code.replaced(call, text, "A function knows of no mode unless it is told.")
            )


def _path_of_one_token(code: Code, line: int, refusal: Refusal) -> Iterator[Change]:
    """``if x.shape[1] == 1:`` with another computation inside."""
    if "general path" not in refusal.what:
        return
    for branch in code.walk(ast.If):
        if branch.test.lineno <= line <= (branch.test.end_lineno or line) and _asks_for_one(
            branch.test
        ):
            yield code.removed(
                branch,
                "One token goes the way of several: the branch that tells them apart goes.",
                tuple(branch.orelse),
            )


def _asks_for_one(test: ast.expr) -> bool:
    return (
        isinstance(test, ast.Compare)
        and len(test.ops) == 1
        and isinstance(test.ops[0], ast.Eq)
        and any(isinstance(n, ast.Constant) and n.value == 1 for n in test.comparators)
        and any(word in ast.unparse(test.left) for word in ("shape", "size(", "len(", "numel"))
    )


def _number_of_a_tensor(code: Code, line: int, refusal: Refusal) -> Iterator[Change]:
    """``.item()``: a length becomes the size of what is given, a factor stays a tensor."""
    if "values of a tensor" not in refusal.what:
        return
    for call in code.walk(ast.Call):
        if not (call.lineno <= line <= (call.end_lineno or line) and _is_item(call)):
            continue
        statement = _statement(code, call)
        name = _only_name(statement)
        cut = _cut_by(code, name) if name else None
        if cut is not None and isinstance(statement, ast.Assign):
            tensor, axis = cut
            yield from _some(
                code.replaced(
                    statement.value,
                    f"{tensor}.shape[{axis}]",
                    "A length is read from a shape, not from values. Padding is then cut by the "
                    "caller, or masked.",
                )
            )
        elif not name or not _is_size(code, name):
            inner = call.func.value
            yield from _some(
                code.replaced(
                    _outermost_number(statement, call),
                    code.text(inner),
                    "The number stays a tensor of no axes: arithmetic takes it as it is.",
                )
            )


def _is_item(call: ast.Call) -> bool:
    return isinstance(call.func, ast.Attribute) and call.func.attr == "item" and not call.args


def _outermost_number(statement: ast.stmt, item: ast.Call) -> ast.Call:
    """``float(x.item())`` for ``x.item()``."""
    for call in ast.walk(statement):
        if (
            isinstance(call, ast.Call)
            and isinstance(call.func, ast.Name)
            and call.func.id in ("float", "int")
            and call.args == [item]
        ):
            return call
    return item


def _statement(code: Code, node: ast.expr) -> ast.stmt:
    found: list[ast.stmt] = [
        statement
        for statement in code.walk(ast.stmt)
        if statement.lineno <= node.lineno and (statement.end_lineno or 0) >= (node.end_lineno or 0)
    ]
    return found[-1]


def _only_name(statement: ast.stmt) -> str | None:
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
        target = statement.targets[0]
        return target.id if isinstance(target, ast.Name) else None
    return None


def _cut_by(code: Code, name: str) -> tuple[str, int] | None:
    """The tensor and the axis of ``x[:, :name]``."""
    for cut in code.walk(ast.Subscript):
        parts = cut.slice.elts if isinstance(cut.slice, ast.Tuple) else [cut.slice]
        for axis, part in enumerate(parts):
            if (
                isinstance(part, ast.Slice)
                and isinstance(part.upper, ast.Name)
                and part.upper.id == name
                and isinstance(cut.value, ast.Name)
            ):
                return cut.value.id, axis
    return None


def _is_size(code: Code, name: str) -> bool:
    """Whether a name is used where a size has to stand."""
    return any(
        isinstance(inner, ast.Name) and inner.id == name
        for node in code.walk((ast.Slice, ast.If, ast.While, ast.For))
        for inner in ast.walk(node.test if isinstance(node, (ast.If, ast.While)) else node)
    )


def _write_in_place(code: Code, line: int, refusal: Refusal) -> Iterator[Change]:
    """``x.mul_(y)`` and ``x += y``."""
    if "in place" not in refusal.what:
        return
    why = "A new tensor takes the place of the one that was written to."
    for statement in code.walk((ast.Expr, ast.AugAssign)):
        if not statement.lineno <= line <= (statement.end_lineno or line):
            continue
        if isinstance(statement, ast.AugAssign) and isinstance(statement.target, ast.Name):
            added = ast.BinOp(statement.target, statement.op, statement.value)
            text = f"{statement.target.id} = {code.text(added)}"
            yield from _some(code.replaced(statement, text, why))
        elif isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
            function = statement.value.func
            if (
                isinstance(function, ast.Attribute)
                and isinstance(function.value, ast.Name)
                and function.attr.endswith("_")
                and not function.attr.startswith("_")
            ):
                given = ", ".join(
                    map(code.text, (*statement.value.args, *statement.value.keywords))
                )
                own = function.value.id
                text = f"{own} = {own}.{function.attr.rstrip('_')}({given})"
                yield from _some(code.replaced(statement, text, why))


def _last_row_of_the_first_call(code: Code, line: int, refusal: Refusal) -> Iterator[Change]:
    """``if past is None: y = y[:, -1:]``."""
    if "compute different things" not in refusal.what:
        return
    for branch in code.walk(ast.If):
        if not branch.lineno <= line <= (branch.end_lineno or line) or branch.orelse:
            continue
        if (
            len(branch.body) == 1
            and _is_none_test(branch.test)
            and "-1:" in code.text(branch.body[0])
        ):
            yield code.removed(
                branch,
                "The last row is cut on every call: a call with one token is left as it is.",
                tuple(branch.body),
            )


def _is_none_test(test: ast.expr) -> bool:
    return (
        isinstance(test, ast.Compare)
        and isinstance(test.ops[0], ast.Is)
        and isinstance(test.comparators[0], ast.Constant)
        and test.comparators[0].value is None
    )


def _returned_cache(forward: Code) -> list[Change]:
    """A forward that joins a past and does not return it."""
    joined: list[str] = []
    for call in forward.walk(ast.Assign):
        targets = call.targets[0].elts if isinstance(call.targets[0], ast.Tuple) else call.targets
        values = call.value.elts if isinstance(call.value, ast.Tuple) else [call.value]
        for target, value in zip(targets, values, strict=False):
            if isinstance(target, ast.Name) and _joins_a_parameter(forward, value):
                joined.append(target.id)
    returns = [node for node in forward.walk(ast.Return) if node.value is not None]
    if not joined or len(returns) != 1:
        return []
    (end,) = returns
    told = forward.text(end.value)
    if isinstance(end.value, (ast.Tuple, ast.List, ast.Dict)):
        return []
    cache = joined[0] if len(joined) == 1 else f"({', '.join(dict.fromkeys(joined))})"
    change = forward.replaced(
        end, f"return {told}, {cache}", "What a later call takes has to come back from the first."
    )
    return [change] if change is not None else []


def _joins_a_parameter(code: Code, value: ast.expr) -> bool:
    """Whether an expression is ``torch.cat([past…, …])``, perhaps with a condition around it."""
    own = set(code.parameters[1:])
    return any(
        isinstance(call, ast.Call)
        and ast.unparse(call.func).endswith(("cat", "concat"))
        and bool(call.args)
        and any(isinstance(n, ast.Name) and n.id in own for n in ast.walk(call.args[0]))
        for call in ast.walk(value)
    )


def _length_of_another_axis(model: nn.Module, axis: int) -> Iterator[Change]:
    """``past[0].shape[2]`` where the cache grows on another axis."""
    for module_type in dict.fromkeys(type(module) for module in model.modules()):
        code = code_of(module_type.forward)
        if code is None or module_type.__module__.startswith("torch."):
            continue
        for part in code.walk(ast.Subscript):
            if (
                isinstance(part.value, ast.Attribute)
                and part.value.attr == "shape"
                and isinstance(part.slice, ast.Constant)
                and isinstance(part.slice.value, int)
                and part.slice.value not in (axis, 0)
                and _is_of_the_past(code, part.value.value)
            ):
                yield from _some(
                    code.replaced(
                        part,
                        f"{code.text(part.value)}[{axis}]",
                        f"The cache grows on axis {axis}: that is where its length is.",
                    )
                )


def _is_of_the_past(code: Code, node: ast.expr) -> bool:
    while isinstance(node, ast.Subscript):
        node = node.value
    return isinstance(node, ast.Name) and node.id in code.parameters[1:] and "past" in node.id


def _some(change: Change | None) -> Iterator[Change]:
    if change is not None:
        yield change


_KNOWN: tuple[Callable[[Code, int, Refusal], Iterator[Change]], ...] = (
    _functional_dropout,
    _path_of_one_token,
    _number_of_a_tensor,
    _write_in_place,
    _last_row_of_the_first_call,
)
