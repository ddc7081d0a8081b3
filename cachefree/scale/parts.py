"""The one graph in parts that run one after the other, each with its own weights and cache slots.

What is computed of sizes alone is computed in each part that reads it, so that only tensors cross.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from cachefree.cutting import crossings, cut_places
from cachefree.errors import CacheFreeError, Refusal
from cachefree.execution import make_quick
from cachefree.spec import Interface

__all__ = ["Part", "parted"]

_HEAVY = 1 << 20  # a slot that is read before a cut and made after it: rather any other place


@dataclass(frozen=True)
class Part:
    """What one stage does, by the names of the values of the whole graph.

    Attributes:
        graph_module: Takes ``inputs``, gives a tuple of ``results``. Its parameters and buffers are
            those of the whole graph, under the same names.
        inputs: What it reads: inputs of the whole graph, sizes, and values of other stages.
        of_call: Which of these are inputs of the whole graph: name → the input's name.
        sizes: Which of these are sizes: name → the whole graph's input and its axis.
        results: What it gives.
        slots: The places in ``interface.cache`` of the slots that stay with it.
        outputs: Place among the whole graph's outputs → name among ``results``.
        makers: Place among the whole graph's outputs → the stage that hands it out.
        given: Later stage → what it is given.
        taken: Earlier stage → what it gives.
        sent_back: Earlier stage → next values of slots that stay there.
        got_back: Later stage → next values of slots that stay here.
    """

    graph_module: fx.GraphModule
    inputs: tuple[str, ...]
    of_call: dict[str, str]
    sizes: dict[str, tuple[str, int]]
    results: tuple[str, ...]
    slots: tuple[int, ...]
    outputs: dict[int, str]
    makers: dict[int, int]
    given: dict[int, tuple[str, ...]]
    taken: dict[int, tuple[str, ...]]
    sent_back: dict[int, tuple[str, ...]]
    got_back: dict[int, tuple[str, ...]]

    @property
    def weights(self) -> tuple[str, ...]:
        """The names of the parameters and buffers that it reads."""
        nodes = self.graph_module.graph.nodes
        return tuple(
            dict.fromkeys(
                str(node.target)
                for node in nodes
                if node.op == "get_attr" and _is_tensor(self.graph_module, node)
            )
        )


def parted(
    whole: fx.GraphModule,
    interface: Interface,
    stages: int | Sequence[str],
    number: int,
    device: torch.device,
) -> Part:
    """Cuts a graph and gives one of its parts; the same cuts wherever it is called.

    Args:
        whole: The one graph.
        interface: Its inputs, outputs and cache slots.
        stages: How many parts, or the modules with which the later ones begin.
        number: Which part, from 0.
        device: Where it runs.

    Raises:
        CacheFreeError: there are fewer places to cut, or no module of a name.
    """
    return _Cutter(whole, interface, stages).part(number, device)


class _Cutter:
    def __init__(
        self, whole: fx.GraphModule, interface: Interface, stages: int | Sequence[str]
    ) -> None:
        self.whole = whole
        self.interface = interface
        self.nodes = list(whole.graph.nodes)
        self.free = _free(self.nodes)
        self.units = _units(self.nodes, self.free)
        inputs = [node for node in self.nodes if node.op == "placeholder"]
        (self.outputs,) = next(node for node in self.nodes if node.op == "output").args
        at = {spec.name: place for place, spec in enumerate(interface.inputs)}
        due = {spec.name: place for place, spec in enumerate(interface.outputs)}
        self.pasts = [inputs[at[slot.past.name]] for slot in interface.cache]
        self.presents = [due[slot.present.name] for slot in interface.cache]
        self.input_names = dict(zip(inputs, (spec.name for spec in interface.inputs), strict=True))
        cuts = self._cuts(stages)
        self.count = len(cuts) + 1
        self.stage = {node: sum(unit >= cut for cut in cuts) for node, unit in self.units.items()}
        self.homes = [self._home(slot) for slot in range(len(self.pasts))]

    # Cutting.

    def _cuts(self, stages: int | Sequence[str]) -> list[int]:
        count = max(self.units.values(), default=-1) + 1
        if not isinstance(stages, int):
            return self._named_cuts(stages, count)
        if stages < 1 or stages > max(count, 1):
            raise CacheFreeError(
                Refusal(
                    f"The graph cannot be cut into {stages} stages.",
                    why=f"It has {count} operators.",
                    remedy="Start at most as many processes as the model has layers.",
                )
            )
        if stages == 1:
            return []
        return cut_places(self._weights(count), crossings(count, self._lives()), stages)

    def _named_cuts(self, modules: Sequence[str], count: int) -> list[int]:
        """Before each module's first weight, where fewest values cross since the weight before."""
        crossing = crossings(count, self._lives())
        reads: dict[int, set[str]] = {}
        for node, unit in self.units.items():
            names = {str(s.target) for s in node.all_input_nodes if s.op == "get_attr"}
            reads.setdefault(unit, set()).update(names)
        cuts: list[int] = []
        for module in modules:
            own = [
                u for u, names in reads.items() if any(n.startswith(f"{module}.") for n in names)
            ]
            first = min(own, default=0)
            since = max(
                (unit for unit, names in reads.items() if names and unit < first), default=0
            )
            places = range(max([since, *cuts]) + 1, first + 1)
            if not places:
                raise CacheFreeError(
                    Refusal(
                        f"No stage can begin with the module {module!r}.",
                        why="It runs first, or before the modules that were named before it."
                        if own
                        else "The graph reads no weight of it.",
                        remedy="Name modules in the order in which they run, as in "
                        'stages=["layers.8", "layers.16"], or give a number.',
                    )
                )
            cuts.append(min(reversed(places), key=crossing.__getitem__))
        return cuts

    def _weights(self, count: int) -> list[int]:
        """The bytes of the weights that the operators before each place read."""
        read: set[int] = set()
        each = [0] * count
        for node, unit in self.units.items():
            for source in node.all_input_nodes:
                if source.op == "get_attr" and _is_tensor(self.whole, source):
                    tensor = _attribute(self.whole, str(source.target))
                    if id(tensor) not in read:
                        read.add(id(tensor))
                        each[unit] += tensor.numel() * tensor.element_size()
        sums = [0]
        for more in each:
            sums.append(sums[-1] + more)
        return sums

    def _lives(self) -> Iterable[tuple[int, int, int]]:
        tables = self._tables()
        for node, unit in self.units.items():
            readers = [self.units[user] for user in node.users if user in self.units]
            yield unit, max(readers, default=unit), int(node not in tables)
        for past, place in zip(self.pasts, self.presents, strict=True):
            reads = [self.units[user] for user in past.users if user in self.units]
            made = self.units.get(self.outputs[place])
            every = [*reads, *([] if made is None else [made])]
            if every:
                yield min(every), max(every), _HEAVY

    def _tables(self) -> set[fx.Node]:
        """Masks and tables of positions: every layer reads them, so they cross wherever is cut."""
        found: set[fx.Node] = set()
        for node in self.units:
            read = node.all_input_nodes
            read = read[:1] if node.target is torch.ops.aten.type_as.default else read
            sources = [source for source in read if source not in found]
            if not any(self._is_learned(source) for source in sources):
                found.add(node)
        return found

    def _is_learned(self, source: fx.Node) -> bool:
        if source in self.units or source in self.pasts:
            return True
        if source.op != "get_attr" or not _is_tensor(self.whole, source):
            return False
        return isinstance(_attribute(self.whole, str(source.target)), torch.nn.Parameter)

    def _home(self, slot: int) -> int:
        """The stage that a slot stays with: the first that reads it, or makes its next value."""
        readers = [user for user in self.pasts[slot].users if user in self.stage]
        made = self.outputs[self.presents[slot]]
        return min((self.stage[node] for node in (*readers, made) if node in self.stage), default=0)

    # Writing.

    def part(self, number: int, device: torch.device) -> Part:
        own, back = self._outputs_of()
        readers = self._readers()
        given: dict[int, list[fx.Node]] = {}
        taken: dict[int, list[fx.Node]] = {}
        for node, stages in readers.items():
            home = self._made_at(node)
            for stage in sorted(stages):
                if home == number and stage > number:
                    given.setdefault(stage, []).append(node)
                elif stage == number and home is not None and home < number:
                    taken.setdefault(home, []).append(node)
        sent_back = [(to, node) for at, to, node in back if at == number]
        wanted = [
            *(node for nodes in given.values() for node in nodes if node.op != "placeholder"),
            *(self.outputs[place] for place, at in own.items() if at == number),
            *(node for _, node in sent_back),
        ]
        wanted = list(dict.fromkeys(wanted))
        graph, inputs, sizes = self._written(wanted, number, device)
        module = fx.GraphModule(self.whole, graph, class_name=f"Stage{number + 1}")
        module.training = False
        make_quick(module)
        return Part(
            module,
            inputs,
            {node.name: name for node, name in self.input_names.items() if node.name in inputs},
            sizes,
            tuple(node.name for node in wanted),
            tuple(slot for slot, home in enumerate(self.homes) if home == number),
            {
                place: self.outputs[place].name
                for place in range(len(self.outputs))
                if self._due_at(place, own) == number
            },
            {place: self._due_at(place, own) for place in range(len(self.outputs))},
            {stage: _names(nodes) for stage, nodes in sorted(given.items())},
            {stage: _names(nodes) for stage, nodes in sorted(taken.items())},
            _by_stage(sent_back),
            _by_stage([(at, node) for at, to, node in back if to == number]),
        )

    def _outputs_of(self) -> tuple[dict[int, int], list[tuple[int, int, fx.Node]]]:
        """Where each output is made; and next values that go back: from where, to where."""
        homes = dict(zip(self.presents, self.homes, strict=True))
        made, back = {}, []
        for place, node in enumerate(self.outputs):
            made[place] = at = self.stage.get(node, homes.get(place, 0))
            if homes.get(place, at) != at:
                back.append((at, homes[place], node))
        return made, back

    def _due_at(self, place: int, made: dict[int, int]) -> int:
        """The stage that hands an output out: a slot's own for its next value."""
        return dict(zip(self.presents, self.homes, strict=True)).get(place, made[place])

    def _made_at(self, node: fx.Node) -> int | None:
        """The stage that has a value; None where every stage has it."""
        if node in self.stage:
            return self.stage[node]
        return self.homes[self.pasts.index(node)] if node in self.pasts else None

    def _readers(self) -> dict[fx.Node, set[int]]:
        """The stages that read each value that may cross."""
        readers: dict[fx.Node, set[int]] = {}
        for node, stage in self.stage.items():
            for source in node.all_input_nodes:
                if source in self.stage or source in self.pasts:
                    readers.setdefault(source, set()).add(stage)
        return readers

    def _needed(self, wanted: Sequence[fx.Node], number: int) -> set[fx.Node]:
        """All that a stage computes or takes, for what is wanted of it."""
        needed: set[fx.Node] = set()
        pending = list(wanted)
        while pending:
            node = pending.pop()
            if node in needed:
                continue
            needed.add(node)
            is_own = self.stage.get(node, number) == number
            if is_own and not _is_size(node) and not _is_device(node):
                pending += node.all_input_nodes
        return needed

    def _written(
        self, wanted: Sequence[fx.Node], number: int, device: torch.device
    ) -> tuple[fx.Graph, tuple[str, ...], dict[str, tuple[str, int]]]:
        needed = self._needed(wanted, number)
        graph = fx.Graph()
        copies: dict[fx.Node, Any] = {}
        inputs: list[str] = []
        sizes: dict[str, tuple[str, int]] = {}
        for node in self.nodes:
            if node not in needed:
                continue
            if _is_device(node):
                copies[node] = device
            elif (
                node.op == "placeholder" or _is_size(node) or self.stage.get(node, number) != number
            ):
                if _is_size(node):
                    sizes[node.name] = (self.input_names[node.args[0]], node.args[1])
                copies[node] = graph.placeholder(node.name)
                inputs.append(node.name)
        for node in self.nodes:
            if node in needed and node not in copies:
                copies[node] = graph.node_copy(node, copies.__getitem__)
        graph.output(tuple(copies[node] for node in wanted))
        graph.lint()
        return graph, tuple(inputs), sizes


