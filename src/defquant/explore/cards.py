"""What the networks say of one picture, as HTML."""

import base64
from collections.abc import Sequence
from html import escape
from math import isfinite

import torch
from torch import Tensor

from defquant.data.pictures import encode
from defquant.errors import UserError, shown
from defquant.explore.trial import Answer, Frame, Network, Outcome
from defquant.report.plot import looks

__all__ = ["address", "before", "live", "refusal", "results"]

_WORDS = {"fooled": "fooled", "holds": "holds", "wrong before": "wrong before the attack"}


def live(frame: Frame, pixels: Tensor, label: int, classes: Sequence[str]) -> str:
    """An attack at work."""
    at = frame.at.mul(255).round().to(torch.uint8).cpu()
    share, sure = min(1.0, frame.looks / frame.planned), frame.sure[label]
    return (
        f'<section class="live" role="status"><h3>{escape(frame.name)} under attack</h3>'
        f'<progress max="1" value="{share:.3f}" aria-label="share of the attack"></progress>'
        f"<p>look {frame.looks} of about {frame.planned}: {_percent(sure)} sure of "
        f"{escape(classes[label])}</p>{_pictures(pixels, at)}</section>"
    )


def before(answers: Sequence[tuple[Network, Answer]], label: int, classes: Sequence[str]) -> str:
    """What the networks say of the picture itself."""
    looked = looks((network.name, network.kind) for network, _ in answers)
    cards = "".join(
        f'<article style="--own:{looked[network.name][0]}"><h3>{escape(network.name)}</h3>'
        f"{_bars(one, one, label, classes)}</article>"
        for network, one in answers
    )
    return f'<p class="said">Before any attack.</p><div class="cards">{cards}</div>'


def refusal(error: Exception) -> str:
    """What went wrong, in a line."""
    said = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    return f'<p class="said" role="alert">{escape(shown(said, 300))}</p>'


def results(outcomes: Sequence[Outcome], pixels: Tensor, classes: Sequence[str], eps: float) -> str:
    """A card for each network, and how the error grows from layer to layer in each."""
    fooled = sum(one.state == "fooled" for one in outcomes)
    made = {one.made_on for one in outcomes}
    where = "made on each network by itself"
    if len(made) < len(outcomes):
        where = f"made on {escape(made.pop())} and shown to all"
    looked = looks((one.name, one.kind) for one in outcomes)
    cards = "".join(_card(looked[one.name][0], one, pixels, classes) for one in outcomes)
    return (
        f'<p class="said">{fooled} of {len(outcomes)} fooled at {eps:g}/255, {where}.</p>'
        f'<div class="cards">{cards}</div>{growth(outcomes)}'
    )


def _card(colour: str, one: Outcome, pixels: Tensor, classes: Sequence[str]) -> str:
    moved = int((one.pixels.int() - pixels.int()).abs().max())
    says = "no answer" if one.attacked.said < 0 else escape(classes[one.attacked.said])
    cost = f"{one.looks} looks, {one.seconds:.2f} s" if one.looks else f"of {escape(one.made_on)}"
    return (
        f'<article style="--own:{colour}"><h3>{escape(one.name)}</h3>'
        f'<p class="state {one.state.split()[0]}">{_WORDS[one.state]}: says {says}</p>'
        f"{_pictures(pixels, one.pixels)}"
        f"{_bars(one.clean, one.attacked, one.label, classes)}"
        f"<p><small>{cost}; no pixel moved by more than {moved}</small></p></article>"
    )


def _pictures(pixels: Tensor, at: Tensor) -> str:
    """The adversarial image, and the perturbation magnified: grey is none, white the largest."""
    change = at.int() - pixels.int()
    scale = 127 / max(1.0, float(change.abs().max()))
    magnified = (128 + scale * change).round().clamp(0, 255).to(torch.uint8)
    times = f"change \u00d7 {scale:.2g}"
    return (
        f'<div class="pair"><figure>{_image(at, "adversarial image")}<figcaption>adversarial'
        f"</figcaption></figure><figure>{_image(magnified, times)}"
        f"<figcaption>{times}</figcaption></figure></div>"
    )


def _image(pixels: Tensor, words: str) -> str:
    return f'<img alt="{words}" src="{address(pixels)}">'


