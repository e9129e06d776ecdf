"""The page of `defquant explore`: the networks behind it, Gradio's interface, and its server."""

import base64
import os
import signal
import socket
import tempfile
from collections import deque
from collections.abc import Awaitable, Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from threading import Event, Lock, Thread
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
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
Array = NDArray[np.uint8]
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

    def fit(self, sent: dict[str, Any]) -> dict[str, str]:
        """The picture that page.js has read from a file as the networks take it, or why not."""
        try:
            return {"picture": address(self.picture(sent.get("name"), sent.get("data")))}
        except UserError as error:
            return {"error": str(error)}

    def chosen(self, sent: dict[str, Any], names: Sequence[str]) -> tuple[Array, int, str]:
        """A test image by its number, or another picture; its class, or the first network's guess;
        and what each network says of it.
        """
        test = sent.get("test")
        if isinstance(test, int) and 0 <= test < len(self.data):
            pixels, label = self.data.images[test], int(self.data.labels[test])
        else:
            pixels, label = self.picture(sent.get("name"), sent.get("data")), -1
        networks = self.networks(names)
        with self._lock:
            said = [(network, answer(network, pixels)) for network in networks]
        label = max(0, said[0][1].said) if label < 0 else label
        text = shown_as("before", self.data.classes, said, label, own=networks)
        return pixels.numpy(), label, text

    def attack(
        self, stop: Event, picture: Array, label: int, names: Sequence[str], attack: str, on: str,
        eps: float, steps: float,
    ) -> Generator[str]:  # fmt: skip
        """The page's right half while the attack runs, and when it has ended."""
        networks, pixels = self.networks(names), torch.from_numpy(np.ascontiguousarray(picture))
        if on != EACH and on not in [network.name for network in networks]:
            raise UserError(f"the attack is made on a network that is shown: choose {shown(on)}")
        if label not in range(self.data.num_classes):
            raise UserError(f"choose the true class of the picture; found {shown(label)}")
        chosen, source = named(attack, check_eps(eps / 255), int(steps)), None if on == EACH else on
        newest, done = deque[Frame](maxlen=1), Future[list[Outcome]]()

        def work() -> None:
            try:
                with self._lock:
                    done.set_result(list(explore(
                        networks, pixels, label, chosen, on=source, tell=newest.append,
                        stop=stop.is_set,
                    )))  # fmt: skip
            except Exception as error:  # raised below, to whom it concerns
                done.set_exception(error)

        Thread(target=work, daemon=True).start()
        try:
            while not wait([done], 0.12).done:
                if newest:
                    yield shown_as("live", self.data.classes, newest[0], pixels, label)
        finally:
            stop.set()  # whoever asked has gone
        yield results(done.result(), pixels, self.data.classes, eps)


def build(page: Page) -> Any:
    """The interface, as Gradio's `Blocks`."""
    import gradio as gr

    stops: dict[str, Event] = {}

    def choose(names: list[str], event: gr.EventData) -> Any:
        try:
            return page.chosen(event._data, names)
        except Exception as error:  # of the user's own model, too
            return gr.skip(), gr.skip(), refusal(error)

    def run(request: gr.Request, *given: Any) -> Iterator[str]:
        stop = stops[str(request.session_hash)] = Event()
        try:
            yield from page.attack(stop, *given)
        except Exception as error:
            yield refusal(error)
        finally:
            stops.pop(str(request.session_hash), None)

    def halt(request: gr.Request) -> None:
        if found := stops.get(str(request.session_hash)):
            found.set()

    with gr.Blocks(title="defquant explore", analytics_enabled=False) as blocks:
        picker, given, go, end, out = _laid_out(page)
        (state, label, names, *_), quiet = given, {"show_progress": "hidden"}
        first = gr.EventData(None, {"test": 0})
        picker.select(choose, [names], [state, label, out], **quiet)
        go.click(run, given, out, concurrency_limit=1, concurrency_id="attack", **quiet)
        end.click(halt, **quiet)
        blocks.load(lambda names: choose(names, first), [names], [state, label, out], **quiet)
    blocks.queue(max_size=8, api_open=False)
    return blocks


def _laid_out(page: Page) -> tuple[Any, ...]:
    """The pictures, what `Page.attack` is given, two buttons, and the place of the answers."""
    import gradio as gr

    def fit(sent: dict[str, Any]) -> dict[str, str]:  # Gradio writes its mark on a function
        return page.fit(sent)

    classes, names = list(page.data.classes), list(page.specs)
    tests = list(zip(page.data.images[:24], page.data.labels.tolist(), strict=False))
    known = [(name, number) for number, name in enumerate(classes)]
    # of the demo's digits half fall at 24, of larger pictures most at 8
    radius = 24 if page.data.shape[2] < 16 else 8
    aim = f"{escape(page.data.name)}: fool these networks, and see where the error grows."
    gr.HTML(f"<header><h1>defquant explore</h1><p>{aim}</p></header>")
    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            picker = gr.HTML(
                shown_as("picker", classes, page.data, tests), js_on_load=_asset("page.js"),
                server_functions=[fit], elem_id="pick",
            )  # fmt: skip
            given = [
                gr.State(page.data.images[0].numpy()),
                gr.Dropdown(known, value=int(page.data.labels[0]), label="True class"),
                gr.CheckboxGroup(names, value=names[:3], label="Networks, 1 to 4"),
                gr.Dropdown(list(CHOICES), value="pgd", label="Attack"),
                gr.Dropdown([EACH, *names], value=EACH, label="made on"),
                gr.Slider(0, 64, radius, step=0.5, label="eps, in 1/255"),
                gr.Slider(1, STEPS, 20, step=1, label="Steps (tens of queries of square)"),
            ]
            with gr.Row():
                go = gr.Button("Attack", variant="primary", elem_id="go")
                end = gr.Button("Stop", elem_id="stop")
        with gr.Column(scale=5, min_width=320):
            out = gr.HTML(elem_id="out")
    return picker, given, go, end, out


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
        import uvicorn

        config = uvicorn.Config(
            _guarded(page, host), log_level="critical", lifespan="on", timeout_graceful_shutdown=1
        )
        name = f"[{host}]" if ":" in host else host
        tell(f"http://{name}:{listening.getsockname()[1]}/")
        uvicorn.Server(config).run(sockets=[listening])


def _guarded(page: Page, host: str) -> "Guard":
    import gradio as gr
    from fastapi import FastAPI

    app = gr.mount_gradio_app(
        FastAPI(openapi_url=None), build(page), path="/", server_name=host, footer_links=[],
        run_history=False, show_error=False, ssr_mode=False, pwa=False, mcp_server=False,
        enable_monitoring=False, max_file_size=1, css=_asset("page.css"),
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"],
                                primary_hue="blue"),
    )  # fmt: skip
    return Guard(app, host in LOOPBACK)


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
        status = self._refused(scope)

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

    def _refused(self, scope: dict[str, Any]) -> int:
        """The status with which a request is turned away; 0 for none."""
        given = {key.decode("latin1").lower(): value.decode("latin1")
                 for key, value in scope["headers"]}  # fmt: skip
        name = given.get("host", "").rsplit(":", 1)[0].strip("[]")
        size, path = given.get("content-length", "0"), scope["path"]
        kind = given.get("content-type", "application/json")
        return (
            403 if self.local and name not in LOOPBACK
            else 404 if path != "/" and not path.startswith(_KNOWN)
            else 415 if not kind.startswith("application/json")
            else 411 if "transfer-encoding" in given
            else 413 if not size.isdecimal() or int(size) > 2 * BYTES
            else 0
        )  # fmt: skip
