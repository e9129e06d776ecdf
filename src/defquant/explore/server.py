"""The page of `defquant explore`: the networks behind it, Gradio's interface, and its server."""

import base64
import os
import signal
import socket
import tempfile
from collections.abc import Awaitable, Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from threading import Event, Lock, Thread
from typing import Any

import numpy as np
import torch
from torch import Tensor

from defquant.config import check_eps
from defquant.data import Dataset
from defquant.data.pictures import encode, fitted
from defquant.errors import UserError, shown
from defquant.explore.trial import (
    CHOICES,
    STEPS,
    Answer,
    Frame,
    Network,
    Outcome,
    answer,
    explore,
    named,
    opened,
)
from defquant.paper.section import Line, Number, Panel
from defquant.progress import say
from defquant.report.page import template
from defquant.report.plot import chart, looks, svg

__all__ = ["Page", "serve"]

BYTES, AT_ONCE = 8 << 20, 4
"""At most: of an uploaded file; networks side by side."""
EACH = "each network"
HERE = Path(__file__).parent
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass
class Page:
    """The networks by name, opened when they are first asked for, and one picture's results."""

    specs: dict[str, str]
    data: Dataset
    weights: str | None = None
    _open: dict[str, Network] = field(default_factory=dict)
    _lock: Any = field(default_factory=Lock)

    def networks(self, names: Sequence[str]) -> list[Network]:
        """Those of `names`, in the order in which they were given. Raises `UserError`."""
        chosen = [name for name in self.specs if name in names]
        if not 1 <= len(chosen) <= AT_ONCE:
            raise UserError(f"choose 1 to {AT_ONCE} networks; found {len(chosen)}")
        with self._lock:
            for name in chosen:
                if name not in self._open:
                    say(f"defquant: opens {self.specs[name]}")
                    self._open[name] = opened(name, self.specs[name], self.data, self.weights)
        return [self._open[name] for name in chosen]

    def picture(self, name: object, data: object) -> Tensor:
        """The picture of a `data:` address, as the networks take it. Raises `UserError`."""
        text = data if isinstance(data, str) else ""
        if len(text) > BYTES * 4 // 3 + 100:
            raise UserError(f"a picture has {BYTES >> 20} MiB at most; {shown(name)} is larger")
        try:
            source = base64.b64decode(text.partition(",")[2], validate=True)
        except ValueError:
            source = b""
        return torch.from_numpy(fitted(source, shown(name), self.data.shape).copy())

    def answers(self, pixels: Tensor, names: Sequence[str], label: int) -> tuple[str, int]:
        """What each network says of the picture itself; its class, the first's where it is -1."""
        networks = self.networks(names)
        with self._lock:
            said = [(network, answer(network, pixels)) for network in networks]
        known = max(0, said[0][1].said) if label < 0 else label
        return shown_as("before", self.data.classes, said, known, own=networks), known

    def attack(
        self, pixels: Tensor, label: int, names: Sequence[str], attack: str, eps: float,
        steps: float, on: str, stop: Event,
    ) -> Generator[str]:  # fmt: skip
        """The page's right half while the attack runs, and when it has ended."""
        networks = self.networks(names)
        if on != EACH and on not in [network.name for network in networks]:
            raise UserError(f"the attack is made on a network that is shown: choose {shown(on)}")
        if label not in range(self.data.num_classes):
            raise UserError(f"choose the true class of the picture; found {shown(label)}")
        chosen = named(attack, check_eps(eps / 255), int(steps))
        frames: list[Frame] = []
        done: list[Outcome] = []
        failed: list[Exception] = []

        def work() -> None:
            try:
                with self._lock:
                    found = explore(
                        networks, pixels, label, chosen, on=None if on == EACH else on,
                        tell=lambda frame: frames.__setitem__(slice(None), [frame]),
                        stop=stop.is_set,
                    )  # fmt: skip
                    done.extend(found)
            except Exception as error:  # shown below, to whom it concerns
                failed.append(error)

        thread = Thread(target=work, daemon=True)
        thread.start()
        try:
            while thread.is_alive():
                thread.join(0.12)
                if frames and thread.is_alive():
                    yield shown_as("live", self.data.classes, frames[0], pixels, label)
        finally:
            stop.set()  # whoever asked has gone
        if failed:
            raise failed[0]
        yield results(done, pixels, self.data.classes, eps)


