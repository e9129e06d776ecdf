"""An exported program made functional: constants folded, nothing changed in place, layers named."""

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind

from defquant.errors import UserError

__all__ = ["Reading", "name_of"]

_AS_IT_IS = {
    "aten.detach.default", "aten.detach_.default", "aten.clone.default", "aten.contiguous.default",
    "aten.alias.default", "aten.lift_fresh_copy.default", "aten.dropout.default",
    "aten.dropout_.default", "aten.feature_dropout.default", "aten.alpha_dropout.default",
}  # fmt: skip
"""Operations that pass their first argument on, in eval mode."""


class Reading:
    """Copies an exported program: constants folded, in-place operations made functional."""

    def __init__(self, program: torch.export.ExportedProgram, trainable: bool) -> None:
        self.graph, self.trainable = fx.Graph(), trainable
        self.program = program
        self.root = nn.Module()
        self.new: dict[fx.Node, Any] = {}  # of the old graph, in the new one
        self.folded: dict[fx.Node, Any] = {}  # old nodes that the images do not reach
        self.meta: dict[fx.Node, dict[str, Any]] = {}  # of those

    def module(self) -> fx.GraphModule:
        nodes = list(self.program.graph.nodes)
        self._inputs()
        for index, node in enumerate(nodes):
            if node.op == "call_function":
                _check_in_place(node, nodes[index + 1 :])
                self._call(node)
            elif node.op == "output":
                (end,) = node.args[0]
                self.graph.output(self._copied(end))
        self.graph.eliminate_dead_code()
        return fx.GraphModule(self.root, self.graph)

    def _inputs(self) -> None:
        specs = {spec.arg.name: spec for spec in self.program.graph_signature.input_specs}
        for node in self.program.graph.nodes:
            if node.op != "placeholder":
                continue
            spec = specs[node.name]
            if spec.kind is InputKind.USER_INPUT:
                self.new[node] = self.graph.placeholder("image")
                self.new[node].meta = {"val": node.meta["val"], "layer": ""}
            else:
                tensors = self.program.constants, self.program.state_dict
                held = next(t[spec.target] for t in tensors if spec.target in t)
                self.folded[node] = held.detach()
                self.meta[node] = {"name": spec.target, "sources": (spec.target,)}

    def _call(self, node: fx.Node) -> None:
        if "assert" in str(node.target) or "sym_constrain" in str(node.target):
            return
        if all(a in self.folded for a in node.all_input_nodes) and not _draws(node):
            with torch.no_grad():
                self.folded[node] = node.target(*self._real(node.args), **self._real(node.kwargs))  # type: ignore[operator]
            self.meta[node] = self._origin(node)
        elif self._passes_on(node):
            self.new[node] = self.new[node.all_input_nodes[0]]
        else:
            copied = self._copied(node.args), self._copied(node.kwargs)
            target = _functional(node)
            layer = self._layer(node)
            made = self.graph.create_node(
                "call_function", target, *copied, name=self._name(layer, name_of(target))
            )
            made.meta = {"val": node.meta.get("val"), "layer": layer or made.name}
            self.new[node] = made

    def _passes_on(self, node: fx.Node) -> bool:
        name = str(node.target)
        if name in ("aten.to.dtype", "aten.to.device", "aten._to_copy.default"):
            before, after = node.args[0].meta["val"], node.meta["val"]  # type: ignore[union-attr]
            return bool(before.dtype == after.dtype)
        if name == "aten.slice.Tensor":  # of all there is
            return bool(node.args[0].meta["val"].shape == node.meta["val"].shape)  # type: ignore[union-attr]
        off = not ("dropout" in name and node.args[2])
        kept = self.trainable and ("dropout" in name or "detach" in name)
        return name in _AS_IT_IS and off and not kept

    def _real(self, argument: Any) -> Any:
        def copied(node: fx.Node) -> Any:  # what follows may change it in place
            value = self.folded[node]
            return value.clone() if isinstance(value, Tensor) else value

        return fx.node.map_arg(argument, copied)

    def _copied(self, argument: Any) -> Any:
        return fx.node.map_arg(argument, self._node)

    def _node(self, old: fx.Node) -> Any:
        """The new node of an old one; a constant gets its node at its first use."""
        if old not in self.new:
            value = self.folded[old]
            if not isinstance(value, Tensor):
                return value
            meta = self.meta[old]
            key = f"c{len(self.new)}_" + meta.get("name", "made").replace(".", "_")
            self.root.register_buffer(key, value)
            self.new[old] = made = self.graph.get_attr(key)
            made.meta = {**meta, "val": value}
        return self.new[old]

    def _origin(self, node: fx.Node) -> dict[str, Any]:
        """Of a folded constant: where it comes from, and the bits of a weight's grid."""
        inputs = node.all_input_nodes
        sources = [self.meta[a] for a in inputs if "name" in self.meta[a]]
        found = dict(sources[0]) if len(sources) == 1 else {}
        found.pop("bits", None)
        found["sources"] = tuple({s: 0 for a in inputs for s in self.meta[a].get("sources", ())})
        if str(node.target) == "defquant.weight_round.default":
            found |= {"bits": node.args[1], "float": self.folded[inputs[0]]}
        return found

    def _layer(self, node: fx.Node) -> str:
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        called = str(stack[-1][0]) if stack else ""
        called = "" if called.startswith("_empty_nn_module_stack") else called  # torch's own word
        parameters = [self.meta[a].get("name", "") for a in node.all_input_nodes if a in self.meta]
        weights = [name for name in parameters if name.endswith("weight")]
        owner = weights[0].rpartition(".")[0] if weights else ""
        return owner if owner.startswith(called) else called

    def _name(self, layer: str, target: str) -> str:
        called = target.split(".")[1].rstrip("_") if "." in target else target
        return (layer or called).replace(".", "_")


def _draws(node: fx.Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _functional(node: fx.Node) -> Any:
    """The operation, or for one in place the same that makes a new tensor."""
    target: Any = node.target
    if target is torch.ops.aten.view.default:  # strides differ where a `contiguous` was passed over
        return torch.ops.aten.reshape.default
    if not _mutates(node):
        return target
    space, name, overload = str(target).split(".")
    try:
        return getattr(getattr(getattr(torch.ops, space), name.removesuffix("_")), overload)
    except AttributeError:
        raise UserError(f"cannot follow the operation {name!r} in place ({node.name})") from None


def _mutates(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return bool(schema is not None and schema.is_mutable)


def _check_in_place(node: fx.Node, later: list[fx.Node]) -> None:
    """Raise `UserError` where what an in-place operation changed is read under another name."""
    if not _mutates(node):
        return
    changed = node.args[0]
    assert isinstance(changed, fx.Node)
    base = changed
    while _is_view(base):
        base = base.all_input_nodes[0]
    family, fresh = {base}, {node}
    for other in node.graph.nodes:
        if _is_view(other) and other.all_input_nodes[0] in family:
            family.add(other)
    for other in later:
        if family.intersection(other.all_input_nodes) - fresh:
            raise UserError(
                f"cannot follow {node.name!r}: it changes in place what {other.name!r} reads "
                "under another name; write y = y + x instead of y += x"
            )


def _is_view(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None or not schema.returns or _mutates(node):
        return False
    alias = schema.returns[0].alias_info
    return alias is not None and not alias.is_write


def name_of(target: Any) -> str:
    """Of an operation, with its overload; Python's own have none."""
    return str(target) if isinstance(target, torch._ops.OpOverload) else str(target.__name__)
