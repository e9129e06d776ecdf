"""Replayed adversarial images: the scores of the attack itself, from a file that is no truth."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

import defquant as dq
from conftest import refused, tiny_images
from defquant import checkpoint, measure
from defquant.attacks import BIM, FGSM, PGD, RFGSM, FirstOrder, Replay, Transfer
from defquant.checkpoint import Checkpoint, Facts, load_on
from defquant.config import DataConfig, ModelConfig, TrainConfig
from defquant.data import Dataset
from defquant.evaluate import robust
from defquant.measure import replay
from defquant.models import build
from defquant.records import Measurement, read_folder

CPU = torch.device("cpu")
DATA = tiny_images(100, seed=5)
EPOCHS = 6
EPS = 24 / 255
ATTACKS: list[FirstOrder] = [FGSM(EPS), RFGSM(EPS), BIM(EPS, steps=3), PGD(EPS, steps=3)]


def trained(folder: Path, seed: int, bits: int | None = None) -> Path:
    config = TrainConfig(epochs=EPOCHS, batch_size=16, lr=0.05, seed=seed, device="cpu")
    shape, data = ModelConfig("wrn-10-1", bits=bits), tiny_images(96, seed=seed)
    model = build(shape, num_classes=4, in_channels=1, seed=seed)
    history = tuple(dq.train(model, data, config, show=False))
    known = (4, 1, data.classes, data.name, data.fingerprint, history)
    facts = Facts(shape, DataConfig(), config, *known)
    checkpoint.save(folder, Checkpoint(facts, model.state_dict(), {}))
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A substitute and the run that it attacks."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("replay")
    return trained(folder / "substitute", 1), trained(folder / "target", 2, bits=4)


@pytest.fixture
def substitute(runs: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of the substitute without kept images."""
    path = tmp_path / "substitute" / checkpoint.NAME
    path.parent.mkdir()
    path.write_bytes((runs[0] / checkpoint.NAME).read_bytes())
    return path.parent


def again(attack: FirstOrder, run: Path, data: Dataset = DATA, seed: int = 0) -> Replay:
    return replay(attack, run, data, seed=seed, device=CPU)


def kept(run: Path) -> list[Path]:
    return sorted((run / "transfer").iterdir())


def forbid(monkeypatch: pytest.MonkeyPatch) -> None:
    def touched(*_: object) -> None:
        raise AssertionError("the substitute was loaded")

    monkeypatch.setattr(measure, "load_on", touched)


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
@pytest.mark.parametrize("seed", [0, 3])
def test_scores_are_those_of_the_attack_itself(
    attack: FirstOrder, seed: int, runs: tuple[Path, Path], substitute: Path
) -> None:
    target, other = load_on(runs[1], CPU)[0], load_on(substitute, CPU)[0]
    live = Transfer(attack, other, str(substitute))
    expected = robust(target, DATA, live, seed=seed)
    assert 0 < int(expected.sum()) < int(robust(target, DATA, FGSM(0.0)).sum())
    for made_by in (7, 256):
        made = replay(attack, substitute, DATA, seed=seed, device=CPU, batch_size=made_by)
        for batch_size in (9, 256):
            found = robust(target, DATA, made, seed=seed, batch_size=batch_size)
            assert torch.equal(found, expected)
        kept(substitute)[0].unlink()
    assert (repr(made), made.name, made.eps) == (repr(live), live.name, live.eps)


