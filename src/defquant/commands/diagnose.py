"""The verb diagnose: is this run's robustness real, and where does its noise grow?"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from defquant.commands.rows import print_json
from defquant.errors import UserError

__all__ = ["diagnose", "diagnosis_rows"]


def diagnose(settings: Namespace) -> int:
    """`defquant diagnose`: three parts on stdout, `diagnosis.json` in the run; 1 on a FAIL."""
    for name in ("batch_size", "steps", "restarts", "queries"):
        if settings[name] < 1:
            raise UserError(f"--{name} must be 1 or more; found {settings[name]}")
    from defquant.diagnose import Effort
    from defquant.diagnose.runs import diagnose_run
    from defquant.distributed import pick_device
    from defquant.files import write_json

    run = Path(settings.run)
    record = diagnose_run(
        run, settings.eps, against=[Path(other) for other in settings.against],
        substitute=Path(settings.substitute) if settings.substitute else None,
        images=settings.images, audited=0 if settings.no_audit else settings.audited,
        effort=Effort(
            steps=settings.steps, restarts=settings.restarts, queries=settings.queries,
            seed=settings.seed, batch_size=settings.batch_size,
        ),
        data_root=settings.data_root, device=pick_device(settings.device),
    )  # fmt: skip
    if settings.json:
        print_json(record)
    else:
        print("\n".join(diagnosis_rows(record)))
    print(write_json(run / "diagnosis.json", record))
    return int(record["verdict"] == "FAIL")


def diagnosis_rows(record: Mapping[str, Any]) -> Iterator[str]:
    """The record as aligned lines for people."""
    yield from _amplification(record["amplification"])
    yield ""
    yield from _audit(record["audit"])
    yield ""
    yield from _masking(record)


def _amplification(networks: list[dict[str, Any]]) -> Iterator[str]:
    yield "Error amplification: ||A - A_adv|| / ||A|| at each layer's input (Eq. 4)"
    for network in networks:
        values = [layer["mean"] for layer in network["layers"]]
        shown = "  ".join("-" if value is None else f"{value:.3f}" for value in values)
        yield f"  {network['name']:20} {network['method']:12} {shown}"
        first, last = values[0], values[-1]
        if first and last is not None:
            yield f"  {'':20} {'':12} image to last layer: x {last / first:.2f}"


def _audit(found: Mapping[str, Any] | None) -> Iterator[str]:
    if found is None:
        yield "Lipschitz audit: left out"
        return
    yield f"Lipschitz audit of the straight-through surrogate, {found['images']} images"
    yield f"  {'layer':24} {'matrix':>8} {'norm':>8} {'with BN':>8} {'residual':>9}"
    for layer in found["layers"]:
        numbers = [layer[name] for name in ("matrix_norm", "norm", "gain", "residual")]
        a, b, c, d = (float("nan") if number is None else number for number in numbers)
        yield f"  {layer['layer']:24} {a:8.3f} {b:8.3f} {c:8.3f} {d:9.3f}"
    bound, lower = found["bound"], found["lower"]
    yield f"  Lipschitz constant: {_number(lower)} to {_number(bound)}"
    radius = found["surrogate_radius_linf"] * 255
    yield f"  largest certified radius (of the surrogate, not of the network): {radius:.2g}/255"


def _number(value: float | None) -> str:
    return "unbounded" if value is None else f"{value:.3g}"


def _masking(record: Mapping[str, Any]) -> Iterator[str]:
    found, eps = record["masking"], f"{record['eps'] * 255:.4g}/255"
    yield f"Masked gradients? {found['verdict']} at eps {eps}, {record['images']} images"
    yield f"  robust under PGD {_share(found['usual'])}, under all {_share(found['strongest'])}"
    for sign in found["signs"]:
        yield f"  {sign['verdict']:11} {sign['name']:13} {_share(sign)}"
        if sign["verdict"] in ("WARN", "FAIL"):
            yield f"  {'':11} {sign['means']}: {sign['do']}"


def _share(found: Mapping[str, Any]) -> str:
    interval = f"[{found['low']:.1%}, {found['high']:.1%}]"
    return f"{found['rate']:.1%} {interval} ({found['count']}/{found['total']})"
