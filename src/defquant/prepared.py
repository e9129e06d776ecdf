"""Any image classifier as a quantised copy to train, with an account of every layer."""

import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from defquant.captured import MOVES, arguments, bare, border, capture, kind_of
from defquant.config import check_bits
from defquant.data import Images, images_of, to_unit
from defquant.errors import UserError
from defquant.integers import finest
from defquant.lipschitz import ConvexSum
from defquant.quantize import QuantBranch, Quantizer, QuantReLU, QuantSigned
from defquant.rebuilt import MeasuredReLU, Rebuilt, calibrate, is_tensor
from defquant.weights import QuantConv2d, QuantLinear

__all__ = ["Account", "Part", "Prepared", "prepare"]

_KEEPS = MOVES | {
    "adaptive_max_pool2d", "cat", "clone", "constant_pad_nd", "contiguous", "detach", "max_pool2d",
    "max_pool2d_with_indices", "pad", "stack",
}  # fmt: skip
"""Operations whose output has the values of their inputs."""
_LEAST = {
    "gelu": 0.17, "hardsigmoid": 0.0, "hardswish": 0.375, "mish": 0.309,
    "sigmoid": 0.0, "silu": 0.2785, "softmax": 0.0, "softplus": 0.0,
}  # fmt: skip
"""How far the values of an operation reach below 0."""
_GATES = {"hardsigmoid", "sigmoid", "softmax"}
_CLAMPS = {"clamp", "clamp_min", "hardtanh", "relu", "relu6"}
_POOLS = {"adaptive_avg_pool2d", "avg_pool2d", "mean"}
_DROPOUT = nn.Dropout | nn.Dropout2d | nn.AlphaDropout


@dataclass(frozen=True)
class Part:
    """One layer of a prepared network: its path, what it is, how it is quantised or why not.

    `integers`: whether it can run in integers when it is exported; None for what has no arithmetic.
    """

    layer: str
    kind: str
    how: str
    integers: bool | None = None


@dataclass(frozen=True)
class Account:
    """What `prepare` made of each layer, in order; `print` it for a table."""

    parts: tuple[Part, ...]
    images: int

    def __str__(self) -> str:
        runs = {True: "integers", False: "float", None: ""}
        rows = [(p.layer, p.kind, runs[p.integers], p.how) for p in self.parts]
        sides = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(t.ljust(n) for t, n in zip(row, sides, strict=True)) for row in rows]
        layers = [p for p in self.parts if p.kind in ("convolution", "linear")]
        whole = sum(p.integers is True for p in layers)
        summary = f"{whole} of {len(layers)} convolutions and linear layers in integers"
        if any("calibrated" in part.how for part in self.parts):
            summary += f"; ranges calibrated on {self.images} images"
        return "\n".join([*(line.rstrip() for line in lines), summary])


class Prepared(fx.GraphModule):
    """A quantised copy of a network: train, attack, diagnose and export it as any other."""

    @property
    def account(self) -> Account:
        """What became of each layer when it was prepared."""
        account: Account = self.meta["account"]
        return account


