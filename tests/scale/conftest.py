"""A decoder that is rewritten without weights, and processes that run its stages."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import cachefree
from tests.models.case import seeded
from tests.models.rotary import Llama, ModelArgs

ROOT = Path(__file__).parents[2]
Started = Callable[..., "list[dict[str, Any] | None]"]


@pytest.fixture(scope="session")
def whole() -> Llama:
    """The decoder with its weights."""
    return seeded(lambda: Llama(ModelArgs()))().eval()


@pytest.fixture(scope="session")
def without_weights() -> cachefree.Rewritten:
    """Its one graph, made of a model on the meta device."""
    with torch.device("meta"):
        model = Llama(ModelArgs()).eval()
    return cachefree.rewrite(model)


@pytest.fixture
def folder(whole: Llama, without_weights: cachefree.Rewritten, tmp_path: Path) -> Path:
    """What the processes read: the one graph, and the weights in a shard for each layer."""
    (tmp_path / "rewritten.pickle").write_bytes(pickle.dumps(without_weights))
    tables = {name: table for name, table in whole.named_buffers() if "rotary" in name}
    torch.save(tables, tmp_path / "tables.pt")
    shards: dict[str, dict[str, torch.Tensor]] = {}
    for name, weight in whole.state_dict().items():
        shard = "second" if name.startswith(("layers.1.", "norm.", "output.")) else "first"
        shards.setdefault(f"{shard}.safetensors", {})[name] = weight
    from safetensors.torch import save_file

    for shard, weights in shards.items():
        save_file(weights, tmp_path / shard)
    index = {name: shard for shard, weights in shards.items() for name in weights}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return tmp_path


@pytest.fixture
def start(folder: Path) -> Started:
    """Starts processes; gives what each of them wrote, None where it wrote nothing."""

    def run(count: int, *, together: bool = True, **told: Any) -> list[dict[str, Any] | None]:
        for older in folder.glob("found-*.json"):
            older.unlink()
        usual = {"weights": [["model.safetensors.index.json", "tables.pt"]], "new": 6}
        (folder / "told.json").write_text(json.dumps({**usual, **told}))
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        }
        worker = [os.fspath(Path(__file__).with_name("worker.py")), os.fspath(folder)]
        if together:
            launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
            subprocess.run(
                [sys.executable, *launch, *worker], env=environment, timeout=300, check=False
            )
        else:
            _apart(count, [sys.executable, *worker], environment, told.get("stops", ()))
        files = [folder / f"found-{rank}.json" for rank in range(count)]
        return [json.loads(file.read_text()) if file.exists() else None for file in files]

    return run


def _apart(count: int, command: list[str], environment: dict[str, str], stopped: Any) -> None:
    """The same with nobody who ends the others when one has ended."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    started = [
        subprocess.Popen(command, env={**environment, **own, "RANK": str(rank)})
        for rank in range(count)
    ]
    try:
        for rank, process in enumerate(started):
            if rank not in stopped:
                process.wait(timeout=300)
    finally:
        for process in started:
            process.kill()
            process.wait()
