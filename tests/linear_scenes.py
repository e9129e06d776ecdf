"""Networks whose exact answer is known: linear ones; and a small one."""

import torch
from torch import Tensor, nn

import defquant as dq


class LinearNet(nn.Module):
    """Logits W (x - 1/2)."""

    def __init__(self, shape: tuple[int, int, int] = (3, 4, 4), classes: int = 5) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        size = shape[0] * shape[1] * shape[2]
        self.weight = nn.Parameter(torch.randn(classes, size, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        return (x - 0.5).flatten(1) @ self.weight.T

    @torch.no_grad()
    def radii(self, x: Tensor, y: Tensor) -> Tensor:
        """Distance in L-infinity to each class's boundary with the label's, far from the box.

        (z_y - z_t) / ||w_y - w_t||_1, (n, classes); inf for the label itself.
        """
        logits = self(x)
        gaps = logits.gather(1, y[:, None]) - logits
        norms = (self.weight[y][:, None] - self.weight[None]).abs().sum(2)
        return torch.where(norms > 0, gaps / norms, torch.inf)


def scene(n: int = 40, classes: int = 5) -> tuple[LinearNet, Tensor, Tensor]:
    """Images in [0.3, 0.7], rightly classified; eps up to 0.3 never leaves [0, 1]."""
    model = LinearNet(classes=classes)
    x = 0.3 + 0.4 * torch.rand(n, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    return model.eval(), x, model(x).argmax(1).detach()


def middle_eps(model: LinearNet, x: Tensor, y: Tensor) -> tuple[float, int]:
    """An eps in the widest gap between the middle examples' radii, and how many stand at it."""
    radii = model.radii(x, y).amin(1).sort().values
    third = len(radii) // 3
    place = third + 1 + int(radii[third:-third].diff().argmax())
    return float(radii[place - 1] + radii[place]) / 2, len(radii) - place


def network(bits: int | None = 4) -> nn.Module:
    """An untrained Wide ResNet of 4 classes whose batch norm has seen images."""
    torch.manual_seed(0)
    model = dq.wide_resnet(10, 1, bits=bits, in_channels=1, num_classes=4)
    for _ in range(20):
        model(torch.rand(32, 1, 8, 8))
    return model.eval()
