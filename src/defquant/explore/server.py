"""The page of `defquant explore`: the networks behind it, Gradio's interface, and its server."""

import base64
import os
import socket
import tempfile
from collections.abc import Awaitable, Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from threading import Event, Lock, Thread
from typing import Any

import numpy as np
import torch
from torch import Tensor

from defquant.config import check_eps
from defquant.data import Dataset
from defquant.data.pictures import fitted
from defquant.errors import UserError, shown
from defquant.explore.cards import address, before, live, refusal, results
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
from defquant.progress import say

__all__ = ["Page", "serve"]

BYTES, AT_ONCE = 8 << 20, 4
"""At most: of an uploaded file; networks side by side."""
EACH = "each network"
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

    def answers(self, pixels: Tensor, names: Sequence[str]) -> list[tuple[Network, Answer]]:
        """What each network says of the picture itself."""
        networks = self.networks(names)
        with self._lock:
            return [(network, answer(network, pixels)) for network in networks]

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
                    yield live(frames[0], pixels, label, self.data.classes)
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
            said = page.answers(pixels, names)
        except Exception as error:  # of the user's own model, too
            return gr.skip(), gr.skip(), refusal(error)
        known = max(0, said[0][1].said) if known < 0 else known
        return pixels.numpy(), known, before(said, known, classes)

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
                    _picker(page.data),
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
                return before(page.answers(page.data.images[0], names), number, classes)
            except Exception as error:
                return refusal(error)

        blocks.load(begin, [shown_ones], out, **quiet)
    blocks.queue(max_size=8, api_open=False)
    return blocks


def _picker(data: Dataset) -> str:
    """A canvas of the picture's own size, test images to take, and a file of one's own."""
    _, height, width = data.shape
    tests = "".join(
        f'<button type="button" data-test="{i}" aria-label="test image {i}, '
        f'{escape(data.classes[int(data.labels[i])])}"><img alt="" src="{address(image)}"></button>'
        for i, image in enumerate(data.images[:24])
    )
    colour = '<input type="color" value="#ffffff" aria-label="colour of the pen">'
    return (
        f'<div class="picture"><canvas width="{width}" height="{height}" '
        f'aria-label="the picture; draw on it"></canvas><div class="tools">{colour}'
        '<button type="button" data-clear>Clear</button><label class="file">Upload'
        '<input type="file" accept="image/*" aria-label="upload a picture"></label>'
        '<small>Draw on it, take one below, or upload one.</small><p role="alert"></p></div></div>'
        f'<div class="tests">{tests}</div>'
    )


def _asset(name: str) -> str:
    return files("defquant.explore").joinpath(name).read_text()


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