def build(page: Page) -> Any:
    """The interface, as Gradio's `Blocks`."""
    import gradio as gr

    classes, names = list(page.data.classes), list(page.specs)
    first, number = page.data.images[0].numpy(), int(page.data.labels[0])
    tests = list(zip(page.data.images[:24], page.data.labels.tolist(), strict=False))
    stops: dict[str, Event] = {}

    def fit(sent: dict[str, Any]) -> dict[str, str]:
        try:
            return {"picture": address(page.picture(sent.get("name"), sent.get("data")))}
        except UserError as error:
            return {"error": str(error)}

    def choose(names: list[str], event: gr.EventData) -> Any:
        try:
            test = event._data.get("test")
            if isinstance(test, int) and 0 <= test < len(page.data):
                pixels, known = page.data.images[test], int(page.data.labels[test])
            else:
                pixels = page.picture(event._data.get("name"), event._data.get("data"))
                known = -1
            said, known = page.answers(pixels, names, known)
        except Exception as error:  # of the user's own model, too
            return gr.skip(), gr.skip(), refusal(error)
        return pixels.numpy(), known, said

    def run(pixels: Any, label: int, names: list[str], attack: str, eps: float, steps: float,
            on: str, request: gr.Request) -> Iterator[str]:  # fmt: skip
        stop = stops[str(request.session_hash)] = Event()
        image = torch.from_numpy(np.ascontiguousarray(pixels))
        try:
            yield from page.attack(image, label, names, attack, eps, steps, on, stop)
        except Exception as error:
            yield refusal(error)
        finally:
            stops.pop(str(request.session_hash), None)

    def halt(request: gr.Request) -> None:
        if found := stops.get(str(request.session_hash)):
            found.set()

    with gr.Blocks(title="defquant explore", analytics_enabled=False) as blocks:
        state = gr.State(first)
        aim = f"{escape(page.data.name)}: fool these networks, and see where the error grows."
        gr.HTML(f"<header><h1>defquant explore</h1><p>{aim}</p></header>")
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                picker = gr.HTML(
                    shown_as("picker", classes, page.data, tests),
                    js_on_load=_asset("page.js"),
                    server_functions=[fit],
                    elem_id="pick",
                )
                label = gr.Dropdown([(n, i) for i, n in enumerate(classes)], value=number,
                                    label="True class")  # fmt: skip
                shown_ones = gr.CheckboxGroup(names, value=names[:3], label="Networks, 1 to 4")
                attack = gr.Dropdown(list(CHOICES), value="pgd", label="Attack")
                on = gr.Dropdown([EACH, *names], value=EACH, label="made on")
                # of the demo's digits half fall at 24, of larger pictures most at 8
                radius = 24 if page.data.shape[2] < 16 else 8
                eps = gr.Slider(0, 64, radius, step=0.5, label="eps, in 1/255")
                steps = gr.Slider(1, STEPS, 20, step=1, label="Steps (tens of queries of square)")
                with gr.Row():
                    go = gr.Button("Attack", variant="primary", elem_id="go")
                    end = gr.Button("Stop", elem_id="stop")
            with gr.Column(scale=5, min_width=320):
                out = gr.HTML(elem_id="out")
        quiet: Any = {"show_progress": "hidden"}
        picker.select(choose, [shown_ones], [state, label, out], **quiet)
        given = [state, label, shown_ones, attack, eps, steps, on]
        go.click(run, given, out, concurrency_limit=1, concurrency_id="attack", **quiet)
        end.click(halt, **quiet)

        def begin(names: list[str]) -> str:
            try:
                return page.answers(page.data.images[0], names, number)[0]
            except Exception as error:
                return refusal(error)

        blocks.load(begin, [shown_ones], out, **quiet)
    blocks.queue(max_size=8, api_open=False)
    return blocks


# --- what the networks say of one picture, as HTML ---------------------------------------


def shown_as(
    kind: str, classes: Sequence[str], *parts: Any, own: Iterable[Network | Outcome] = ()
) -> str:
    """What the macro `kind` of page.html makes of `parts`, escaped; `own` have colours."""
    known = {
        "classes": classes, "address": address, "percent": _percent, "likeliest": _likeliest,
        "magnified": _magnified, "moved": lambda a, b: int((a.int() - b.int()).abs().max()),
        "own": looks((one.name, one.kind) for one in own),
    }  # fmt: skip
    written: str = getattr(template("page.html", HERE).make_module(known), kind)(*parts)
    return written


def results(outcomes: Sequence[Outcome], pixels: Tensor, classes: Sequence[str], eps: float) -> str:
    """A card for each network, and how the error grows from layer to layer in each."""
    parts = outcomes, pixels, eps, growth(outcomes)
    return shown_as("results", classes, *parts, own=outcomes)


def growth(outcomes: Sequence[Outcome]) -> str:
    """D at the input of each layer, a line for each network, as SVG; nothing where none is seen."""
    lines = [
        Line(one.name, tuple((str(k), Number(d)) for k, d in enumerate(one.grown)), one.kind)
        for one in outcomes
        if any(one.grown)
    ]
    panel = Panel("", "layer", "error", tuple(lines), percent=False)
    return svg(chart([panel], size=(560, 220))) if lines else ""


def refusal(error: Exception) -> str:
    """What went wrong, in a line."""
    said = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    return shown_as("refusal", (), shown(said, 300))


def address(pixels: Tensor) -> str:
    return "data:image/png;base64," + base64.b64encode(encode(pixels.cpu().numpy())).decode()


