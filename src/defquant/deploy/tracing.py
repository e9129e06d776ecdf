"""The graph of a module's layers, as torch.fx follows its forward."""

from typing import Any

from torch import fx, nn

from defquant.errors import UserError
from defquant.lipschitz import ConvexSum
from defquant.quantize import QuantBranch, Quantizer

__all__ = ["named", "over_image", "pair", "sources", "trace"]


class _Tracer(fx.Tracer):
    """Sees through containers and our networks, not into layers."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        layers = Quantizer | QuantBranch | ConvexSum | nn.Conv2d | nn.Linear
        return isinstance(m, layers) or super().is_leaf_module(m, module_qualified_name)


def trace(model: nn.Module) -> fx.Graph:
    try:
        return _Tracer().trace(model)
    except Exception as error:  # whatever the model's own code raises under tracing
        raise UserError(
            f"cannot export {type(model).__name__}: its forward cannot be followed ({error})"
        ) from None


def sources(node: fx.Node) -> list[fx.Node]:
    """The values that `node` takes, in order, one that is taken twice twice."""
    return [arg for arg in node.args if isinstance(arg, fx.Node)]


def named(node: fx.Node) -> str:
    """The name of a node's result, which the ends of a `Program` leave free."""
    return f"layer.{node.name}" if node.name in ("image", "pixels", "logits") else node.name


def over_image(node: fx.Node) -> bool:
    """Whether a mean is over height and width alone, which go."""
    given = (*node.args[1:], *node.kwargs.values())
    return len(given) == 1 and given[0] in ((2, 3), [2, 3], (-2, -1), [-2, -1])


def pair(value: Any) -> tuple[int, int]:
    return (int(value), int(value)) if isinstance(value, int) else (int(value[0]), int(value[1]))
