"""One process of a pipeline, as ``torch.distributed.run`` starts it; it writes what it saw."""

from __future__ import annotations

import json
import os
import pickle
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

import cachefree


def held(tensor: torch.Tensor) -> int:
    """The bytes of a parameter in this process."""
    own = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return own.untyped_storage().nbytes()


def main(folder: Path, told: dict[str, Any]) -> dict[str, Any]:
    """What the test asks of this process."""
    rank = dist.get_rank()
    rewritten = pickle.loads((folder / "rewritten.pickle").read_bytes())
    weights = told["weights"][rank % len(told["weights"])]
    options = {
        "weights": [folder / name for name in weights],
        "timeout": told.get("timeout", 60.0),
    }
    if "plan" in told:
        styles = {"columns": ColwiseParallel(), "rows": RowwiseParallel()}
        plan = {path: styles[style] for path, style in told["plan"].items()}
        decoder = cachefree.tensor_parallel(rewritten, plan, **options)
    else:
        decoder = cachefree.pipeline(rewritten, stages=told.get("stages"), **options)
    del rewritten
    ids = torch.tensor(told["ids"])
    found: dict[str, Any] = {
        "weights": sorted(decoder.graph_module.state_dict()),
        "slots": [slot.past.path for slot in decoder.interface.cache],
        "meta": any(tensor.is_meta for tensor in decoder.graph_module.state_dict().values()),
        "held": sum(held(tensor) for tensor in decoder.graph_module.parameters()),
    }
    if rank in told.get("other_ids", ()):
        ids = ids + 1
    if rank in told.get("dies", ()) or rank in told.get("stops", ()):
        kind = signal.SIGKILL if rank in told.get("dies", ()) else signal.SIGSTOP
        told["progress"] = lambda step, _: step == 2 and os.kill(os.getpid(), kind)
    options = {**told.get("options", {}), "progress": told.get("progress")}
    found["tokens"] = decoder.generate(ids, told["new"], **options).tolist()
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo")
    started = time.monotonic()
    try:
        found = main(folder, json.loads((folder / "told.json").read_text()))
    except cachefree.CacheFreeError as error:
        found = {"error": type(error).__name__, "text": str(error)}
    found["seconds"] = time.monotonic() - started
    (folder / f"found-{dist.get_rank()}.json").write_text(json.dumps(found))
    if "error" in found:
        os._exit(3)
    dist.destroy_process_group()
