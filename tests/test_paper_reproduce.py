"""The verb `reproduce`: everything once, small; plans, mistakes and what is there already."""

from pathlib import Path

import pytest

from defquant.cli import main
from defquant.paper import reproduce
from defquant.paper.figures import EXPERIMENTS, cells_of, render
from defquant.paper.grid import SCALES, Results, keep, read
from defquant.paper.plan import passes_by_model
from defquant.paper.reproduce import cells_to_make, names_of
from synthetic_results import fake_measurement

SMOKE = SCALES["smoke"].placed(None, None, "cpu")


def call(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    status = main(["reproduce", *words])
    out, err = capsys.readouterr()
    return status, out, err


@pytest.mark.slow
def test_all_of_it_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every table and figure at preset smoke; the second call makes nothing again."""
    words = ("all", "--preset", "smoke", "--out", str(tmp_path))
    status, out, _ = call(capsys, *words)
    assert (status, out.splitlines()[-1]) == (0, str(tmp_path / "report.html"))
    cells = cells_of(EXPERIMENTS, SMOKE)
    assert not read(tmp_path).missing(cells)
    lines = (tmp_path / "results.jsonl").read_text()
    assert str(tmp_path.parent) not in lines.replace(f"--out {tmp_path}", "")
    networks = {path.name for path in (tmp_path / "networks").iterdir()}
    assert networks == {network.name for network in passes_by_model(cells)}
    page = (tmp_path / "report.html").read_text()
    for name in EXPERIMENTS:
        assert (tmp_path / f"{name}.md").read_text().startswith("## ")
        assert f"defquant reproduce {name} --preset smoke" in page
    assert len(list(tmp_path.glob("*.png"))) == 5  # Figures 1, 3, 5 and 6, and surrogates

    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert call(capsys, *words, "--json")[0] == 0
    assert lines == (tmp_path / "results.jsonl").read_text()
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}


@pytest.mark.slow
def test_a_plan_makes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("table4", "--preset", "smoke", "--dry-run", "--out", str(tmp_path), "--jobs", "3")
    status, out, _ = call(capsys, *words)
    there = f"0 of {len(cells_of(['table4'], SMOKE))} cells are there"
    said = (there, "image passes a second in one process", "4 networks", "with 3 processes")
    assert status == 0 and all(words in out for words in said)
    assert not list(tmp_path.iterdir())


def test_a_plan_says_that_the_images_are_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reproduce, "_rate", lambda network, seconds: 1e4)
    status, out, _ = call(capsys, "table4", "--dry-run", "--out", str(tmp_path))
    assert status == 0
    assert "without its images nothing can be made: preset small needs CIFAR-10: give its" in out


def test_a_probe_grows_to_the_batch_that_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Throughput of two images says nothing of that of a batch."""
    monkeypatch.setattr(reproduce, "_steps", lambda network, size: 40.0 * size)
    network = SCALES["small"].placed("x", None, "cpu").network()
    assert reproduce._rate(network, 5.0) == 40 * network.train.batch_size


def test_list_names_everything_with_its_cost(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = call(capsys, "--list")
    assert status == 0
    for name in (*EXPERIMENTS, *SCALES):
        assert any(line.split()[:1] == [name] for line in out.splitlines()), name
    # the costs that --dry-run counts, SVHN's among them
    passes = passes_by_model(cells_of(["table2"], SMOKE))
    row = next(line for line in out.splitlines() if line.startswith("table2"))
    assert f"{len(passes)} / {sum(map(sum, passes.values())) / 1e6:.2f} " in row


def test_all_leaves_out_svhn_where_it_has_no_place() -> None:
    for preset, svhn_root, there in (("small", None, 0), ("small", "x", 1), ("smoke", None, 1)):
        scale = SCALES[preset].placed("data", svhn_root, "cpu")
        assert ("table2" in names_of(["all"], scale)) == there
        assert names_of(["table2"], scale) == ["table2"]


def test_what_is_there_is_shown_without_making_anything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("table1", "--preset", "paper", "--render-only", "--out", str(tmp_path))
    status, out, _ = call(capsys, *words)
    assert status == 0
    assert "Measurements still missing: 192" in out
    assert not (tmp_path / "networks").exists()
    status, out, _ = call(capsys, *words, "--json")
    assert out == ""


def test_a_cell_alone_is_made_with_the_smaller_radii_and_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = cells_of(["table1"], SMOKE)
    for cell in cells[:: len(cells) // 7]:
        family = [c for c in cells if c.family == cell.family and c.eps <= cell.eps]
        assert cells_to_make(["table1"], SMOKE, [cell.key]) == family
    assert cells_to_make(["table1"], SMOKE) == cells
    attacked = next(cell for cell in cells if cell.attack == "fgsm")
    shown = fake_measurement(attacked)
    keep(tmp_path, attacked, shown)
    words = ("--preset", "smoke", "--cell", attacked.key, "--out", str(tmp_path), "--render-only")
    status, out, _ = call(capsys, *words)
    assert (status, len(out.splitlines())) == (0, 2)
    assert str(shown.score) in out


def test_what_was_changed_is_never_the_presets() -> None:
    """Other epochs share no key with any preset; other seeds those of the same seeds alone."""
    keys = {cell.key for cell in cells_of(EXPERIMENTS, SMOKE)}
    longer, seeded = SMOKE.changed(None, 2), SMOKE.changed((0, 3), None)
    assert not keys & {cell.key for cell in cells_of(EXPERIMENTS, longer)}
    assert keys < {cell.key for cell in cells_of(EXPERIMENTS, seeded)}
    assert SMOKE.changed(SMOKE.seeds, None) == SMOKE
    for scale, flags in ((longer, "--epochs 2"), (seeded, "--seeds 0 3")):
        command = f"defquant reproduce table1 --preset smoke {flags}"
        assert render("table1", scale, Results()).command == command
    own = cells_to_make(["table1"], seeded, networks=["*_4bit_*_s3_*", "*_1bit_s0_*"])
    assert len({cell.network for cell in own}) == 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "reproduce needs a name: fig1"),
        (("table9",), "unknown table or figure 'table9'"),
        (
            ("fig1", "--cell", "0" * 16),
            "no cell '0000000000000000' in fig1 at --preset small: take",
        ),
        (
            ("fig1", "--networks", "*_9bit_*"),
            "no network '*_9bit_*' in fig1 at --preset small: --dr",
        ),
        (("fig1", "--keep", "*_4bti_*"), "no network '*_4bti_*' in fig1 at --preset small: --dr"),
        (("fig1", "--merge", ".", "--dry-run"), "--merge takes results over, --dry-run"),
        (("fig1", "--seeds", "1", "1"), "--seeds are numbers from 0, each once; found 1 and 1"),
        (("fig1", "--epochs", "0"), "epochs must be positive; found 0"),
        (
            ("fig1", "--preset", "tiny"),
            "--preset must be one of smoke, hour, small, gpu, paper; found 'tiny'",
        ),
        (("fig1", "--jobs", "0"), "--jobs must be 1 or more"),
        (("fig1",), "preset small needs CIFAR-10: give its place with --data-root"),
        (("table2", "--data-root", "nowhere"), "preset small needs SVHN: give its place"),
        (("fig1", "--data-root", "nowhere"), "found no data at nowhere"),
        (("fig1", "--jobs", "many"), "--jobs must be a whole number"),
    ],
)
def test_mistakes_are_one_line(
    words: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = call(capsys, *words, "--out", str(tmp_path))
    assert (status, out) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1


def test_a_folder_that_is_not_there_is_not_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    none = tmp_path / "none"
    status, _, err = call(capsys, "fig1", "--preset", "smoke", "--render-only", "--out", str(none))
    assert status == 2 and "there is no folder" in err and not none.exists()