def address(pixels: Tensor) -> str:
    return "data:image/png;base64," + base64.b64encode(encode(pixels.cpu().numpy())).decode()


def _bars(clean: Answer, attacked: Answer, label: int, classes: Sequence[str]) -> str:
    """The confidence in the three likeliest classes and the true one, before and after."""
    most = [max(pair) for pair in zip(clean.sure, attacked.sure, strict=True)]
    top = sorted(range(len(most)), key=lambda k: -most[k])[:3]
    rows = "".join(
        f"<tr{' class=true' * (k == label)}><th scope=row>{escape(classes[k])}</th>"
        f'<td><span class="bar was" style="width:{100 * clean.sure[k]:.1f}%"></span>'
        f'<span class="bar" style="width:{100 * attacked.sure[k]:.1f}%"></span></td>'
        f"<td>{_percent(clean.sure[k])}{_turned(clean.sure[k], attacked.sure[k])}</td></tr>"
        for k in sorted({*top, label}, key=lambda k: (k != label, -most[k]))
    )
    return f'<table class="bars"><caption>confidence</caption>{rows}</table>'


def _turned(was: float, now: float) -> str:
    return "" if was == now else f" → <b>{_percent(now)}</b>"


def _percent(share: float) -> str:
    if 0 < share < 0.001:
        return "< 0.1 %"
    return f"{share:.{0 if 0.01 < share < 0.995 else 1}%}".replace("%", " %")


def growth(outcomes: Sequence[Outcome]) -> str:
    """D at the input of each layer, a line for each network, as SVG."""
    lines = [(i, one, [d for d in one.growth if isfinite(d)]) for i, one in enumerate(outcomes)]
    shut = "".join(
        f"<p>{escape(one.name)}: its layers are not seen</p>"
        for one in outcomes if not one.growth
    )  # fmt: skip
    top = max((max(values, default=0.0) for *_, values in lines), default=0.0)
    if not top:
        return shut
    most = max(len(values) for *_, values in lines)
    looked = looks((one.name, one.kind) for one in outcomes)

    def place(k: int, d: float) -> tuple[float, float]:
        return 44 + 380 * k / max(1, most - 1), 190 - 170 * d / top

    grid = "".join(
        f'<line x1="44" x2="424" y1="{190 - 170 * s}" y2="{190 - 170 * s}"/>'
        f'<text x="38" y="{194 - 170 * s}" text-anchor="end">{top * s:.2g}</text>'
        for s in (0, 0.5, 1)
    )
    drawn = ""
    for i, one, values in lines:
        points = [place(k, d) for k, d in enumerate(values)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        marks = "".join(
            f"{_mark(i, x, y)}<title>{escape(one.name)}, layer {k}: {d:.3g}</title></path>"
            for k, ((x, y), d) in enumerate(zip(points, values, strict=True), 1)
        )
        drawn += f'<g style="--own:{looked[one.name][0]}"><polyline points="{path}"/>{marks}</g>'
    legend = "".join(
        f'<li style="--own:{looked[one.name][0]}">'
        f'<svg viewBox="-6 -6 12 12">{_mark(i, 0, 0)}</path></svg>'
        f"{escape(one.name)}: {values[0]:.3g} at the image, {max(values):.3g} at most</li>"
        for i, one, values in lines if values
    )  # fmt: skip
    return (
        "<section><h3>The error grows from layer to layer</h3>"
        "<p>Distance of the adversarial from the clean values, over the size of the clean ones, at "
        "the input of each layer (Eq. 4 of the paper).</p>"
        f'<svg class="growth" viewBox="0 0 440 222" role="img" aria-label="error by layer">'
        f'<g class="grid">{grid}<text x="44" y="208">image</text><text x="424" y="208" '
        f'text-anchor="end">last layer</text></g>{drawn}</svg><ul>{legend}</ul>{shut}</section>'
    )


def _mark(i: int, x: float, y: float) -> str:
    shapes = (
        "m-3.5 0a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0-7 0",
        "m-3-3h6v6h-6z",
        "m0-4 4 4-4 4-4-4z",
        "m0-4 4 7h-8z",
    )
    return f'<path d="M{x:.1f} {y:.1f}{shapes[i]}">'
