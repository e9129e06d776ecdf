"""Images as every diagnosis takes them: checked, in [0, 1], on the model's device."""

from torch import Tensor, nn

from defquant.attacks.base import lint_images, lint_model
from defquant.data import Dataset, to_unit
from defquant.evaluate import Images

__all__ = ["unit_images"]


def unit_images(model: nn.Module, data: Images) -> tuple[Tensor, Tensor]:
    """Images (n, c, h, w) in [0, 1] and labels (n,). Raises `UserError` where they are not."""
    images, labels = (data.images, data.labels) if isinstance(data, Dataset) else data
    parameter = next(model.parameters(), None)
    device = images.device if parameter is None else parameter.device
    lint_images(images, labels)
    x, y = to_unit(images.to(device)), labels.to(device)
    lint_model(model, x[:8], y)
    return x, y
