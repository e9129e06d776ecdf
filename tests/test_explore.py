"""A picture, some networks, an attack: who is fooled; and the page that shows it, in a browser."""

import asyncio
import base64
import importlib.util
import io
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import defquant as dq
from conftest import refused, tiny_images
from defquant.cli import main
from defquant.data import Dataset
from defquant.data.pictures import encode, fitted
from defquant.diagnose.layers import layer_distances
from defquant.explore.server import BYTES, Guard, Page, growth, results, serve, shown_as
from defquant.explore.trial import Frame, Network, answer, explore, named, opened, specs_of
from defquant.judging.suspects import images_for, suspect
from pages import HOSTILE


class Margin(nn.Module):
    """64 pixels of 128 have the margin `left`, in pixels; a step of k against it takes 64 k."""

    def __init__(self, left: int) -> None:
        super().__init__()
        self.last = nn.Linear(64, 2)
        nn.init.constant_(self.last.weight, 255.0)
        self.last.weight.data[1] = 0
        nn.init.constant_(self.last.bias, 0.0)
        self.last.bias.data[0] = left - 64 * 128

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last(x.flatten(1)) / 64
        return logits


GREY = Dataset(
    torch.full((8, 1, 8, 8), 128, dtype=torch.uint8), torch.zeros(8).long(), ("up", "down"), "grey"
)


def margins(*left: int) -> list[Network]:
    return [opened(f"m{m}", Margin(m), GREY) for m in left]


def test_a_network_is_fooled_where_its_margin_is_less_than_the_ball() -> None:
    found = list(explore(margins(191, 193, -1), GREY.images[0], 0, named("fgsm", 3 / 255, 9)))
    assert [one.state for one in found] == ["fooled", "holds", "wrong before"]
    assert [one.attacked.said for one in found] == [1, 0, 1]
    assert all(one.looks == 2 and torch.equal(one.pixels, GREY.images[0] - 3) for one in found)
    assert found[0].growth == pytest.approx([3 / 128], rel=1e-5)


def test_an_image_made_on_one_network_is_shown_to_all() -> None:
    frames: list[Frame] = []
    networks, attack = margins(191, 600), named("pgd", 4 / 255, 3)
    found = list(explore(networks, GREY.images[0], 0, attack, on="m600", tell=frames.append))
    assert [(one.made_on, one.state, one.looks) for one in found] == [
        ("m600", "fooled", 0), ("m600", "holds", 4),
    ]  # fmt: skip
    assert [frame.looks for frame in frames] == [1, 2, 3, 4] and frames[-1].planned == 4


def test_the_growth_is_that_of_figure_3(corners: Dataset) -> None:
    torch.manual_seed(0)
    model = dq.wide_resnet(10, 1, bits=3, in_channels=1, num_classes=4)
    (one,) = explore([opened("own", model, corners)], corners.images[0], 0, named("fgsm", 0.1, 1))
    pair = (x[None] / 255 for x in (corners.images[0], one.pixels))
    means = [layer.distance.mean for layer in layer_distances(model, *pair)]
    assert one.growth == pytest.approx(means, rel=1e-5)


def test_a_stopped_attack_says_so_and_leaves_the_network_as_it_was() -> None:
    (network,) = margins(191)
    attack = named("pgd", 4 / 255, 3)
    refused(lambda: list(explore([network], GREY.images[0], 0, attack, stop=lambda: True)), "stop")
    assert not network.view._forward_hooks and not network.view._forward_pre_hooks
    assert answer(network, GREY.images[0]).said == 0


@pytest.mark.parametrize(("name", "steps"), [("pgd", 201), ("pgd", 0), ("standard", 1), ("", 1)])
def test_an_attack_has_a_name_and_few_steps(name: str, steps: int) -> None:
    refused(lambda: named(name, 0.1, steps), "1 to 200 steps")


def test_a_picture_is_upright_its_middle_and_of_the_networks_size() -> None:
    image = Image.new("RGB", (40, 20))
    image.paste((255, 0, 0), (0, 0, 20, 20))  # the left half; turned by a quarter, the upper
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    image.save(file, "PNG", exif=exif)
    red, green, _ = fitted(file.getvalue(), "it", (3, 8, 8)).tolist()
    assert red[0] == [255] * 8 and red[7] == [0] * 8 and not any(map(any, green))
    assert fitted(file.getvalue(), "it", (1, 8, 8)).shape == (1, 8, 8)
    own = tiny_images(1).images[0].numpy()
    assert (fitted(encode(own), "it", (1, 8, 8)) == own).all()
    refused(lambda: fitted(file.getvalue(), "it", (4, 8, 8)), "1 or 3 channels")


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "no PNG, JPEG"),
        (b"", "no PNG, JPEG"), (b"\x89PNG\r\n\x1a\n", "cannot decode"),
        (b"0" * (BYTES + 999), "8 MiB at most"),
    ],
)  # fmt: skip
def test_what_is_no_picture_is_refused_in_a_line(sent: bytes, said: str) -> None:
    page = Page({}, GREY)
    address = "data:image/png;base64," + base64.b64encode(sent).decode()
    refused(lambda: page.picture("my\nfile", address), said, "my")
    refused(lambda: page.picture(3, ["no text"]), "3")