def _free(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """What every stage can have without being given it: weights, and what sizes alone tell."""
    free: set[fx.Node] = set()
    for node in nodes:
        if node.op in ("placeholder", "get_attr") or _is_size(node) or _is_device(node):
            free.add(node)
        elif node.op == "call_function" and _is_repeatable(node.target):
            sources = node.all_input_nodes
            if all(
                source in free and source.op not in ("placeholder", "get_attr")
                for source in sources
            ):
                free.add(node)
    return free


def _is_repeatable(target: Any) -> bool:
    """Whether it gives the same wherever it runs."""
    tags = getattr(target, "tags", ())
    return torch.Tag.nondeterministic_seeded not in tags


def _is_size(node: fx.Node) -> bool:
    source = node.args[0] if node.args else None
    return (
        node.op == "call_method"
        and node.target == "size"
        and isinstance(source, fx.Node)
        and source.op == "placeholder"
    )


def _is_device(node: fx.Node) -> bool:
    return node.target is getattr and node.args[1] == "device"


def _units(nodes: Sequence[fx.Node], free: set[fx.Node]) -> dict[fx.Node, int]:
    """The number of each operator; the parts of what an operator gives go with it."""
    units: dict[fx.Node, int] = {}
    count = 0
    for node in nodes:
        if node in free or node.op == "output":
            continue
        source = node.args[0] if node.target is operator.getitem else None
        if isinstance(source, fx.Node) and source in units:
            units[node] = units[source]
        else:
            units[node] = count
            count += 1
    return units


def _names(nodes: Iterable[fx.Node]) -> tuple[str, ...]:
    return tuple(node.name for node in nodes)


def _by_stage(pairs: Iterable[tuple[int, fx.Node]]) -> dict[int, tuple[str, ...]]:
    found: dict[int, list[fx.Node]] = {}
    for stage, node in pairs:
        found.setdefault(stage, []).append(node)
    return {stage: _names(nodes) for stage, nodes in sorted(found.items())}


def _attribute(module: torch.nn.Module, name: str) -> Any:
    path, _, last = name.rpartition(".")
    return getattr(module.get_submodule(path), last)


def _is_tensor(module: torch.nn.Module, node: fx.Node) -> bool:
    return isinstance(_attribute(module, str(node.target)), torch.Tensor)