def test_images_are_the_last_iterates_in_float_and_nobody_asks_the_network_attacked(
    substitute: Path,
) -> None:
    made = again(PGD(EPS, steps=3), substitute)
    x, y = DATA.take(torch.arange(len(DATA)))
    generator = torch.Generator().manual_seed(0)
    expected = PGD(EPS, steps=3).last(load_on(substitute, CPU)[0], x, y, generator=generator)
    torch.testing.assert_close(made.images, expected, rtol=0, atol=0)
    assert made.images.dtype == torch.float32
    assert made.source == str(substitute)

    class Silent(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError("asked")

    ids = torch.tensor([7, 3])
    assert torch.equal(made(Silent(), *DATA.take(ids), ids=ids), made.images[ids])


def test_the_second_time_the_substitute_is_left_alone(
    substitute: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = again(ATTACKS[0], substitute)
    (path,) = kept(substitute)
    stamp = path.stat().st_mtime_ns
    forbid(monkeypatch)
    second = again(ATTACKS[0], substitute)
    assert torch.equal(first.images, second.images)
    assert torch.equal(first.images, again(ATTACKS[0], substitute / checkpoint.NAME).images)
    assert path.stat().st_mtime_ns == stamp
    path.unlink()  # what was read stays whole
    assert torch.equal(first.images, second.images)
    with pytest.raises(AssertionError, match="the substitute was loaded"):
        again(ATTACKS[0], substitute)


def test_whatever_decides_the_images_names_the_file(
    runs: tuple[Path, Path], substitute: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    relabelled = replace(DATA, labels=DATA.labels.flip(0))
    calls = [
        (PGD(EPS, steps=2), DATA, 0),
        (PGD(EPS + 1e-6, steps=2), DATA, 0),  # the repr of both is that of 24/255
        (PGD(EPS, steps=2, alpha=1e-3), DATA, 0),
        (PGD(EPS, steps=2, alpha=1e-3 + 1e-7), DATA, 0),
        (PGD(EPS, steps=2, restarts=2), DATA, 0),
        (BIM(EPS, steps=2), DATA, 0),
        (PGD(EPS, steps=2), DATA, 1),
        (PGD(EPS, steps=2), DATA.first(99), 0),
        (PGD(EPS, steps=2), relabelled, 0),
    ]
    for attack, data, seed in calls:
        again(attack, substitute, data, seed)
    assert len(kept(substitute)) == len(calls)
    monkeypatch.setattr(measure, "load_on", lambda *_: load_on(runs[1], CPU))
    (substitute / checkpoint.NAME).write_bytes((runs[1] / checkpoint.NAME).read_bytes())
    again(*calls[0][:1], substitute)
    assert len(kept(substitute)) == len(calls) + 1


Rewrite = Callable[[bytes, Tensor, dict[str, str]], bytes]


@pytest.mark.parametrize(
    "rewrite",
    [
        lambda whole, images, own: whole[:-1],
        lambda whole, images, own: whole[:20],
        lambda whole, images, own: b"",
        lambda whole, images, own: save({"images": images}),
        lambda whole, images, own: save({"images": images}, {"defquant": "{}"}),
        lambda whole, images, own: save({"images": images[1:]}, own),
        lambda whole, images, own: save({"images": images.half()}, own),
        lambda whole, images, own: save({"picture": images}, own),
    ],
    ids=["cut", "cut in the header", "empty", "not ours", "of another attack", "of other images",
         "of another type", "of another name"],
)  # fmt: skip
def test_a_file_that_is_not_right_is_made_again(rewrite: Rewrite, substitute: Path) -> None:
    expected = again(ATTACKS[0], substitute).images.clone()
    (path,) = kept(substitute)
    whole = path.read_bytes()
    with safe_open(path, framework="pt") as file:
        path.write_bytes(rewrite(whole, expected, file.metadata()))
    assert path.read_bytes() != whole
    assert torch.equal(again(ATTACKS[0], substitute).images, expected)
    assert path.read_bytes() == whole


def test_where_nothing_can_be_written_it_works_and_warns(substitute: Path) -> None:
    (substitute / "transfer").write_text("in the way")
    with pytest.warns(dq.DefquantWarning, match="cannot be written") as caught:
        made = again(ATTACKS[0], substitute)
    assert caught[0].filename == __file__
    (substitute / "transfer").unlink()
    assert torch.equal(made.images, again(ATTACKS[0], substitute).images)


def test_other_images_are_refused(runs: tuple[Path, Path], substitute: Path) -> None:
    target, made = load_on(runs[1], CPU)[0], again(ATTACKS[0], substitute)
    foreign = {
        "kept for other images": tiny_images(100, seed=6),
        "found ids": tiny_images(101, seed=5),
        "than these": replace(DATA, images=DATA.images[:, :, :, :7]),
    }
    for words, data in foreign.items():
        everyone = torch.ones(len(data), dtype=torch.bool)
        refused(lambda d=data, s=everyone: robust(target, d, made, standing=s), words)  # type: ignore[misc]
    x, y = DATA.take(torch.arange(4))
    ruined = replace(made, images=torch.full_like(made.images, torch.nan))
    refused(lambda: made(target, x, y), "by ids")
    refused(lambda: made(target, x, y, ids=torch.arange(-1, 3)), "found ids -1 to 2")
    refused(lambda: ruined(target, x, y, ids=torch.arange(4)), "other images")
    robust(target, DATA.first(50), made)  # the first of them are where they were


def test_no_run_and_an_unfinished_one(substitute: Path, tmp_path: Path) -> None:
    refused(lambda: again(ATTACKS[0], tmp_path / "none"), "no checkpoint at")
    whole = checkpoint.load(substitute)
    facts = replace(whole.facts, train=replace(whole.facts.train, epochs=99))
    checkpoint.save(substitute, replace(whole, facts=facts))
    refused(lambda: again(ATTACKS[0], substitute), "6 of 99 epochs")
    assert not (substitute / "transfer").exists()


def test_measurements_go_where_they_are_sent(runs: tuple[Path, Path], substitute: Path) -> None:
    model, facts = load_on(runs[1], CPU)
    made, found = [again(FGSM(EPS), substitute)], list[Measurement]()
    sent = measure.measure(runs[1], model, facts, DATA, [FGSM(EPS), *made], write=found.append)
    assert list(sent) == found
    assert [m.attack for m in found] == ["clean", "FGSM", "FGSM(B)"]
    assert found[2].settings == repr(Transfer(FGSM(EPS), model, str(substitute)))
    assert not (runs[1] / "results.jsonl").exists()
    written = list(measure.measure(runs[1], model, facts, DATA, made))
    assert read_folder(runs[1]) == written
    (runs[1] / "results.jsonl").unlink()