def prepare(
    model: nn.Module,
    example: Tensor | Images,
    bits: int | None = 4,
    weight_bits: int | None = None,
    *,
    ranges: float | Literal["calibrate"] = "calibrate",
    convex: bool = False,
    round_sums: bool = False,
) -> Prepared:
    """A copy of `model` whose activations, and weights if asked, are quantised; trainable.

    ReLU, ReLU6 and the like, as modules, functions or methods, become `QuantReLU`. What else a
    convolution or linear layer reads (GELU, SiLU, a norm, a sum, a linear bottleneck) goes through
    a `QuantSigned` of the same bits. With `weight_bits` the network is made to run in integers:
    what is between layers and of no activation gets 8 bits whatever `bits` are (`QuantBranch`):
    convolutions that no quantiser follows, pooled features, and pixels that the network normalises
    itself. Weights of the first and the last layer have 8 bits, and 7 beside codes of 8, where
    products of 8 and 8 would saturate. All else stays in float; `.account` says what and why.

    State-dict keys are the model's own, and those of measured ranges, so that what was trained
    loads into another copy. A weight that is computed (weight norm, pruning, standardisation)
    becomes a plain one, `<layer>.plain.weight`, and trains as such.

    Args:
        model: images (n, c, h, w) in [0, 1] to logits; left as it was found.
        example: such images, or data to take 64 of: their size is that of all later images, and
            ranges are measured on them. Take training images.
        bits: of activations, 1 to 8 (2 to 8 where there are signed ones), or None for no rounding;
            `set_bits` changes them.
        weight_bits: 8, 4, 2 or None for float weights.
        ranges: the end of ReLU's range: `calibrate` takes, of each, the one of least squared error
            on `example`, as the scale of a user's network is not known; 6.0 is the paper's. ReLU6
            and `hardtanh` keep their own. Batch norms that have seen no image use the batch's
            statistics meanwhile.
        convex: residual sums become `ConvexSum`.
        round_sums: with `weight_bits`, residual sums that no activation quantises get 8 bits, too,
            so that they, and batch norms behind them, run in integers. Layer norms do not, and deep
            streams reach far: measure what it costs.

    Raises:
        UserError: what cannot be captured (`capture`), weights or ranges that are not finite,
            images outside [0, 1], nothing to quantise.
    """
    images = to_unit(images_of(example, 64)).detach().cpu()
    check_bits(bits)
    if weight_bits not in (None, 2, 4, 8):
        raise UserError(f"weight_bits must be 8, 4 or 2, or none; found {weight_bits!r}")
    if ranges != "calibrate" and not (isinstance(ranges, int | float) and 0 < ranges < math.inf):
        raise UserError(f"ranges must be 'calibrate' or a positive end of [0, h]; found {ranges!r}")
    if round_sums and weight_bits is None:
        raise UserError("round_sums needs weight_bits: without them nothing runs in integers")
    model = bare(model)
    with torch.random.fork_rng(devices=()):  # layers are made with weights of chance, all replaced
        net = Rebuilt(capture(model, images, trainable=True), model)
        quantising = _Quantising(net, bits, weight_bits)
        quantising.run(None if ranges == "calibrate" else float(ranges), convex=convex)
        quantising.end_in_integers(round_sums)
    prepared = net.finish(Prepared)
    widths = (getattr(module, "weight_bits", None) for module in prepared.modules())
    quantisers = [module for module in prepared.modules() if isinstance(module, Quantizer)]
    if not quantisers and not any(widths):
        raise UserError(
            f"{type(model).__name__} has nothing to quantise: no activation that a convolution or "
            "linear layer reads; give weight_bits for its weights"
        )
    words = calibrate(prepared, images[:256], bits)
    prepared.meta["account"] = Account(tuple(quantising.parts(words)), min(256, len(images)))
    device = next((tensor.device for tensor in model.state_dict().values()), images.device)
    return prepared.train(model.training).to(device)


