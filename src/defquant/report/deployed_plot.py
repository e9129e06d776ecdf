"""Trained against deployed robust accuracy: a panel per attack, over eps, in the page's SVG."""

from collections.abc import Sequence

from markupsafe import Markup

from defquant.paper.section import Line, Panel
from defquant.report import drawing
from defquant.report.deployed import Deployed, Pair
from defquant.report.drawing import LEFT, RIGHT, Point, Scale
from defquant.report.figures import ACCURACY, PERCENT_TICKS
from defquant.report.multiples import Style, styles
from defquant.report.multiples_svg import Drawn, Multiples
from defquant.report.names import attack_order, distinct, eps_number, percent
from defquant.results import Score

__all__ = ["figure"]

DASHED = Markup(
    '<svg class="swatch" viewBox="0 0 28 12" aria-hidden="true"><path class="area plain" '
    'd="M1 1H27V11H1z"/><path class="line dashed" d="M1 6H27"/></svg>'
)


def figure(models: Sequence[Deployed]) -> Multiples | None:
    """A colour per method, a mark per precision; None where nothing was attacked."""
    names = distinct((str(model.family), _bits(model)) for model in models)
    lines = [Line(f"{kind}, {bits}", (), kind) for kind, bits in names]
    found = {
        label: style for (_, label), style in styles([Panel("", "", "", tuple(lines))]).items()
    }
    attacks = {pair.attack for model in models for pair in model.scores} - {"clean"}
    ordered = sorted(attacks, key=attack_order)
    entries = [
        (f"{line.label}, deployed", drawing.swatch(f"c-{style.colour}", style.shape))
        for line in lines
        for style in [found[line.label]]
    ]
    panels = [Drawn(attack, "", _panel(models, attack, found)) for attack in ordered]
    legend = [*entries, ("as trained, with its 95% interval", DASHED)]
    return Multiples(legend, panels, paper=False, percent=True) if panels else None


def _bits(model: Deployed) -> str:
    return f"{model.bits} × {model.weight_bits} bits"


def _panel(models: Sequence[Deployed], attack: str, found: dict[str, Style]) -> Markup:
    shown = {model.place: _pairs(model, attack) for model in models}
    radii = sorted(distinct(pair.eps for pairs in shown.values() for pair in pairs))
    x = Scale(0, max(radii), LEFT + 6, RIGHT - 6)
    ticks = drawing.apart([(x(eps), eps_number(eps)) for eps in radii], 21)
    parts = [drawing.axes(ticks, "ε · 255", PERCENT_TICKS)]
    for model in models:
        style = found[f"{model.family}, {_bits(model)}"]
        drawn = _lines(shown[model.place], x, style.shape, f"{model.family}, {_bits(model)}")
        parts.append(drawing.group(f"c-{style.colour}", drawn))
    name = f"Accuracy over eps under {attack}, {len(models)} networks, trained and deployed"
    return drawing.svg(name, parts)


def _pairs(model: Deployed, attack: str) -> list[Pair]:
    """Clean images first, then the attack's radii; nothing where the model was not attacked so."""
    attacked = [pair for pair in model.scores if pair.attack == attack]
    return [pair for pair in model.scores if pair.attack == "clean" and attacked] + attacked


def _lines(pairs: Sequence[Pair], x: Scale, shape: int, name: str) -> Markup:
    trained = [_point(pair.eps, pair.trained) for pair in pairs if pair.trained is not None]
    own = [_point(pair.eps, pair.deployed) for pair in pairs]
    parts = []
    if len(trained) > 1:
        at = [(x(point.x), ACCURACY(point.y)) for point in trained]
        parts += [drawing.area(trained, x, ACCURACY), drawing.polyline(at, "line dashed")]
    tips = [f"{name}: {_tip(pair)}" for pair in pairs]
    return drawing.join([*parts, drawing.line(own, x, ACCURACY, shape, tips, "deployed")])


def _point(eps: float, score: Score) -> Point:
    return Point(eps, score.accuracy, *score.interval)


def _tip(pair: Pair) -> str:
    trained = f"trained {percent(pair.trained.accuracy)}, " if pair.trained is not None else ""
    return f"{trained}deployed {percent(pair.deployed.accuracy)}"
