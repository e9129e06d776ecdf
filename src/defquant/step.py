"""One step of training, launched anew or as one CUDA graph, and all that it holds on to."""

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from defquant.attacks import FGSM, PGD, RFGSM, Attack, RandomEps, untouched
from defquant.attacks.contract import draw_seed
from defquant.attacks.engine import Radius, look, rows_of
from defquant.attacks.first_order import FirstOrder
from defquant.attacks.graphs import alike, beside, recorded, tensor_float
from defquant.attacks.lint import lint_answer
from defquant.config import TrainConfig
from defquant.data import Dataset, to_unit
from defquant.data.dataset import cut
from defquant.distributed import Workers
from defquant.lipschitz import ConvexSum, OrthogonalPenalty, project_simplex_
from defquant.quantize import shared_by_all_bits

__all__ = ["Replay", "Training", "recordable", "take_step", "training_attack"]

_log = logging.getLogger(__name__)


def training_attack(config: TrainConfig) -> Attack | None:
    """The attack that `config.attack` names, at a fixed or at the paper's random eps."""
    walk = _walk(config)
    if walk is None or config.attack_eps is not None:
        return None if walk is None else walk.last
    return RandomEps(walk, config.attack_sigma)


def _walk(config: TrainConfig) -> FirstOrder | None:
    kinds: dict[str, type[FirstOrder]] = {"fgsm": FGSM, "rfgsm": RFGSM, "pgd": PGD}
    return None if config.attack == "none" else kinds[config.attack](config.attack_eps or 0.0)


@dataclass
class Training:
    """What one training holds on to; `start` makes it.

    Attributes:
        model: on the device, in the memory format `layout`.
        network: the model, wrapped where several processes train it.
        data: the training images, on the device.
        config: the settings.
        attack: makes adversarial examples in training; None for none.
        penalty: None where beta is 0.
        optimizer: SGD; weight decay spares the coefficients of the convex sums.
        device: where all of it lies.
        me: this process among those that train together.
        names: of the parameters.
        coefficients: whether there are convex sums to project.
        layout: channels last where `config` says so and the model takes it.
        top: the highest label.
        totals: of the epoch: loss, right answers, images, penalty; float64.
        replay: the step of full batches as one CUDA graph; None where each step is run anew.
    """

    model: nn.Module
    network: nn.Module
    data: Dataset
    config: TrainConfig
    attack: Attack | None
    penalty: OrthogonalPenalty | None
    optimizer: torch.optim.SGD
    device: torch.device
    me: Workers
    names: dict[nn.Parameter, str]
    coefficients: bool
    layout: torch.memory_format
    top: int
    totals: Tensor
    replay: "Replay | None" = None

    @classmethod
    def start(
        cls,
        model: nn.Module,
        data: Dataset,
        config: TrainConfig,
        attack: Attack | None,
        device: torch.device,
        me: Workers,
    ) -> Self:
        """Move `model` to `device` in place and make its optimiser and penalty."""
        layout = torch.channels_last if config.channels_last else torch.contiguous_format
        model.to(device=device, memory_format=layout)  # type: ignore[call-overload]
        if config.channels_last and not _runs_channels_last(model, data.images[:1].to(device)):
            layout = torch.contiguous_format
            model.to(memory_format=layout)  # type: ignore[call-overload]
        network: nn.Module = model
        if me.world > 1:
            ids = [device.index] if device.type == "cuda" else None
            network = DistributedDataParallel(model, device_ids=ids)
        penalty = OrthogonalPenalty(model, config.beta) if config.beta else None
        names = {parameter: name for name, parameter in model.named_parameters()}
        coefficients = [m.alpha for m in model.modules() if isinstance(m, ConvexSum)]
        optimizer = _optimizer(names, coefficients, config)
        return cls(
            model, network, data, config, attack, penalty, optimizer, device, me, names,
            bool(coefficients), layout, int(data.labels.max()) if len(data) else -1,
            torch.zeros(4, dtype=torch.float64, device=device),
        )  # fmt: skip

    @property
    def how(self) -> str:
        """A word for the log: how the steps run; none on a CPU, where there is one way."""
        return "" if self.device.type == "cpu" else self.replay.how if self.replay else "eager"

    def learn_at(self, lr: float) -> None:
        """Set the learning rate; on a GPU in place, where a graph reads it."""
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr

    def momentum(self) -> dict[str, Tensor]:
        """The optimiser's momentum by parameter name; empty before the first step."""
        buffers = ((p, self.optimizer.state[p].get("momentum_buffer")) for p in self.names)
        return {self.names[p]: buffer for p, buffer in buffers if buffer is not None}

    def load_momentum(self, saved: Mapping[str, Tensor]) -> None:
        """Go on from what `momentum` returned."""
        for parameter, name in self.names.items():
            if name in saved:
                buffer = torch.empty_like(parameter).copy_(saved[name])
                self.optimizer.state[parameter]["momentum_buffer"] = buffer.detach()

    def moved(self) -> list[Tensor]:
        """All that a step changes; momentum is made where there is none yet, as zeros."""
        trained = [parameter for parameter in self.names if parameter.requires_grad]
        momenta = []
        if self.config.momentum:
            for parameter in trained:
                kept = self.optimizer.state[parameter]
                if kept.get("momentum_buffer") is None:
                    kept["momentum_buffer"] = torch.zeros_like(parameter).detach()
                momenta.append(kept["momentum_buffer"])
        return [*trained, *self.model.buffers(), *momenta, self.totals]


