"""Which line of the user's code, and which module, each node of a graph comes from."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from cachefree.errors import SourceLine
from cachefree.sizes import user_line

__all__ = ["LINE", "provenance"]

LINE = "cachefree_line"


@contextlib.contextmanager
def provenance(model: torch.nn.Module) -> Iterator[None]:
    """Writes the user's line and the module's name into each node that is traced inside."""
    proxy_mode = get_proxy_mode()
    assert proxy_mode is not None
    tracer = proxy_mode.tracer
    names = {id(module): name for name, module in model.named_modules()}
    stack: list[str] = []
    thread = threading.get_ident()
    create_node = tracer.create_node

    def create_node_with_line(*args: Any, **kwargs: Any) -> fx.Node:
        node = create_node(*args, **kwargs)
        line = user_line(sys._getframe(1))
        if line is not None:
            node.meta[LINE] = SourceLine(
                line.file, line.line, line.function, stack[-1] if stack else ""
            )
        return node

    def enter(module: torch.nn.Module, args: Any) -> None:
        if threading.get_ident() == thread:
            stack.append(names.get(id(module), stack[-1] if stack else ""))

    def leave(module: torch.nn.Module, args: Any, output: Any) -> None:
        if threading.get_ident() == thread and stack:
            stack.pop()

    hooks = [
        torch.nn.modules.module.register_module_forward_pre_hook(enter),
        torch.nn.modules.module.register_module_forward_hook(leave, always_call=True),
    ]
    tracer.create_node = create_node_with_line  # type: ignore[method-assign]
    try:
        yield
    finally:
        del tracer.create_node
        for hook in hooks:
            hook.remove()
