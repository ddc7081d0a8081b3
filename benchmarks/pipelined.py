"""One graph on several processes: in stages, or with ``--sharded`` with its weights in shards.

    torchrun --nproc-per-node 2 -m benchmarks.pipelined --layers 4
    torchrun --nproc-per-node 2 -m benchmarks.pipelined --layers 4 --sharded

Every process runs this file. The first one says what came of it; the tokens of one process alone
are there to compare with.
"""

import argparse
import os
import time
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

import cachefree
from benchmarks.models import llama

PLAN = {
    "blocks.*.attention.[qkv]": ColwiseParallel(),
    "blocks.*.attention.out": RowwiseParallel(),
    "blocks.*.gate": ColwiseParallel(),
    "blocks.*.up": ColwiseParallel(),
    "blocks.*.down": RowwiseParallel(),
    "head": ColwiseParallel(),
}


def alone(model: torch.nn.Module, ids: torch.Tensor, new: int) -> torch.Tensor:
    """What the model itself continues with."""
    past, inputs = None, ids
    with torch.no_grad():
        for _ in range(new):
            scores, past = model(inputs, past)
            inputs = scores[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, inputs], 1)
    return ids


def held(module: torch.nn.Module) -> int:
    """The bytes of the parameters in this process."""
    own = (p.to_local() if isinstance(p, DTensor) else p for p in module.parameters())
    return sum(tensor.nbytes for tensor in own)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--sharded", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    model = llama(options.layers, options.width, heads=8)
    rewritten = cachefree.rewrite(model)
    decoder: Any
    if options.sharded:
        decoder = cachefree.tensor_parallel(rewritten, PLAN)
    else:
        decoder = cachefree.pipeline(rewritten)
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    start = time.perf_counter()
    found = decoder.generate(ids, options.tokens)
    seconds = time.perf_counter() - start
    print(f"{decoder}: {held(decoder.graph_module) / 1e6:.2f} MB of weights", flush=True)
    if dist.get_rank() == 0:
        whole = sum(parameter.nbytes for parameter in model.parameters())
        same = "equal" if torch.equal(found, alone(model, ids, options.tokens)) else "OTHER"
        print(
            f"{options.tokens} tokens on {os.environ['WORLD_SIZE']} processes in {seconds:.2f} s, "
            f"{same} to those of one; {whole / 1e6:.2f} MB of weights in all",
            flush=True,
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