def _magnified(pixels: Tensor, at: Tensor) -> tuple[str, Tensor]:
    """How many times, and the perturbation so: grey is none, white the largest."""
    change = at.int() - pixels.int()
    scale = 127 / max(1.0, float(change.abs().max()))
    return f"{scale:.2g}", (128 + scale * change).round().clamp(0, 255).to(torch.uint8)


def _likeliest(clean: Answer, attacked: Answer, label: int) -> list[int]:
    """The true class, then the three likeliest, before or after."""
    most = [max(pair) for pair in zip(clean.sure, attacked.sure, strict=True)]
    top = sorted(range(len(most)), key=lambda k: -most[k])[:3]
    return sorted({*top, label}, key=lambda k: (k != label, -most[k]))


def _percent(share: float) -> str:
    if 0 < share < 0.001:
        return "< 0.1 %"
    return f"{share:.{0 if 0.01 < share < 0.995 else 1}%}".replace("%", " %")


# --- the server -----------------------------------------------------------------------------


def _asset(name: str) -> str:
    return (HERE / name).read_text("utf-8")


def serve(page: Page, host: str, port: int, tell: Callable[[str], object]) -> None:
    """Show the page at `host`:`port` until Ctrl-C; `tell` is called with its address.

    Raises `UserError` where the port cannot be had, and for what the first networks are not.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        reason = str(error).partition(" (while")[0]
        raise UserError(
            f"cannot listen on {host}:{port} ({reason}): choose another --port"
        ) from None
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what is left in /tmp goes, too
    torch.set_num_threads(1)  # one image at a time: more threads wait for each other
    with listening, tempfile.TemporaryDirectory(prefix="defquant-") as folder:
        page.networks(list(page.specs)[: AT_ONCE - 1])
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": folder,
                       "HF_HUB_DISABLE_TELEMETRY": "1"}  # fmt: skip
        import gradio as gr
        import uvicorn
        from fastapi import FastAPI

        blocks = build(page)
        app = gr.mount_gradio_app(
            FastAPI(openapi_url=None), blocks, path="/", server_name=host, footer_links=[],
            run_history=False, show_error=False, ssr_mode=False, pwa=False, mcp_server=False,
            enable_monitoring=False, max_file_size=1, css=_asset("page.css"),
            theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"],
                                    primary_hue="blue"),
        )  # fmt: skip
        config = uvicorn.Config(
            Guard(app, host in LOOPBACK),
            log_level="critical",
            lifespan="on",
            timeout_graceful_shutdown=1,
        )
        name = f"[{host}]" if ":" in host else host
        tell(f"http://{name}:{listening.getsockname()[1]}/")
        uvicorn.Server(config).run(sockets=[listening])


_POLICY = (
    "default-src 'none'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' "
    "'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; "
    "manifest-src 'self'; base-uri 'self'; form-action 'none'; frame-ancestors 'none'"
)
_KNOWN = (
    "/assets/", "/static/", "/svelte/", "/theme.css", "/config", "/favicon.ico", "/robots.txt",
    "/manifest.json", "/gradio_api/queue/", "/gradio_api/heartbeat/", "/gradio_api/startup-events",
    "/gradio_api/component_server", "/gradio_api/app_id", "/gradio_api/info", "/gradio_api/cancel",
    "/gradio_api/reset", "/gradio_api/theme.css",
)  # fmt: skip


class Guard:
    """In front of the page: it reads no file, takes none but in a message, and loads nothing.

    Asked by another name than this machine's own, a page that only it may see is not shown (a
    foreign page could have its name lead here).
    """

    def __init__(self, app: Any, local: bool) -> None:
        self.app, self.local = app, local

    async def __call__(
        self, scope: dict[str, Any], receive: Callable[[], Awaitable[Any]],
        send: Callable[[Any], Awaitable[None]],
    ) -> None:  # fmt: skip
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        given = {key.decode("latin1").lower(): value.decode("latin1")
                 for key, value in scope["headers"]}  # fmt: skip
        name = given.get("host", "").rsplit(":", 1)[0].strip("[]")
        size, path = given.get("content-length", "0"), scope["path"]
        kind = given.get("content-type", "application/json")
        status = (
            403 if self.local and name not in LOOPBACK
            else 404 if path != "/" and not path.startswith(_KNOWN)
            else 415 if not kind.startswith("application/json")
            else 411 if "transfer-encoding" in given
            else 413 if not size.isdecimal() or int(size) > 2 * BYTES
            else 0
        )  # fmt: skip

        async def sent(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                own = {b"content-security-policy": _POLICY.encode(), b"referrer-policy":
                       b"no-referrer", b"x-content-type-options": b"nosniff"}  # fmt: skip
                message["headers"] = [*message.get("headers", []), *own.items()]
            await send(message)

        if status:
            await sent({"type": "http.response.start", "status": status, "headers": []})
            await sent({"type": "http.response.body", "body": b""})
        else:
            await self.app(scope, receive, sent)