def _runs_channels_last(model: nn.Module, images: Tensor) -> bool:
    """False for a model that reshapes by `view`, which knows the usual order of memory alone.

    And for one with strided 1x1 convolutions of channels that are no multiple of 8: with 3 to 7
    oneDNN (torch 2.13, AVX2) writes the gradient of their weights out of bounds, channels last.
    """
    convolutions = (m for m in model.modules() if isinstance(m, nn.Conv2d))
    skips = (m for m in convolutions if m.kernel_size == (1, 1) and m.stride != (1, 1))
    if any(m.in_channels % 8 for m in skips):
        return False
    with untouched(model), torch.no_grad():
        try:
            model(to_unit(images).contiguous(memory_format=torch.channels_last))
        except RuntimeError as error:
            return "view size is not compatible" not in str(error)
    return True


def _optimizer(
    parameters: Iterable[nn.Parameter], coefficients: Sequence[nn.Parameter], config: TrainConfig
) -> torch.optim.SGD:
    """SGD whose weight decay spares the coefficients of the convex sums."""
    convex = set(coefficients)
    weights = [parameter for parameter in parameters if parameter not in convex]
    groups = [{"params": weights}]
    if coefficients:
        groups.append({"params": list(coefficients), "weight_decay": 0.0})  # type: ignore[dict-item]
    optimizer = torch.optim.SGD(
        groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov,
        weight_decay=config.weight_decay, fused=True,
    )  # fmt: skip
    for group in optimizer.param_groups:
        device = group["params"][0].device if group["params"] else torch.device("cpu")
        if device.type == "cuda":
            group["lr"] = torch.tensor(config.lr, device=device)
    return optimizer


def take_step(state: Training, draws: Tensor, step: int, index: int) -> None:
    """One optimiser step, each operation launched anew, on any device and in any company."""
    x, y = _batch(state, draws)
    whole = min(state.config.batch_size, len(state.data) - index * state.config.batch_size)
    x = _attacked(state, x, y, step)
    _update(state, state.network, x, y, share=len(x) * state.me.world / whole)


def _batch(state: Training, draws: Tensor) -> tuple[Tensor, Tensor]:
    x, y = cut(state.data, draws, state.config.augment)
    return x.contiguous(memory_format=state.layout), y


def _update(
    state: Training, network: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, share: float
) -> None:
    """Forward, backward, penalty, clip, optimiser, projection, sums: nothing waits for the device.

    `share`: this process's images over an even share; it weighs the mean that DDP takes.
    """
    config, model, penalty, kind = state.config, state.model, state.penalty, state.device.type
    tf32, cache = config.tf32 or None, kind != "cuda"  # no graph may hold cast weights
    fused = beside(penalty.gradients, kind) if penalty and config.penalty == "fused" else None
    autocast = torch.autocast(kind, torch.bfloat16, enabled=config.amp, cache_enabled=cache)
    with tensor_float(tf32), autocast:
        logits = network(x)
    lint_answer(logits, len(x), state.top)
    loss = nn.functional.cross_entropy(logits.float(), y)
    value = penalty.penalty() if penalty and config.penalty == "loss" else loss.new_zeros(())
    state.optimizer.zero_grad(set_to_none=True)
    objective = loss if share == 1 else loss * share
    with tensor_float(tf32):
        (objective + value if value.requires_grad else objective).backward()
    if penalty and fused:
        value = penalty.add_grad_(fused())
    if config.clip:
        nn.utils.clip_grad_norm_(model.parameters(), config.clip)
    state.optimizer.step()
    if penalty and config.penalty == "parseval":
        penalty.retract_()
        with torch.no_grad():
            value = penalty.penalty()
    if state.coefficients:
        project_simplex_(model)
    right = (logits.argmax(1) == y).sum()
    state.totals += (
        torch.stack([loss * len(x), right, torch.full_like(right, len(x)), value]).detach().double()
    )


def _attacked(state: Training, x: Tensor, y: Tensor, step: int) -> Tensor:
    """`x` with the first `mix` share of it made adversarial; outside autocast, in float32."""
    if state.attack is None or state.config.mix == 0:
        return x
    share = math.ceil(state.config.mix * len(x))
    generator = _generator(state, step)
    adversarial = state.attack(state.model, x[:share], y[:share], generator=generator).detach()
    return adversarial if share == len(x) else torch.cat([adversarial, x[share:]])


def _generator(state: Training, step: int) -> torch.Generator:
    """Of the draws of one step's attack, in this process."""
    seed = (state.config.seed * 1_000_003 + step) * state.me.world + state.me.rank
    return torch.Generator().manual_seed(seed)


WORTH_COMPILING = 400_000
"""Images of a training from which on inductor's half minute comes back."""


class Replay:
    """The step of a full batch, recorded once: `_update`, batch and attack on tensors that stay.

    What differs from step to step is copied into them: the batch's draws, the attack's seed and
    radii (and the learning rate, by `Training.learn_at`).
    """

    def __init__(self, state: Training, walk: FirstOrder | None, compiled: bool) -> None:
        config, device = state.config, state.device
        self._state, self._walk = state, walk
        self._rows = math.ceil(config.mix * config.batch_size)
        self._draws = torch.zeros(4, config.batch_size, dtype=torch.int64, device=device)
        self._seed = torch.zeros((), dtype=torch.int64, device=device)
        self._eps = torch.zeros(self._rows, 1, 1, 1, device=device)
        self.how = "compiled graph" if compiled else "graph"
        with shared_by_all_bits(state.model) if compiled else nullcontext() as levels:
            network = (
                torch.compile(state.model, dynamic=False, fullgraph=True)
                if compiled
                else state.model
            )
            self._run = recorded(partial(self._body, network), state.moved(), device)
        self._read = network, levels  # by the graph, which does not hold them

    @classmethod
    def of(cls, state: Training, own_attack: bool) -> "Replay | None":
        """None where a step cannot be recorded: on a CPU, among several processes, ..."""
        config, walk = state.config, _walk(state.config) if state.config.mix else None
        full = len(state.data) >= config.batch_size
        random_steps = walk is not None and isinstance(walk, PGD) and config.attack_eps is None
        fit = full and own_attack and not random_steps and recordable(state)
        images = config.epochs * len(state.data)
        worth = images >= WORTH_COMPILING and not config.deterministic
        for compiled in ([True] if worth else []) + [False]:
            if fit:
                state.model.train()
                try:
                    return cls(state, walk, compiled)
                except Exception as error:  # what refuses to be recorded is run step by step
                    _log.info("%s: %s", "compiled" if compiled else "graph", error)
                    if state.device.type == "cuda":
                        torch.cuda.empty_cache()
        return None

    def _body(self, network: Callable[[Tensor], Tensor]) -> None:
        x, y = _batch(self._state, self._draws)
        if self._walk is not None:
            n, fixed = self._rows, self._state.config.attack_eps
            eps = self._eps if fixed is None else fixed
            made = _walked(self._state.model, self._walk, x[:n], y[:n], self._seed, eps)
            x = made if n == len(x) else torch.cat([made, x[n:]])
            x = x.contiguous(memory_format=self._state.layout)
        _update(self._state, network, x, y, share=1)

    def __call__(self, draws: Tensor, step: int) -> None:
        """Run the step for the batch that `draws` names."""
        self._draws.copy_(draws)
        if self._walk is not None:
            generator = _generator(self._state, step)
            if isinstance(attack := self._state.attack, RandomEps):
                self._eps.copy_(attack.radii(self._rows, generator), non_blocking=True)
            self._seed.fill_(draw_seed(generator))
        self._run()


def recordable(state: Training) -> bool:
    """On a GPU, alone, and of modules known to do the same in each step."""
    return state.device.type == "cuda" and state.me.world == 1 and alike(state.model)


@torch.no_grad()
def _walked(
    model: nn.Module, attack: FirstOrder, x: Tensor, y: Tensor, seed: Tensor, eps: Radius
) -> Tensor:
    """`attack.last`, without a look at what the device says; leaves `model` in training mode."""
    every = torch.arange(len(x), device=x.device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    model.eval()
    rows = attack.begin(rows_of(every, x, y, every, y[:, None]), eps, seed)
    for _ in range(attack.walk.steps):
        rows = attack.advance(rows, look((model,), rows, attack.plan), eps, 0)
    model.train()
    for parameter in trained:
        parameter.requires_grad_()
    return rows["at"]
