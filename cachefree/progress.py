"""A progress bar for what takes long: on a terminal or in a notebook, never in a pipe."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

__all__ = ["amount", "stages"]

_DELAY_SECONDS = 2.0


@contextlib.contextmanager
def stages(total: int, shown: bool | None) -> Iterator[Callable[[str], None]]:
    """A bar over a number of stages.

    Args:
        total: How many stages there are.
        shown: Whether to show it; None: on a terminal or in a notebook, once it takes longer than
            two seconds.

    Yields:
        A function that begins the next stage, with its name.
    """
    if shown is False or (shown is None and not _is_watched()):
        yield lambda name: None
        return
    try:
        from tqdm.auto import tqdm
    except ImportError:
        yield lambda name: None
        return
    with tqdm(
        total=total,
        delay=0 if shown else _DELAY_SECONDS,
        leave=False,
        bar_format="{desc:<32}{bar}| {n}/{total} {elapsed}",
    ) as bar:
        begun = [False]

        def begin(name: str) -> None:
            if begun[0]:
                bar.update()
            begun[0] = True
            bar.set_description(name)

        yield begin


@contextlib.contextmanager
def amount(total: int, name: str, shown: bool | None = None) -> Iterator[Callable[[int], None]]:
    """A bar over a number of bytes; shown as `stages` is.

    Yields:
        A function that is called with the bytes that were done since it was called before.
    """
    if shown is False or (shown is None and not _is_watched()):
        yield lambda count: None
        return
    try:
        from tqdm.auto import tqdm
    except ImportError:
        yield lambda count: None
        return
    delay = 0 if shown else _DELAY_SECONDS
    with tqdm(total=total, desc=name, delay=delay, leave=False, unit="B", unit_scale=True) as bar:

        def done(count: int) -> None:
            bar.update(count)

        yield done


def _is_watched() -> bool:
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return sys.stderr.isatty() or getattr(shell, "kernel", None) is not None