class _Quantising:
    """Puts quantisers into a rebuilt network; `codes` are the bits of each value on a grid."""

    def __init__(self, net: Rebuilt, bits: int | None, weight_bits: int | None) -> None:
        self.net, self.bits, self.weight_bits = net, bits, weight_bits
        self.codes: dict[fx.Node, int] = {}
        self.least: dict[fx.Node, float] = {}  # of values: how far they reach below 0, where known
        self.signed: dict[tuple[fx.Node, type], fx.Node] = {}
        self.notes: dict[str, list[str]] = {}
        self.whole: set[fx.Node] = set()  # convolutions and linear layers in integers

    def run(self, high: float | None, *, convex: bool) -> None:
        """`high` ends the ranges of ReLUs; None for those to be measured."""
        for node in list(self.net.graph.nodes):
            module = self.net.module(node)
            if node.op == "placeholder":
                self.codes[node], self.least[node] = 8, 0.0
            elif isinstance(module, QuantConv2d | QuantLinear):
                (x,), convolves = node.all_input_nodes, isinstance(module, QuantConv2d)
                node.replace_input_with(x, self._read(x, str(node.target), convolves))
            elif isinstance(module, Quantizer):
                deep = node in self.net.deep  # what quantises pixels keeps its bits
                module.bits = self.bits if module.fixed is None and deep else module.bits
                self.codes[node] = module.bits or 8
            elif module is None and node in self.net.deep:
                node = self._replaced(node, high, convex)
            if module is None or isinstance(module, _DROPOUT):
                self._pass_on(node)
            if (least := self._least_of(node)) is not None:
                self.least[node] = least

    def _replaced(self, node: fx.Node, high: float | None, convex: bool) -> fx.Node:
        """A module instead of a ReLU or a residual sum."""
        inputs = tuple(node.all_input_nodes)
        if (end := _end(node)) is not None:
            end = high if end == math.inf else end
            made = MeasuredReLU(self.bits) if end is None else QuantReLU(self.bits, end)
            node = self.net.replace(node, self.net.place(node, kind_of(node)), made, inputs[:1])
            self.codes[node] = self.bits or 8
        elif convex and _residual(node, inputs):
            node = self.net.replace(node, self.net.place(node, "sum"), ConvexSum(2), inputs)
        return node

    def _keeps(self, node: fx.Node) -> bool:
        """Whether an operation gives the values it reads, or their share in training."""
        if "pad" in kind_of(node) and (arguments(node).get("value") or 0) != 0:
            return False
        return kind_of(node) in _KEEPS or isinstance(self.net.module(node), _DROPOUT)

    def _pass_on(self, node: fx.Node) -> None:
        widths = [self.codes.get(n) for n in node.all_input_nodes if is_tensor(n)]
        if widths and self._keeps(node) and None not in widths:
            self.codes[node] = max(width or 0 for width in widths)

    def _carries(self, node: fx.Node) -> bool:
        """Whether an exported file does it to codes, so that a convolution may read them behind.

        Zeros around them go into that convolution.
        """
        kind, dilation = kind_of(node), arguments(node).get("dilation", 1)
        if kind.startswith("max_pool2d"):
            return dilation in (1, [1], [1, 1])
        if "pad" in kind:
            read = all(isinstance(self.net.module(user), QuantConv2d) for user in node.users)
            return read and border(node) is not None
        return kind in ("clone", "contiguous", "detach") or isinstance(
            self.net.module(node), _DROPOUT
        )

    def _carried(self, node: fx.Node) -> bool:
        """Whether an exported convolution that reads `node` reads codes."""
        while self._carries(node):
            node = node.all_input_nodes[0]
        return node.op == "placeholder" or isinstance(self.net.module(node), Quantizer)

    def _least_of(self, node: fx.Node) -> float | None:
        read = [n for n in node.all_input_nodes if is_tensor(n)]
        if isinstance(self.net.module(node), QuantReLU):
            return 0.0
        if kind_of(node) == "mul" and len(read) == 2:  # by a gate in [0, 1]
            read = [n for n in read if kind_of(self._origin(n)) not in _GATES][:1] or read[:1]
        elif not self._keeps(node) and kind_of(node) not in _POOLS:
            return _LEAST.get(kind_of(node))
        known = [self.least.get(n) for n in read]
        return None if None in known else max((least or 0.0 for least in known), default=None)

    def _origin(self, node: fx.Node) -> fx.Node:
        """What made the values that operations only moved since."""
        while self._keeps(node) and node not in self.codes:
            node = next(n for n in node.all_input_nodes if is_tensor(n))
        return node

    def _read(self, x: fx.Node, path: str, convolves: bool) -> fx.Node:
        """What the layer at `path` reads instead of `x`: codes, where it is to read some."""
        chain, origin = [x], self._origin(x)
        while chain[-1] is not origin and len(chain[-1].users) == 1:
            before, *others = chain[-1].all_input_nodes
            if others or not is_tensor(before) or (convolves and not self._carries(chain[-1])):
                break
            chain.append(before)  # before what only moves values
        whole = x in self.codes and (not convolves or self._carried(x))
        between = x in self.codes or x not in self.net.deep or kind_of(origin) in _POOLS
        if whole or (between and self.weight_bits is None):
            return x
        at, kind = chain[-1], QuantBranch if between else QuantSigned
        if (at, kind) not in self.signed:
            least = self.least.get(at)
            made = QuantBranch(least=least) if between else QuantSigned(self.bits, least=least)
            self.signed[at, kind] = self.net.insert(at, f"{path}_in", made)
        codes = self.signed[at, kind]
        self.codes[codes] = 8 if between else self.bits or 8
        if at is x:
            return codes
        chain[-2].replace_input_with(at, codes)
        self.codes |= dict.fromkeys(chain[:-1], self.codes[codes])
        return x

    def end_in_integers(self, round_sums: bool) -> None:
        """A quantiser behind each convolution with its norm, and sum if asked, that none follows.

        And weights of as many bits as fit beside what they read.
        """
        for node in list(self.net.graph.nodes) if self.weight_bits is not None else ():
            module, end, users = self.net.module(node), node, list(node.users)
            sums = isinstance(module, ConvexSum) or _residual(node, tuple(node.all_input_nodes))
            if sums and round_sums:
                path = f"{self.net.place(node, 'sum')}_out"
            elif isinstance(module, QuantConv2d):
                norm = isinstance(self.net.module(users[0]), BatchNorm)
                if len(users) == 1 and (norm or kind_of(users[0]) == "batch_norm"):
                    end = users[0]
                path = f"{end.target}_out"
            else:
                continue
            if not all(self._lands(user) for user in end.users):
                made = self.net.insert(end, path, QuantBranch())
                end.replace_all_uses_with(made, delete_user_cb=partial(operator.is_not, made))
        self._set_weight_bits()

    def _lands(self, node: fx.Node) -> bool:
        """Whether what `node` reads goes to a quantiser, or is the logits."""
        if node.op == "output" or isinstance(self.net.module(node), Quantizer):
            return True
        return self._keeps(node) and all(self._lands(user) for user in node.users)

    def _set_weight_bits(self) -> None:
        below: set[fx.Node] = set()  # what a layer reads, at once or later
        for node in reversed(self.net.graph.nodes):
            layer, follows = self.net.module(node), node in below
            if follows or isinstance(layer, QuantConv2d | QuantLinear):
                below |= set(node.all_input_nodes)
            if not isinstance(layer, QuantConv2d | QuantLinear):
                continue
            (source,), path = node.all_input_nodes, str(node.target)
            width = self.codes.get(source)
            edge = "first layer" if source not in self.net.deep else "last layer" * (not follows)
            notes = [f"reads {width}-bit codes" if width else "reads floats", edge]
            if self.weight_bits is not None:
                wanted = 8 if edge else self.weight_bits
                layer.weight_bits = min(wanted, finest(2**width - 1) if width else 8)
                if layer.weight_bits < wanted:
                    notes.append(f"{wanted} bits would not fit beside these")
            if path in self.net.computed:
                notes.append(f"a plain weight now, computed from {self.net.computed[path]}")
            carried = isinstance(layer, QuantLinear) or self._carried(source)
            if width and not carried:
                notes.append(f"no codes any more behind {kind_of(source)}")
            if None not in (width, layer.weight_bits, self.bits) and carried:
                self.whole.add(node)
            self.notes[path] = [note for note in notes if note]

    def parts(self, ranges: dict[str, str]) -> Iterator[Part]:
        """One for each layer in order, then what was left out; `ranges` by quantiser."""
        yield from filter(None, (self._part(node, ranges) for node in self.net.graph.nodes))
        for path in dict.fromkeys(name.rpartition(".")[0] for name in self.net.unused):
            kind = type(self.net.owners[path]).__name__
            yield Part(path, kind, "left out: no part of what the network computes in eval mode")
        for path, owner in self.net.owners.items():  # stochastic depth, dropout of attention
            rates = (getattr(owner, name, 0) for name in ("drop_prob", "dropout", "p"))
            drops = any(isinstance(rate, float) and 0 < rate < 1 for rate in rates)
            if drops and not isinstance(owner, _DROPOUT):
                kind = type(owner).__name__
                yield Part(path, kind, "its dropout is left out: it acts in training alone")

    def _part(self, node: fx.Node, ranges: dict[str, str]) -> Part | None:
        module, path = self.net.module(node), str(node.target)
        if isinstance(module, QuantConv2d | QuantLinear):
            bits = module.weight_bits
            kind = "linear" if isinstance(module, QuantLinear) else "convolution"
            words = "float weights" if bits is None else f"weights of {bits} bits"
            return Part(path, kind, "; ".join([words, *self.notes[path]]), node in self.whole)
        if isinstance(module, Quantizer):
            kind = type(module).__name__.replace("Measured", "Quant")
            return Part(path, kind, ranges[path], module.bits is not None)
        if isinstance(module, BatchNorm):
            merged = node.all_input_nodes[0] in self.whole
            return Part(path, "batch norm", "part of the layer before" * merged, merged)
        if isinstance(module, ConvexSum):
            return Part(path, "convex sum", "", False)
        if isinstance(module, _DROPOUT):
            return Part(path, "dropout", f"p = {module.p:g} in training")
        if module is None and kind_of(node) and is_tensor(node) and not self._keeps(node):
            return Part(str(node.meta["layer"]), kind_of(node), "", False)
        return None


def _end(node: fx.Node) -> float | None:
    """h of an operation that clamps to [0, h], infinity for ReLU; None for any other."""
    if kind_of(node) not in _CLAMPS or len(node.all_input_nodes) > 1:
        return None
    ends = torch.tensor([-math.inf, math.inf], dtype=torch.float64)
    args = fx.node.map_arg(node.args, lambda _: ends)
    low, high = node.target(*args, **node.kwargs).tolist()  # type: ignore[operator]
    return float(high) if low == 0 else None


def _residual(node: fx.Node, inputs: tuple[fx.Node, ...]) -> bool:
    """Whether it is x + y of two values of one shape that depend on the image."""
    if kind_of(node) != "add" or len(inputs) != 2 or node.kwargs.get("alpha", 1) != 1:
        return False
    if any(n.op == "get_attr" for n in inputs):
        return False
    a, b = (n.meta["val"] for n in inputs)
    return isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape
