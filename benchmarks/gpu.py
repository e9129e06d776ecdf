"""One GPU, checked and timed in under 4 minutes: quantisers, the recorded training step, attacks.

`PYTHONPATH=src python benchmarks/gpu.py --json gpu.json` needs no installed package. Each part
stands alone: one that fails prints its reason in a line and the rest goes on; one that would begin
after `--seconds` is left out, and says so. `--device cpu` tries the script on tiny images.
"""

import argparse
import json
import logging
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import defquant as dq
import defquant.attacks.look as looking
from defquant import step
from defquant.attacks import Attack, engine, untouched
from defquant.attacks.graphs import recorded, tensor_float
from defquant.config import TrainConfig
from defquant.data import Dataset, batches, load
from defquant.evaluate import correct, robust
from defquant.quantize import QuantBranch, Quantizer, QuantTanh

Found = dict[str, Any]


class Scene:
    """What the parts share: device, images, sizes, and the networks that were trained."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.device, self.quick = torch.device(options.device), options.quick
        self.ends = time.perf_counter() + options.seconds
        self.cpu = self.device.type == "cpu"
        self.net = (10, 1) if self.cpu else (16, 4)
        self.batch = 16 if self.cpu else 256
        n = 160 if self.cpu else 12_800 if self.quick else 51_200
        self.data = (
            synthetic(n, 8 if self.cpu else 32)
            if options.data_root is None
            else load("cifar10", options.data_root)
        )
        self.data = self.data.to(self.device)
        self.config = TrainConfig(
            epochs=3,
            batch_size=self.batch,
            lr=0.1,
            clip=1.0,
            device=options.device,
            amp=not self.cpu,
        )
        self.trained: nn.Module | None = None

    def model(
        self, bits: int | None = None, convex: bool = False, small: bool = False
    ) -> nn.Module:
        depth, width = (10, 1) if small else self.net
        torch.manual_seed(0)
        return dq.wide_resnet(depth, width, bits=bits, convex=convex)

    def wait(self) -> float:
        if not self.cpu:
            torch.cuda.synchronize()
        return time.perf_counter()


def synthetic(n: int, size: int) -> Dataset:
    """Ten random patterns under noise: a network learns them in an epoch; no image of anything."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 10, (n,), generator=generator)
    patterns = torch.randint(0, 65, (10, 3, size, size), generator=generator)
    noise = torch.randint(0, 192, (n, 3, size, size), generator=generator)
    images = (patterns[labels] + noise).to(torch.uint8)
    return Dataset(images, labels, tuple("0123456789"), "random patterns", flip=False, shift=4)


@contextmanager
def heard(name: str) -> Iterator[list[str]]:
    """What the module of that name logs."""
    words: list[str] = []

    class Words(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            words.append(" ".join(record.getMessage().split())[:300])

    log, handler = logging.getLogger(name), Words()
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield words
    finally:
        log.removeHandler(handler)


@contextmanager
def stepping(how: str) -> Iterator[list[str]]:
    """Train `eager`, by `graph` or by `compiled` graph; gives the reasons where one is refused."""
    before, fits = step.WORTH_COMPILING, step.recordable
    step.WORTH_COMPILING = 0 if how == "compiled" else 1 << 60
    if how == "eager" or not torch.cuda.is_available():
        step.recordable = lambda state: how == "graph"
    try:
        with heard("defquant.step") as reasons:
            yield reasons
    finally:
        step.WORTH_COMPILING, step.recordable = before, fits


def run(scene: Scene, model: nn.Module, config: TrainConfig, how: str, **more: Any) -> Found:
    """Train; the last epoch's images/s, the wall, and how the steps ran."""
    words: list[str] = []

    def hear(state: step.Training, own: bool) -> step.Replay | None:
        state.replay = found(state, own)
        words.append("eager" if state.replay is None else state.replay.how)
        return state.replay

    found, start = step.Replay.of, scene.wait()
    step.Replay.of = hear  # type: ignore[method-assign, assignment]
    try:
        with stepping(how) as reasons:
            history = dq.train(model, more.pop("data", scene.data), config, **more)
    finally:
        step.Replay.of = found  # type: ignore[method-assign]
    last = history[-1]
    return {
        "images_per_second": round(last["images_per_second"]), "loss": last["loss"],
        "accuracy": last["accuracy"], "wall": round(scene.wait() - start, 2), "how": words[0],
        **({"refused": reasons} if reasons else {}),
    }  # fmt: skip


def flat(model: nn.Module) -> Tensor:
    return torch.cat([t.detach().double().flatten().cpu() for t in model.state_dict().values()])


# ------------------------------------------------------------------------------------------ checks


def parity(scene: Scene) -> Found:
    """Quantisers and a network's logits and gradient, on this device against the CPU."""
    found: Found = {}
    x = torch.randn(64, 32, 16, 16, generator=torch.Generator().manual_seed(0)) * 3
    branch = QuantBranch().eval()
    branch.peak.fill_(4.0)
    for name, module in {"relu": dq.QuantReLU(4), "tanh": QuantTanh(4), "branch": branch}.items():
        values = []
        for device in (torch.device("cpu"), scene.device):
            at = x.to(device).requires_grad_()
            y = module.to(device)(at)
            values.append((y.detach().cpu(), torch.autograd.grad(y.square().sum(), at)[0].cpu()))
        differ = [(a != b).float().mean().item() for a, b in zip(*values, strict=True)]
        found[name] = {"values that differ": differ[0], "gradients that differ": differ[1]}
    images = scene.data.images[:64].cpu().float() / 255
    found["tf32 by default"] = {"convolutions": torch.backends.cudnn.allow_tf32}
    for name, tf32, kind in (
        ("network, as torch is", None, torch.float32), ("network, tf32", True, torch.float32),
        ("network, float32", False, torch.float32), ("network, float64", False, torch.float64),
    ):  # fmt: skip
        with tensor_float(tf32):
            cpu, gpu = (_passed(scene, device, images.to(kind)) for device in ("cpu", None))
        (logits, gradient, inside), (logits_, gradient_, inside_) = cpu, gpu
        apart = (gradient - gradient_).flatten(1).norm(dim=1) / gradient.flatten(1).norm(dim=1)
        turned = (inside != inside_).flatten(1)
        found[name] = {
            "logits": float((logits - logits_).abs().max() / logits.abs().max()),
            "gradient": float((gradient - gradient_).abs().max() / gradient.abs().max()),
            "gradient, norm": float(apart.median()),
            "activations that turned": int(turned.sum()),
            "gradient, norm, where none turned": float(apart[~turned.any(1)].nan_to_num().amax())
            if not turned.any(1).all() else float("nan"),
        }  # fmt: skip
    return found


def _passed(scene: Scene, device: str | None, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, input gradient, and which activations lie inside of the clip, all on the CPU."""
    model = scene.model(None, small=True).eval().to(device or scene.device, images.dtype)
    inside: list[Tensor] = []

    def note(_: nn.Module, args: Any, answer: Tensor) -> None:
        inside.append(((answer > 0) & (answer < 6)).flatten(1).cpu())

    for module in model.modules():
        if isinstance(module, Quantizer):
            module.register_forward_hook(note)
    at = images.to(device or scene.device).requires_grad_()
    logits = model(at)
    (gradient,) = torch.autograd.grad(logits.sum(), at)
    return logits.detach().cpu(), gradient.cpu(), torch.cat(inside, 1)


def graph(scene: Scene) -> Found:
    """After the same few steps: eager against recorded against compiled, float32, all penalties."""
    data, found = scene.data.first(4 * scene.batch + 7), {}
    base = replace(scene.config, amp=False, epochs=1, lr=0.02, beta=0.01)
    cases: dict[str, tuple[int | None, dict[str, Any], tuple[str, ...]]] = {
        "float": (None, {}, ("graph", "compiled")),
        "4 bits": (4, {}, ("graph",)),
        "loss": (None, {"penalty": "loss"}, ("graph",)),
        "parseval": (None, {"penalty": "parseval"}, ("graph",)),
        "fgsm": (None, {"attack": "fgsm"}, ("graph",)),
        "rfgsm, half": (None, {"attack": "rfgsm", "mix": 0.5}, ("graph",)),
        "pgd": (None, {"attack": "pgd", "attack_eps": 0.01}, ("graph",)),
        "amp": (None, {"amp": True}, ("graph",)),
        "tf32": (None, {"tf32": True}, ("graph",)),
    }
    for name, (bits, changes, ways) in cases.items():
        weights = {}
        for how in ("eager", *ways):
            model = scene.model(bits, convex=True, small=True)
            ran = run(scene, model, replace(base, **changes), how, data=data)
            weights[how] = flat(model), ran
        reference = weights["eager"][0]
        for how in ways:
            distance = (weights[how][0] - reference).norm() / reference.norm()
            found[f"{name}, {how}"] = {"distance": float(distance), "how": weights[how][1]["how"]}
            if "refused" in weights[how][1]:
                found[f"{name}, {how}"]["refused"] = weights[how][1]["refused"]
    return found


def resume(scene: Scene) -> Found:
    """Two epochs and two more against four: the same bits?"""
    data, found = scene.data.first(8 * scene.batch + 7), {}
    for name, settings, how in (
        ("deterministic", {"deterministic": True}, "graph"),
        ("deterministic, amp", {"deterministic": True, "amp": True}, "graph"),
        ("deterministic, fgsm", {"deterministic": True, "attack": "fgsm"}, "graph"),
        ("free, amp", {"amp": True}, "graph"),
    ):
        changes: dict[str, Any] = {"amp": False, "epochs": 4, "beta": 0.01, **settings}
        config = replace(scene.config, **changes)
        kept: dict[int, tuple[Any, Any, Any]] = {}
        model = scene.model(4, convex=True, small=True)

        def keep(history: Any, momentum: Any, model: nn.Module = model, kept: Any = kept) -> None:
            state = {key: value.clone() for key, value in model.state_dict().items()}
            kept[len(history)] = (history, {k: v.clone() for k, v in momentum.items()}, state)

        ran = run(scene, model, config, how, data=data, keep=keep)
        again = scene.model(4, convex=True, small=True)
        history, momentum, state = kept[2]
        again.load_state_dict(state)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run(scene, again, config, how, data=data, history=history, momentum=momentum)
        same = torch.equal(flat(model), flat(again))
        found[name] = {"same bits": same, "how": ran["how"]}
    return found


# ------------------------------------------------------------------------------------------ speeds


def peer(scene: Scene) -> Found:
    """What one writes without a library, compiled: float network, bfloat16, images on the GPU."""
    found = {}
    for how in ("eager", "compiled"):
        model = scene.model().to(scene.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
        network = torch.compile(model, dynamic=False) if how == "compiled" else model
        speeds, start = [], scene.wait()
        for epoch in range(3):
            began, seen = scene.wait(), 0
            for x, y in batches(scene.data, scene.batch, seed=0, epoch=epoch):
                if len(x) < scene.batch:
                    continue
                with torch.autocast(scene.device.type, torch.bfloat16):
                    logits = network(x.contiguous(memory_format=torch.channels_last))
                loss = nn.functional.cross_entropy(logits.float(), y)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                seen += len(x)
            speeds.append(seen / (scene.wait() - began))
        found[how] = {
            "images_per_second": round(speeds[-1]),
            "wall": round(scene.wait() - start, 2),
        }
    return found


NETWORKS: dict[str, dict[str, Any]] = {
    "DQ": {"bits": 4, "convex": True, "beta": 0.01}, "float": {}, "4 bits": {"bits": 4},
}  # fmt: skip


def speed(scene: Scene, names: tuple[str, ...], how: str, **changes: Any) -> Found:
    """Images/s of `dq.train`'s own loop."""
    found = {}
    for name in names:
        settings = NETWORKS[name]
        model = scene.model(settings.get("bits"), settings.get("convex", False))
        config = replace(scene.config, beta=settings.get("beta", 0.0), **changes)
        found[name] = run(scene, model, config, how)
        scene.trained = scene.trained or (model if name == "DQ" else None)
    return found


WAYS = ("float32", "as used")
"""How an attack runs: plainly in float32; or recorded, gradients in TensorFloat-32, and without a
quantiser all of the search.
"""


@contextmanager
def searching(scene: Scene, way: str) -> Iterator[list[str]]:
    """Attack in one of the `WAYS`; gives why looks were not recorded."""
    fits, looked = engine.searchable, looking.look
    if way == "float32" or scene.cpu:
        engine.searchable = lambda *_: way != "float32"
    if way == "float32":
        looking.look = lambda *a, rough=False, **more: looked(*a, **more)
    with heard("defquant.attacks.look") as reasons, tensor_float(False):
        try:
            yield reasons
        finally:
            engine.searchable, looking.look = fits, looked


def trained(scene: Scene) -> nn.Module:
    if scene.trained is None:
        scene.trained = scene.model(4, convex=True)
        run(scene, scene.trained, replace(scene.config, beta=0.01), "graph")
    return scene.trained.to(scene.device).eval()


def attacks(scene: Scene) -> Found:
    """Walls on 1,000 images: a bare walk, PGD-20, PGD-50, the adaptive worst case, by each way."""
    model, found = trained(scene), {}
    data = scene.data.first(64 if scene.cpu else 1000)
    x, y = data.images.float() / 255, data.labels
    clean = correct(model, data)
    for name, eps in (("all fall", 8 / 255), ("half stand", 1 / 255)):

        def bare(eps: float = eps) -> Tensor:
            standing = torch.ones(len(x), dtype=torch.bool, device=x.device)
            for part in torch.arange(len(x), device=x.device).split(256):
                clean, at = x[part], x[part].clone()
                for _ in range(20):
                    at.requires_grad_()
                    loss = nn.functional.cross_entropy(model(at), y[part])
                    (grad,) = torch.autograd.grad(loss, at)
                    at = at.detach() + eps / 8 * grad.sign()
                    at = at.clamp(clean - eps, clean + eps).clamp_(0, 1)
                with torch.no_grad():
                    standing[part] &= model(at).argmax(1) == y[part]
            return standing

        ours: dict[str, Attack] = {
            "pgd-20": dq.PGD(eps, steps=20, alpha=eps / 8), "pgd-50": dq.PGD(eps, steps=50),
            "adaptive": dq.Adaptive(eps),
        }  # fmt: skip
        calls: dict[str, Callable[[], Tensor]] = {"bare": bare}
        calls |= {a: partial(robust, model, data, ours[a], standing=clean) for a in ours}
        for attack, call in calls.items():
            stood: dict[str, Tensor] = {}
            for way in WAYS[: 1 if attack == "bare" else 2]:
                with searching(scene, way) as reasons:
                    times = []
                    for _ in range(2):  # the first warms up
                        start = scene.wait()
                        stood[way] = call()
                        times.append(scene.wait() - start)
                        if times[0] > 3:
                            break
                found[f"{name}, {attack}, {way}"] = {
                    "seconds": round(min(times), 3), "first": round(times[0], 3),
                    "stand": int(stood[way].sum()),
                    "differ": int((stood[way] != stood["float32"]).sum()),
                    "images_per_second": round(len(x) / min(times)),
                    **({"refused": reasons} if reasons else {}),
                }  # fmt: skip
    return found


def looks(scene: Scene) -> Found:
    """Milliseconds of one look: forward, loss, gradient; by its size and by how it is run."""
    model, found, plan = trained(scene), {}, dq.PGD(0.01, steps=20).plan
    kinds = {
        "float32": (False, False, False, False, False),
        "float32, graph": (False, False, False, False, True),
        "gradient tf32, graph": (False, False, True, False, True),
        "channels last, tf32, graph": (True, True, True, False, True),
        "channels last, bf16, graph": (True, True, True, True, True),
    }  # fmt: skip
    for n in (16,) if scene.cpu else (256, 64, 16):
        at, y = scene.data.images[:n].float() / 255, scene.data.labels[:n]
        for kind, (last, tf32, back, half, replayed) in kinds.items():
            layout = torch.channels_last if last else torch.contiguous_format
            rows = {"at": at.contiguous(memory_format=layout), "y": y, "target": y}
            times = {}
            for gradient in (True, False):

                def inner(
                    rows: Any = rows,
                    gradient: bool = gradient,
                    tf32: bool = tf32,
                    back: bool = back,
                    half: bool = half,
                ) -> None:
                    low = torch.autocast(
                        scene.device.type, torch.bfloat16, enabled=half, cache_enabled=False
                    )
                    with torch.no_grad(), tensor_float(tf32), low:
                        looking.look((model,), rows, plan, gradient=gradient, rough=back)

                with untouched(model):
                    step = recorded(inner, [], scene.device) if replayed else inner
                    for _ in range(3):
                        step()
                    start = scene.wait()
                    for _ in range(10):
                        step()
                    times["gradient" if gradient else "forward"] = 100 * (scene.wait() - start)
            found[f"{n}, {kind}"] = times
    return found


def equal(scene: Scene) -> Found:
    """PGD-20 and the adaptive worst case, both ways, on networks trained shortly."""
    found: Found = {}
    data = scene.data.first(64 if scene.cpu else 1000)
    few = scene.data.first(128 if scene.cpu else 12_800)
    for name, bits, convex, attack in (
        ("float", None, False, "none"), ("5 bits", 5, False, "none"), ("4 bits", 4, False, "none"),
        ("3 bits", 3, False, "none"), ("2 bits", 2, False, "none"), ("1 bit", 1, False, "none"),
        ("DQ", None, True, "none"), ("DQ, 4 bits", 4, True, "none"),
        ("DQ, 2 bits", 2, True, "none"), ("fgsm, 4 bits", 4, False, "fgsm"),
    ):  # fmt: skip
        if time.perf_counter() > scene.ends:
            found[name] = {"left out": "no time"}
            continue
        model = scene.model(bits, convex)
        changes: dict[str, Any] = {"beta": 0.01 * convex, "epochs": 6, "attack": attack}
        if attack != "none":
            changes |= {"attack_eps": 1 / 255, "epochs": 4}
        run(scene, model, replace(scene.config, **changes), "graph", data=few)
        clean = correct(model, data)
        for way_of in (dq.PGD(0.5 / 255, steps=20), dq.Adaptive(0.5 / 255, steps=10)):
            stood, times = {}, {}
            for way in WAYS:
                with searching(scene, way):
                    start = scene.wait()
                    stood[way] = robust(model, data, way_of, standing=clean)
                    times[way] = scene.wait() - start
            found[f"{name}, {way_of.name}"] = {
                "clean": int(clean.sum()), **{way: int(stood[way].sum()) for way in stood},
                "differ": int((stood["float32"] != stood["as used"]).sum()),
                **{f"{way}, s": round(times[way], 2) for way in times},
            }  # fmt: skip
    return found


PARTS: dict[str, Callable[[Scene], Found]] = {
    "parity": parity,
    "graph": graph,
    "resume": resume,
    "bf16 eager": lambda s: speed(s, ("DQ",), "eager"),
    "bf16 graph": lambda s: speed(s, ("DQ", "float"), "graph"),
    "bf16 compiled": lambda s: speed(s, ("DQ", "float", "4 bits"), "compiled"),
    "peer bf16": peer,
    "looks": looks,
    "attacks": attacks,
    "equal": equal,
    "tf32 compiled": lambda s: speed(s, ("DQ",), "compiled", amp=False, tf32=True),
    "tf32 graph": lambda s: speed(s, ("DQ", "float", "4 bits"), "graph", amp=False, tf32=True),
    "fgsm eager": lambda s: speed(s, ("DQ",), "eager", attack="fgsm", epochs=2),
    "fgsm graph": lambda s: speed(s, ("DQ",), "graph", attack="fgsm", epochs=2),
    "fp32 graph": lambda s: speed(s, ("DQ",), "graph", amp=False),
}


def shown(found: Found) -> str:
    """`0.0012`, `54,100`, ...: the numbers of a row, in a line."""
    words = []
    for name, value in found.items():
        if isinstance(value, float):
            value = f"{value:.4g}"
        elif isinstance(value, int) and not isinstance(value, bool):
            value = f"{value:,}"
        words.append(f"{name} {value}")
    return "  ".join(words)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="written after each part")
    parser.add_argument("--only", nargs="*", default=list(PARTS), metavar="PART", choices=PARTS)
    parser.add_argument("--data-root", help="CIFAR-10; random patterns when not given")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="a quarter of the images")
    parser.add_argument("--seconds", type=float, default=225, help="no part begins after them")
    options = parser.parse_args()
    begun = time.perf_counter()
    scene = Scene(options)
    card = "CPU" if scene.cpu else torch.cuda.get_device_name(scene.device)
    print(f"{card}, torch {torch.__version__}; {len(scene.data):,} images: {scene.data.name}")
    print(f"WRN-{scene.net[0]}-{scene.net[1]}, batch {scene.batch}", flush=True)
    results: Found = {"device": card, "torch": torch.__version__, "data": scene.data.name}
    for name in options.only:
        start = time.perf_counter()
        if start - begun > options.seconds:
            results[name] = {"left out": f"after {options.seconds:g} s"}
        else:
            try:
                results[name] = PARTS[name](scene)
            except Exception as error:
                reason = " ".join(str(error).split())[:300]
                results[name] = {"failed": f"{type(error).__name__}: {reason}"}
            results[name]["took"] = round(time.perf_counter() - start, 1)
        for row, values in results[name].items():
            text = shown(values) if isinstance(values, dict) else values
            print(f"{name:14} {row:22} {text}", flush=True)
        if options.json:
            options.json.write_text(json.dumps(results, indent=1))
    print(f"in {time.perf_counter() - begun:.0f} s")


if __name__ == "__main__":
    main()
