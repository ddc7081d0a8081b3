"""The one graph with its weights in shards: every process computes a part of each layer.

torch's own tensor parallelism does it: a plan of ``ColwiseParallel`` and ``RowwiseParallel`` says
how the weights lie, and DTensor finds for each operator of the graph what follows from that.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.distributed as dist
from torch import fx, nn

from cachefree.errors import CacheFreeError, Refusal, StageError, raise_all
from cachefree.onnx.domain import concrete
from cachefree.scale.agreement import same_in_all
from cachefree.scale.decoder import JointDecoder, last_token
from cachefree.scale.links import Failure, Links
from cachefree.scale.loading import load
from cachefree.scale.parts import Part, parted

__all__ = ["ShardedDecoder", "tensor_parallel"]

aten = torch.ops.aten


def tensor_parallel(
    rewritten: Any,
    plan: Mapping[str, Any],
    *,
    weights: Any = None,
    timeout: float = 60.0,
    group: Any = None,
) -> ShardedDecoder:
    """The one graph on all processes of a group together, each with its shard of the weights.

    Every process calls this with the same rewritten model and plan, and then makes the same calls,
    on the CPU. The cache is in shards as well where the plan makes keys and values so.

    Args:
        rewritten: What ``cachefree.rewrite`` gave; it may be on the ``meta`` device.
        plan: As ``torch.distributed.tensor.parallel.parallelize_module`` takes it: module path,
            in which ``*`` stands for any part, → ``ColwiseParallel()`` or ``RowwiseParallel()``.
        weights: As in `cachefree.pipeline`. None: the model's own.
        timeout: In seconds: how long to wait for another process before a call fails.
        group: The processes, a ``torch.distributed.ProcessGroup``. None: all.

    Raises:
        CacheFreeError: in every process: there is no process group, the plan names what is no
            linear layer or embedding, or weights are missing.
        StageError: a process is gone or does not answer.
    """
    links = Links(group, timeout)
    where = torch.device("cpu")
    mesh = _mesh(links)

    def made() -> ShardedDecoder:
        rewritten.refresh()
        part = parted(rewritten.graph_module, rewritten.interface, 1, 0, where)
        sharding = _Sharding(_styles(part, plan), mesh)
        neutral = load(part, rewritten, rewritten.interface.cache, weights, where, sharding.shard)
        _reduce(part.graph_module, sharding.styles)
        return ShardedDecoder(part, links, rewritten, neutral, where)

    kinds = sorted(f"{name} {type(style).__name__}" for name, style in plan.items())
    return same_in_all(links, made, rewritten, kinds, are_own=weights is None)


class ShardedDecoder(JointDecoder):
    """One process's shards of the one graph; a call of it is a call of all processes.

    Every process calls it with the same inputs, and gets the same outputs; the cache is in
    ``DTensor``, whose sizes are those of the whole.

    Attributes:
        graph_module: The whole graph; its sharded parameters are ``DTensor``.
        interface: Its inputs, outputs and cache slots.
    """

    def __init__(
        self,
        part: Part,
        links: Links,
        rewritten: Any,
        neutral: Mapping[str, torch.Tensor],
        device: torch.device,
    ) -> None:
        super().__init__(rewritten, rewritten.interface, links, neutral, device)
        self.graph_module = part.graph_module
        self._part = part

    def __repr__(self) -> str:
        number, count = self._links.number + 1, self._links.count
        return f"ShardedDecoder({number} of {count}; {len(self.interface.cache)} cache tensors)"

    def _run(
        self, given: Mapping[str, torch.Tensor], sizes: Mapping[str, int], last_of: str | None
    ) -> dict[str, torch.Tensor]:
        failure: Failure | None = None
        outputs: dict[str, torch.Tensor] = {}
        try:
            outputs = self._computed(given, sizes, last_of)
        except Exception as error:  # noqa: BLE001 - told to all, and raised in all
            failure = Failure(self._links.number, f"{type(error).__name__}: {error}")
        failed = [one for one in self._links.all_told(failure) if one is not None]
        if failed:
            raise StageError(
                Refusal(
                    f"Process {failed[0].stage + 1} of {self._links.count} could not compute its "
                    "shard.",
                    why=failed[0].reason,
                    remedy="Where an operator has no rule for such shards, leave the layers before "
                    "it out of the plan; the number of heads must be a multiple of the processes'.",
                )
            )
        return outputs

    def _computed(
        self, given: Mapping[str, torch.Tensor], sizes: Mapping[str, int], last_of: str | None
    ) -> dict[str, torch.Tensor]:
        from torch.distributed.tensor.experimental import implicit_replication
        from torch.nn.attention import SDPBackend, sdpa_kernel

        part = self._part
        shapes = {spec.name: spec.shape for spec in self.interface.inputs}
        values: dict[str, Any] = {
            name: self._input(source, given, sizes) for name, source in part.of_call.items()
        }
        for name, (source, axis) in part.sizes.items():
            values[name] = concrete((shapes[source][axis],), sizes)[0]
        outputs = {}
        # by its formula: for the CPU's kernel DTensor has no rule, and looks for one for minutes
        with implicit_replication(), sdpa_kernel(SDPBackend.MATH):
            results = self.graph_module(*(values[name] for name in part.inputs))
            for place, spec in enumerate(self.interface.outputs):
                value = results[part.results.index(part.outputs[place])]
                if spec.is_cache:
                    outputs[spec.name] = _summed(value)
                    continue
                if spec.name == last_of:
                    value = last_token(value, spec.shape)
                outputs[spec.name] = _whole(value)
        return outputs


@dataclass(frozen=True)
class _Style:
    """How a weight's layer lies.

    Attributes:
        style: torch's own.
        kind: ``nn.Linear`` or ``nn.Embedding``.
        weight: The name of its weight.
        bias: The name of its bias; None where it has none.
    """

    style: Any
    kind: type[nn.Module]
    weight: str
    bias: str | None


def _styles(part: Part, plan: Mapping[str, Any]) -> dict[str, _Style]:
    """Weight or bias → how its layer lies.

    Raises:
        CacheFreeError: all at once: what of the plan cannot be done.
    """
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    layers = dict(_layers(part.graph_module))
    found: dict[str, _Style] = {}
    refusals = []
    for pattern, style in plan.items():
        paths = [path for path in layers if _matches(path, pattern)]
        if not isinstance(style, (ColwiseParallel, RowwiseParallel)):
            refusals.append(
                Refusal(
                    f"{type(style).__name__} for {pattern!r} is not done.",
                    why="A graph has no modules to hook; where its weights lie is all it can take.",
                    remedy="Use ColwiseParallel and RowwiseParallel; DTensor finds the rest.",
                )
            )
        elif not paths:
            refusals.append(
                Refusal(
                    f"The plan's {pattern!r} is no linear layer or embedding of the graph.",
                    why="Those that it has: " + (", ".join(sorted(layers)[:8]) or "none") + ".",
                    remedy="Name these; a layer that multiplies otherwise cannot be in a plan.",
                )
            )
        for path in paths:
            kind, weight, bias = layers[path]
            for name in (weight, bias):
                if name is not None:
                    found[name] = _Style(style, kind, weight, bias)
    raise_all(CacheFreeError, refusals)
    return found


def _matches(path: str, pattern: str) -> bool:
    steps, wanted = path.split("."), pattern.split(".")
    return len(steps) == len(wanted) and all(map(fnmatchcase, steps, wanted))


def _layers(
    module: fx.GraphModule,
) -> Iterator[tuple[str, tuple[type[nn.Module], str, str | None]]]:
    """Module path → its kind and the names of its weight and bias, as the graph uses them."""
    kind: type[nn.Module]
    for node in module.graph.nodes:
        if node.target is aten.linear.default:
            kind, tensors = nn.Linear, node.args[1:3]
        elif node.target is aten.embedding.default:
            kind, tensors = nn.Embedding, node.args[:1]
        else:
            continue
        names = [
            str(tensor.target) if isinstance(tensor, fx.Node) and tensor.op == "get_attr" else None
            for tensor in (*tensors, None)
        ]
        if names[0] is not None and names[0].endswith(".weight"):
            yield names[0].removesuffix(".weight"), (kind, names[0], names[1])


def _mesh(links: Links) -> Any:
    """The processes as DTensor knows them.

    They have connections of their own: what one says in trouble must not meet what others compute.
    """
    from torch.distributed.device_mesh import DeviceMesh

    wait = datetime.timedelta(seconds=links.timeout)
    return DeviceMesh.from_group(dist.new_group(links.ranks, timeout=wait, backend="gloo"), "cpu")


class _Sharding:
    """Makes a shard of each weight as soon as it is read."""

    def __init__(self, styles: Mapping[str, _Style], mesh: Any) -> None:
        self.styles = styles
        self.mesh = mesh

    def shard(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """This process's part of a weight; the weight itself where the plan does not name it."""
        from torch.distributed.tensor import DTensor
        from torch.distributed.tensor.parallel import parallelize_module

        planned = self.styles.get(name)
        if planned is None:
            return tensor
        last = "weight" if name == planned.weight else "bias"
        rows, columns = tensor.shape if last == "weight" else (tensor.shape[0], 1)
        if planned.kind is nn.Embedding:
            layer: nn.Module = nn.Embedding(rows, columns, device="meta")
        else:
            layer = nn.Linear(columns, rows, bias=last == "bias", device="meta")
        setattr(layer, last, nn.Parameter(tensor, requires_grad=False))
        parallelize_module(layer, self.mesh, planned.style, src_data_rank=None)
        whole: Any = getattr(layer, last).detach()
        own = whole.to_local().clone()  # else the shard holds on to the memory of the whole
        return DTensor.from_local(
            own,
            self.mesh,
            whole.placements,
            run_check=False,
            shape=whole.shape,
            stride=whole.stride(),
        )


def _reduce(module: fx.GraphModule, styles: Mapping[str, _Style]) -> None:
    """Sums what the shards of a layer give where the layer ends, as torch's own modules do."""
    for node in list(module.graph.nodes):
        if any(s.op == "get_attr" and str(s.target) in styles for s in node.all_input_nodes):
            with module.graph.inserting_after(node):
                summed = module.graph.call_function(_summed, (node,))
            node.replace_all_uses_with(summed, delete_user_cb=lambda user, own=summed: user != own)
    module.graph.lint()
    module.recompile()


def _summed(value: Any) -> Any:
    """A tensor of which no process has a summand only."""
    from torch.distributed.tensor import DTensor, Replicate

    if not isinstance(value, DTensor) or not any(p.is_partial() for p in value.placements):
        return value
    return value.redistribute(
        placements=[Replicate() if p.is_partial() else p for p in value.placements]
    )


def _whole(value: Any) -> Any:
    from torch.distributed.tensor import DTensor

    return value.full_tensor() if isinstance(value, DTensor) else value
