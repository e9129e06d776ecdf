"""A captured program whose layers are modules again, under the model's own names.

What its quantisers lack, their ranges, is measured on images.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from defquant.captured import Captured, arguments, kind_of
from defquant.errors import UserError
from defquant.models.squeezing import median_2x2
from defquant.quantize import Quantizer, QuantReLU, QuantSigned
from defquant.rounding import fake_quantize
from defquant.weights import FirstConv, QuantConv2d, QuantLinear

__all__ = ["Constant", "MeasuredReLU", "Rebuilt", "calibrate", "is_tensor"]

_Module = TypeVar("_Module", bound=fx.GraphModule)
_DROPOUTS: dict[str, type[nn.Module]] = {
    "dropout": nn.Dropout, "feature_dropout": nn.Dropout2d, "alpha_dropout": nn.AlphaDropout,
}  # fmt: skip
_NORMS: dict[int, Any] = {
    2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d,
}  # fmt: skip
_TAKEN = {"account", "meta"}


class Rebuilt:
    """The program of `captured` with modules for what learns or changes in training.

    Convolutions and linear layers (`QuantConv2d`, `QuantLinear`), batch norms, dropouts and
    quantisers are modules, at the path of their parameters, so that names in the state dict stay;
    one whose weight is computed, of pruning, norms or standardisation, is a plain layer of that
    weight at `<path>.plain`. All else stays an operation.

    Attributes:
        graph, modules: nodes `call_module` and the modules by path.
        deep: nodes that a convolution or linear layer comes before.
        computed: by path of a plain layer, the names of what its weight was computed from.
        unused: names of parameters that the program does not read.

    Raises `UserError` for a parameter that is not finite.
    """

    def __init__(self, captured: Captured, model: nn.Module) -> None:
        self.captured = captured
        self.graph, self.modules = fx.Graph(), dict[str, nn.Module]()
        self.graph.output(self.graph.graph_copy(captured.module.graph, {}))
        self.owners = dict(model.named_modules())
        self.held: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
        self.trains = {name for name, tensor in self.held.items() if tensor.requires_grad}
        self.unused = dict.fromkeys(self.held)
        self.held |= dict(model.named_buffers(remove_duplicate=False))
        self.saved = set(model.state_dict())
        self.deep: set[fx.Node] = set()
        self.computed: dict[str, str] = {}
        self.paths: dict[tuple[fx.Node, str], str] = {}  # of the layer of a weight and its options
        self.parameters: dict[tuple[Any, ...], nn.Parameter] = {}
        for node in list(self.graph.nodes):
            if node.op == "call_function":
                self._visit(node)
        for node in list(self.graph.nodes):
            if node.op == "get_attr":
                self._constant(node)

    def finish(self, kind: type[_Module]) -> _Module:
        """The network, a `kind`."""
        root = nn.Module()
        for path in sorted(self.modules, key=lambda path: path.count(".")):
            _attach(root, path, self.modules[path])
        for node in self.graph.nodes:
            if node.op == "get_attr":
                _attach(root, node.target, node.meta["own"])
        return kind(root, self.graph, self.captured.model)

    def module(self, node: fx.Node) -> nn.Module | None:
        """What a node calls; None for an operation."""
        return self.modules.get(str(node.target)) if node.op == "call_module" else None

    def place(self, node: fx.Node, kind: str) -> str:
        """A path for a layer without weights: that of the module it was, or one in it."""
        layer = str(node.meta["layer"])
        owner = self.owners.get(layer)
        path = f"{layer}.{kind}" if owner is not None and list(owner.children()) else layer
        for end in (i for i, sign in enumerate(path) if sign == "."):
            if path[:end] in self.modules:  # no layer stands within another
                path = path[:end] + path[end:].replace(".", "_")
        return path

    def insert(self, after: fx.Node, path: str, module: nn.Module) -> fx.Node:
        """A call of `module` on what `after` gives, which no node reads yet."""
        with self.graph.inserting_after(after):
            return self._called(after, path, module, (after,))

    def replace(
        self, node: fx.Node, path: str, module: nn.Module, inputs: tuple[fx.Node, ...]
    ) -> fx.Node:
        """A call of `module` on `inputs` instead of `node`."""
        with self.graph.inserting_before(node):
            made = self._called(node, path, module, inputs)
        node.replace_all_uses_with(made)
        self.graph.erase_node(node)
        return made

    def _called(
        self, like: fx.Node, path: str, module: nn.Module, inputs: tuple[fx.Node, ...]
    ) -> fx.Node:
        taken, number = (path := _free(path)), 0
        while self.modules.get(path, module) is not module:
            path = f"{taken}_{(number := number + 1)}"
        self.modules[path] = module
        made = self.graph.call_module(path, inputs)
        made.meta = dict(like.meta)
        if like in self.deep:
            self.deep.add(made)
        return made

    # ---------------------------------------------------------------------------------- layers

    def _visit(self, node: fx.Node) -> None:
        name, given = kind_of(node), arguments(node)
        if self.deep.intersection(node.all_input_nodes):
            self.deep.add(node)
        if name in ("conv2d", "linear") and self._value(given["weight"]) is not None:
            self._layer(node, name, given)
        elif name == "batch_norm":
            self._batch_norm(node, given)
        elif name in _DROPOUTS:
            if given["p"]:
                made = _DROPOUTS[name](given["p"])
                self.replace(node, self.place(node, name), made, (given["input"],))
            else:
                node.replace_all_uses_with(given["input"])
                self.graph.erase_node(node)
        elif name == "median_2x2":
            node.target = median_2x2  # as an operation it has no gradient
        elif name == "affine_round":
            raise UserError(
                f"{self.captured.model} is quantised by torch already: prepare the float network"
            )
        elif (quantiser := self.captured.quantiser(node)) is not None:
            self.replace(node, self.place(node, "act"), quantiser, (given["x"],))
        elif "device" in node.kwargs:  # a tensor that the program makes lies where the images do
            image = next(n for n in self.graph.nodes if n.op == "placeholder")
            with self.graph.inserting_before(node):
                where = self.graph.call_function(getattr, (image, "device"))
            node.kwargs = {**node.kwargs, "device": where}

    def _layer(self, node: fx.Node, name: str, given: dict[str, Any]) -> None:
        weight, bias = given["weight"], given["bias"]
        key = weight, repr({k: v for k, v in given.items() if k != "input"})
        if key not in self.paths:
            path = self._home(weight, "weight")
            if path is None:
                path = node.meta["layer"] + ".plain"
                self.computed[path] = ", ".join(weight.meta.get("sources", ())) or "constants"
            layer = _made(name, given, self._value(weight), node in self.deep)
            layer.weight, layer.weight_bits = self._parameter(weight), weight.meta.get("bits")
            layer.bias = None if bias is None else self._parameter(bias)
        else:
            path = self.paths[key]
            layer = self.modules[path]
        self.deep.add(node)
        made = self.replace(node, path, layer, (given["input"],))
        self.paths[key] = str(made.target)

    def _batch_norm(self, node: fx.Node, given: dict[str, Any]) -> None:
        """A batch norm that trains; one whose statistics are constants stays an operation."""
        weight, mean = given["weight"], given["running_mean"]
        path = self._home(mean, "running_mean") if weight is None else self._home(weight, "weight")
        trains = weight is not None and weight.meta.get("name") in self.trains
        if not (trains or isinstance(self.owners.get(path or ""), BatchNorm)):
            return
        shape, options = node.meta["val"].shape, (weight is not None, mean is not None)
        norm = _NORMS[len(shape)](int(shape[1]), given["eps"], given["momentum"], *options)
        if weight is not None:
            norm.weight, norm.bias = self._parameter(weight), self._parameter(given["bias"])
        if mean is not None:
            norm.running_mean.copy_(self._value(mean))
            norm.running_var.copy_(self._value(given["running_var"]))
            count = self.held.get(f"{path}.num_batches_tracked")
            norm.num_batches_tracked = None if count is None else count.detach().cpu().clone()
        self.replace(node, path or self.place(node, "norm"), norm, (given["input"],))

    # ------------------------------------------------------------------------------- constants

    def _value(self, node: Any) -> Tensor | None:
        """The tensor of a constant; of a weight on a grid the float one."""
        if not isinstance(node, fx.Node) or node.op != "get_attr":
            return None
        held: Tensor = getattr(self.captured.module, str(node.target))
        value: Tensor = node.meta.get("float", held)
        return value

    def _parameter(self, node: fx.Node, value: Tensor | None = None) -> nn.Parameter:
        """A copy of a constant, one for all that share it; it trains if what it is made of did."""
        sources = node.meta.get("sources", ())
        value = self._value(node) if value is None else value
        assert value is not None
        key = value.data_ptr(), value.shape, value.stride()
        if key not in self.parameters:
            if not bool(value.isfinite().all()):
                names = " and ".join(map(repr, sources))
                raise UserError(f"cannot prepare {self.captured.model}: {names} is not finite")
            trains = bool(self.trains.intersection(sources))
            copied = value.detach().to("cpu", torch.float32, copy=True)
            self.parameters[key] = nn.Parameter(copied, requires_grad=trains)
        for name in sources:
            self.unused.pop(name, None)
        return self.parameters[key]

    def _own(self, node: fx.Node) -> str | None:
        """The name of the model's tensor that a constant is; None for a computed one."""
        name, value = node.meta.get("name", ""), self._value(node)
        own = self.held.get(name)
        if own is None or value is None or own.shape != value.shape:
            return None
        return name if torch.equal(own.detach().to(value), value) else None

    def _home(self, node: fx.Node | None, ending: str) -> str | None:
        """The path of the layer that holds a constant as it is; None for a computed one."""
        name = None if node is None else self._own(node)
        if name is None or not name.endswith(ending):
            return None
        return name.removesuffix(ending).rstrip("._") or ending

    def _constant(self, node: fx.Node) -> None:
        """Give a constant that operations read the model's own name for it, or one of ours."""
        if not node.users:
            self.graph.erase_node(node)
            return
        name, sources = self._own(node), node.meta.get("sources", ())
        trains = bool(self.trains.intersection(sources))
        value = getattr(self.captured.module, str(node.target)).clone()
        if trains and name is None and _is_reshaped(whole := self.held[sources[0]], value):
            name, shape = sources[0], list(value.shape)
            with self.graph.inserting_after(node):
                view = self.graph.call_function(torch.ops.aten.reshape.default, (node, shape))
            node.replace_all_uses_with(view, delete_user_cb=lambda user: user is not view)
            value = self._parameter(node, whole.detach())
        elif trains:
            value = self._parameter(node)
        if name is not None and (trains or name in self.saved):
            node.target, node.meta["own"] = _free(name), value
        else:
            path = "constants." + (name or str(node.target)).replace(".", "_")
            self.replace(node, path, Constant(value, save=bool(sources)), ())