def test_names_are_shown_letter_by_letter() -> None:
    (network,) = margins(191)
    hostile = Network(HOSTILE, network.suspect, network.view)
    found = list(explore([hostile], GREY.images[0], 0, named("fgsm", 3 / 255, 1)))
    text = results(found, GREY.images[0], (HOSTILE, HOSTILE), 3) + growth(found)
    said = [(hostile, found[0].clean)]
    text += shown_as("before", (HOSTILE, HOSTILE), said, 0, own=[hostile])
    assert "<script" not in text and "<img src" not in text and "&lt;script" in text


def test_a_folder_of_runs_stands_for_each(tmp_path: Path) -> None:
    for name in ("b", "a"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "checkpoint.safetensors").touch()
    runs = str(tmp_path / "runs")
    assert list(specs_of([runs, "x/a", "y.onnx"])) == [f"{runs}/a", "b", "x/a", "y.onnx"]


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/", {}, 200), ("/gradio_api/queue/join", {"content-length": "9"}, 200),
        ("/", {"host": "evil.example"}, 403), ("/", {"host": "localhost:1"}, 200),
        ("/gradio_api/upload", {}, 404), ("/gradio_api/file=/etc/passwd", {}, 404),
        ("/gradio_api/proxy=http://a.b", {}, 404),
        ("/gradio_api/queue/join", {"content-length": str(3 * BYTES)}, 413),
        ("/gradio_api/queue/join", {"transfer-encoding": "chunked"}, 411),
        ("/gradio_api/component_server", {"content-type": "multipart/form-data"}, 415),
    ],
)  # fmt: skip
def test_the_guard_lets_only_the_page_itself_through(
    path: str, headers: dict[str, str], status: int
) -> None:
    sent: list[dict[str, Any]] = []

    async def page(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200})

    async def send(message: Any) -> None:
        sent.append(message)

    given = {"host": "127.0.0.1:7860"} | headers
    raw = [(key.encode(), value.encode()) for key, value in given.items()]
    scope = {"type": "http", "path": path, "headers": raw}
    asyncio.run(Guard(page, local=True)(scope, lambda: page(0, 0, send), send))
    assert sent[0]["status"] == status
    assert b"default-src 'none'" in dict(sent[0]["headers"])[b"content-security-policy"]


def test_without_gradio_or_a_port_there_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refused(lambda: serve(Page({}, GREY), "127.0.0.1", port, print), f":{port} (", "--port")
    assert main(["explore"]) == 2
    for ask in (lambda: images_for("runs/none", None, None), lambda: suspect("runs/none", GREY)):
        refused(ask, "no such folder of a run: runs/none")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["explore", "runs/a"]) == 2
    assert "pip install 'defquant[explore]'" in capsys.readouterr().err


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
MODEL = """
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))

def slow():
    class Slow(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = make()
        def forward(self, x):
            import time
            time.sleep(0.05)
            return self.net(x)
    return Slow()
"""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, "subprocess.Popen[str]"]]:
    (tmp_path / "my.py").write_text(MODEL)
    words = [sys.executable, "-m", "defquant", "explore", f"{tmp_path}/my.py:make"]
    words += [f"{tmp_path}/my.py:slow", "--data", "digits", "--port", "0"]
    env = os.environ | {"TMPDIR": str(tmp_path)}
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=env)
    with process:
        assert process.stdout is not None
        yield process.stdout.readline().strip(), process
        process.kill()


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_in_a_browser(server: tuple[str, "subprocess.Popen[str]"], tmp_path: Path) -> None:
    pytest.importorskip("gradio")
    driver = pytest.importorskip("playwright.sync_api")
    address, process = server
    asked: list[str] = []
    (tmp_path / "no.png").write_text("%!PS no picture")
    Image.new("RGB", (90, 60), (250, 250, 250)).save(tmp_path / "yes.jpg")
    with driver.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 390, "height": 844})
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        page.wait_for_selector("#out .cards", timeout=60_000)
        page.click("[data-test='3']")
        page.click("#go")
        page.wait_for_selector("#out .live", timeout=60_000)
        page.wait_for_selector("#out .growth", timeout=60_000)
        assert page.locator("#out .state").count() == 2
        assert "24/255, made on each network" in page.inner_text("#out .said")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390

        page.set_input_files("#pick [type=file]", tmp_path / "no.png")
        alert = page.locator("#pick [role=alert]")
        driver.expect(alert).to_have_text(
            "cannot decode no.png (no PNG, JPEG, WebP, BMP or GIF): restore or remove it"
        )
        page.set_input_files("#pick [type=file]", tmp_path / "yes.jpg")
        driver.expect(alert).to_have_text("")
        driver.expect(page.locator("#out .said")).to_have_text("Before any attack.")
        page.get_by_label("Steps").first.fill("200")
        page.keyboard.press("Tab")
        page.click("#go")
        page.wait_for_selector("#out .live", timeout=60_000)
        page.wait_for_function("document.querySelector('#out h3').textContent.includes('slow')")
        page.click("#stop")
        driver.expect(page.locator("#out [role=alert]")).to_have_text("the attack was stopped")
        browser.close()
    web = {url for url in asked if not url.startswith((address, "data:", "blob:"))}
    assert asked and not web  # no font, no script, no count of users
    process.send_signal(signal.SIGTERM)  # as Ctrl-C: what it kept for itself goes
    assert process.wait(30) == 130 and not list(tmp_path.glob("defquant-*"))