class Constant(nn.Module):
    """A tensor of the program that is none of the model's own."""

    def __init__(self, value: Tensor, *, save: bool) -> None:
        super().__init__()
        self.value: Tensor
        if isinstance(value, nn.Parameter):
            self.value = value
        else:
            self.register_buffer("value", value, persistent=save)

    def forward(self) -> Tensor:
        return self.value


def _free(path: str) -> str:
    """`path`, or another where it begins with what a graph module calls something else."""
    head, dot, rest = path.partition(".")
    return f"{head}_{dot}{rest}" if hasattr(fx.GraphModule, head) or head in _TAKEN else path


def _is_reshaped(whole: Tensor, value: Tensor) -> bool:
    same = whole.numel() == value.numel()
    return same and torch.equal(whole.detach().to(value).flatten(), value.flatten())


def is_tensor(node: fx.Node) -> bool:
    """Whether a node gives a tensor or several, and no size."""
    return isinstance(node.meta.get("val"), Tensor | list | tuple)


def _made(name: str, given: dict[str, Any], weight: Tensor | None, deep: bool) -> Any:
    """A layer of the options of an operation; its weight and bias are yet to be set."""
    assert weight is not None
    rows, columns, *sides = weight.shape
    if name == "linear":
        return QuantLinear(columns, rows)
    options = {key: given[key] for key in ("stride", "padding", "dilation", "groups")}
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    kind = QuantConv2d if deep else FirstConv
    return kind(columns * options["groups"], rows, tuple(sides), **options)


def _attach(root: nn.Module, path: str, value: nn.Module | Tensor) -> None:
    *owners, name = path.split(".")
    for part in owners:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    if isinstance(value, nn.Module):
        root.add_module(name, value)
    elif isinstance(value, nn.Parameter):
        root.register_parameter(name, value)
    else:
        root.register_buffer(name, value)


class MeasuredReLU(QuantReLU):
    """One whose range `calibrate` measures, so that it belongs to the state dict."""

    def __init__(self, bits: int | None = None) -> None:
        super().__init__(bits, high=1e30)

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.high, dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        self.high = float(state)


@torch.no_grad()
def calibrate(model: nn.Module, images: Tensor, bits: int | None) -> dict[str, str]:
    """Measure each `MeasuredReLU`, and `QuantSigned` without a peak, of `model` on `images`.

    Of a range for `bits` the end is that of least squared error. The model is then in eval mode,
    its quantisers as they were (all off for `bits` None). Returns what each is now, in words, by
    path. Raises `UserError` for values that are not finite.
    """
    quantisers = {name: m for name, m in model.named_modules() if isinstance(m, Quantizer)}
    own = {m: m.bits for m in quantisers.values()}
    found: dict[nn.Module, float] = {}

    def measure(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if isinstance(module, QuantSigned) and float(module.peak) == 0:
            grid = module if module.fixed else QuantSigned(bits, least=module.least)
            found[module] = float(grid.best_peak(args[0]))
        elif isinstance(module, MeasuredReLU):
            found[module] = _range(args[0].clamp_min(0), bits)

    handles = [m.register_forward_pre_hook(measure) for m in own]
    for quantiser in own:
        quantiser.bits = None
    with _untrained_by_the_batch(model.eval()):
        model(images if len(images) > 1 else torch.cat([images, images]))
    for handle in handles:
        handle.remove()
    for quantiser, width in own.items():
        quantiser.bits = None if bits is None else width
    return {name: _ranged(name, m, found.get(m)) for name, m in quantisers.items()}


def _ranged(name: str, module: Quantizer, found: float | None) -> str:
    """Give a quantiser the range that was found; says what it is now."""
    if found is not None and not math.isfinite(found):
        raise UserError(f"cannot prepare a network whose values are not finite at {name!r}")
    said = "full precision" if module.bits is None else f"{module.bits} bits"
    how = "" if found is None else "calibrated" if found else "nothing above 0 was seen"
    if isinstance(module, QuantSigned):
        if found is not None:
            module.peak.fill_(found)
        return f"{said}, peak {float(module.peak):.3g} {how}".rstrip()
    if isinstance(module, QuantReLU):
        if found is not None:
            module.high = found or 6.0
        return f"{said}, [0, {module.high:.3g}] {how}".rstrip()
    return said


def _range(x: Tensor, bits: int | None) -> float:
    """The end of the range of least squared error at `bits`: the largest value, or less."""
    most = float(x.max())
    if bits is None or most == 0 or not math.isfinite(most):
        return most
    sample = x.flatten()[:: max(1, x.numel() // 10_000)]

    def error(end: float) -> float:
        return float((fake_quantize(sample, bits, end) - sample).square().sum())

    return min((most * part / 16 for part in range(16, 3, -1)), key=error)


@contextmanager
def _untrained_by_the_batch(model: nn.Module) -> Iterator[None]:
    """Batch norms that have seen nothing normalise by the batch, as they will in training."""
    norms: list[Any] = [m for m in model.modules() if isinstance(m, BatchNorm)]
    seen = [m for m in norms if m.running_var is None or m.running_mean.any()]
    fresh = [m for m in norms if m not in seen and bool((m.running_var == 1).all())]
    kept = [(m.momentum, m.num_batches_tracked) for m in fresh]
    for norm in fresh:
        norm.train().momentum, norm.num_batches_tracked = 0.0, None
    yield
    for norm, (norm.momentum, norm.num_batches_tracked) in zip(fresh, kept, strict=True):
        norm.eval()
