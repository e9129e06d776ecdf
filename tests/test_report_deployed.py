"""The page's section on exported models."""

import json
from pathlib import Path

import pytest
import torch

from defquant.deploy.cost import latencies, static_cost
from defquant.deploy.graph import graph
from defquant.deploy.lower import lower
from defquant.errors import UserError
from defquant.models import wide_resnet
from defquant.paper.section import Section
from defquant.report import build_report
from defquant.report.cards import chapters, read_cards
from defquant.report.model import view
from pages import HOSTILE, check, page_of
from synthetic_runs import card, write_card, write_cards, write_runs

pytestmark = pytest.mark.usefixtures("undrawn")


def table_of(folder: Path) -> tuple[tuple[str, ...], dict[str, list[str]]]:
    """The heads of the models, and what stands in each row of the table."""
    models, notes = read_cards(folder)
    assert notes == []
    (chapter,) = chapters(models)
    shown = view(chapter.tables[0])
    rows = {row[1].text: [f"{p.text} {p.more}".rstrip() for p in row[2:]] for row in shown.rows}
    assert len(rows) == len(shown.rows)
    return shown.head[2:], rows


def test_every_number_is_there_dq_beside_vanilla_at_equal_bits(tmp_path: Path) -> None:
    heads, rows = table_of(write_cards(tmp_path))
    assert heads == ("vanilla", "DQ (β = 0.3)") * 2
    names = ("b-vanilla4_w8", "a-dq4_w8", "b-vanilla4_w4", "a-dq4_w4")
    assert rows["Run"] == [f"{name}, seed 0" for name in names]
    attacks = ["clean", "FGSM 2/255", "FGSM 8/255", "PGD-20 2/255", "PGD-20 8/255"]
    assert list(rows) == [
        "Precision", "Run", "Convolutions in integers", "Ranges of the quantisers", "Input",
        "Same answer as trained", "Codes flipped",
        *(f"{name}, {side}" for name in attacks for side in ("trained", "deployed")),
        "Square-500 8/255, deployed", "File", "MACs", "BOPs, MACs × bits × bits",
        "Peak activations, packed", "Batch 1", "Batch 32",
    ]  # fmt: skip
    texts = {name: values[0] for name, values in rows.items()}
    assert texts | {
        "Precision": "4-bit activations, 8-bit weights", "Convolutions in integers": "15 of 15",
        "Same answer as trained": "99.81% of 10,000",
        "clean, trained": "90.1 90–91", "clean, deployed": "90.0 89–91",
        "PGD-20 2/255, trained": "31.0 28–34", "PGD-20 2/255, deployed": "30.7 28–34",
        "Square-500 8/255, deployed": "11.7 10–14", "File": "186 kB, 0.265×",
        "MACs": "27.1 M, 640 in float", "BOPs, MACs × bits × bits": "867 M, 0.031×",
        "Peak activations, packed": "49.2 kB, 0.188×, 65.5 kB as bytes",
        "Batch 1": "3.31 ms, 4.41× PyTorch, 1.82× onnxruntime",
    } == texts  # fmt: skip
    found = check(page_of(tmp_path))
    assert len(found.tables["board"][0]) == 1 + 4 * 11
    every = {row[1]: row[2] for row in found.tables["deployed-1"][-1][1:]}
    assert every | {
        "Same answer, unoptimised": "99.90%", "Same answer, OpenVINO": "–",
        "Square-500(eps=8/255), deployed": "117 / 1,000, 9.9 to 13.8",
        "Batch 1, PyTorch": "14.6 ms (13.1 ms to 17.5 ms), 50 repeats, 2 threads",
        "onnxruntime": "1.32.0",
    } == every  # fmt: skip


def test_what_is_amiss_is_marked(tmp_path: Path) -> None:
    own = card("v", dq=False, bits=8, convolutions=[14, 15], calibrated=2048)
    for pair in own["scores"]:
        if pair["attack"] == "FGSM":
            shift = -60 if pair["eps"] < 0.01 else 60
            pair["deployed"] = [pair["trained"][0] + shift, 1000]
    write_card(tmp_path, own)
    _, rows = table_of(tmp_path)
    assert rows["Convolutions in integers"] == ["✗ 14 of 15"]
    assert rows["Ranges of the quantisers"] == ["measured on 2,048 images"]
    against = {name: values for name, values in rows.items() if "against" in name}
    assert against == {
        "FGSM 2/255, against the interval": ["✗ below"],
        "FGSM 8/255, against the interval": ["✗ above"],
    }
    page = page_of(tmp_path)
    assert page.count('<span class="verdict wrong"') == 3
    assert "0 of 1 files give their network" in page and ">No</strong>" in page


@pytest.mark.parametrize("sections", [(), (Section("fig1", "Figure 1", ("Text.",)),)])
def test_it_joins_the_other_sections(tmp_path: Path, sections: tuple[Section, ...]) -> None:
    write_runs(tmp_path, seeds=1, networks=("float", "dq-4bit"))
    assert 'id="deployed-1"' not in page_of(tmp_path)
    write_cards(tmp_path)
    page = page_of(tmp_path, *sections)
    first = "paper-fig1" if sections else "group-1"
    order = [page.index(f'<details id="{name}">') for name in (first, "deployed-1", "settings")]
    assert order == sorted(order) and "4 of 4 files answer as their networks do" in page
    assert ("<title>Accuracy under attack" in page) != bool(sections)
    assert page == page_of(tmp_path, *sections)


def test_least_and_other_data(tmp_path: Path) -> None:
    """No attack, no latency, another engine, one method alone, two data sets."""
    bare = card("a", dq=False, bits=1)
    bare["scores"] = bare["scores"][:1]
    del bare["cost"]["latency"]
    other = card("b", dq=True, data="digits", model="vgg-16")
    batches = other["cost"]["latency"]["batches"]
    batches |= {"1": {"OpenVINO": batches["1"]["torch"]}}
    for own in (bare, other):
        write_card(tmp_path, own)
    page = page_of(tmp_path)
    assert "<summary>Deployed: vgg-16 on digits</summary>" in page
    assert "1-bit activations, 8-bit weights" in page


def test_files_that_are_not_ours_are_ignored_and_broken_ones_named(tmp_path: Path) -> None:
    write_card(tmp_path, card("a", dq=True)).write_text("{")
    with pytest.raises(UserError, match="no results"):
        build_report(tmp_path, tmp_path / "r.html")
    (tmp_path / "a.json").unlink()
    write_cards(tmp_path)
    whole = json.dumps(card("c", dq=True), indent=1)
    files = {
        "theirs": '{"kind": "other"}', "list": "[1]", "cut-theirs": "{", "cut": whole[:2000],
        "cut-early": whole[:20], "later": whole.replace('"format": 1', '"format": 2'),
        "many": whole.replace("9031,", "10001,"), "text": whole.replace('"bits": 4', '"bits": "4"'),
        "nan": whole.replace('"flipped_codes": 0.00031', '"flipped_codes": NaN'),
        "below": whole.replace('"float_macs": 640', '"float_macs": -1'),
        "none": whole.replace('"float_file_bytes": 702000', '"float_file_bytes": 0'),
    }  # fmt: skip
    for name, text in files.items():
        (tmp_path / f"{name}.json").write_text(text)
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe")
    for name in ("theirs", "cut-early"):
        (tmp_path / f"{name}.onnx").write_bytes(b"")
    models, notes = read_cards(tmp_path)
    assert len(models) == 4
    named = ["below", "cut-early", "cut", "later", "many", "nan", "none", "text"]
    assert [note.split(".json: ")[0] for note in notes] == named
    assert all("\n" not in note and "left out" in note for note in notes)
    assert page_of(tmp_path).count("Unreadable") == len(notes)
    write_runs(tmp_path, seeds=1, networks=("float",))
    assert page_of(tmp_path).count("Unreadable") == len(notes)


def test_everything_in_the_files_is_escaped(tmp_path: Path, drawn: None) -> None:
    names = ("method", "model", "data", "fingerprint", "input", "command")
    own = card("run", dq=True) | dict.fromkeys(names, HOSTILE)
    own |= {"versions": {HOSTILE: HOSTILE}}
    own["scores"][1] |= {"attack": HOSTILE, "settings": HOSTILE}
    latency = own["cost"]["latency"]["batches"]["1"]
    latency[HOSTILE] = latency["torch"]
    write_card(tmp_path, own)
    write_card(tmp_path / "b", own | {"run": "broken", "bits": HOSTILE})
    page = page_of(tmp_path)
    assert "<script>alert" not in page and "<img" not in page


def test_the_float_network_stands_beside(tmp_path: Path) -> None:
    own = card("a", dq=True)
    own["scores"][1] |= {"attack": "Adaptive-20", "reference": [700, 1000]}
    write_card(tmp_path, own)
    _, found = table_of(tmp_path)
    (name,) = (name for name in found if name.endswith(", reference"))
    assert name.startswith("Adaptive-20 ") and found[name] == ["70.0 67–73"]


def test_it_reads_what_the_export_measures(tmp_path: Path) -> None:
    model = wide_resnet(10, 1, bits=2, weight_bits=4, deployable=True, num_classes=4)
    model(torch.rand(8, 3, 8, 8))  # gives the branches their ranges
    program = lower(model.eval(), (3, 8, 8))
    integer, single = graph(program), graph(program, integers=False)
    sizes = {"file_bytes": integer.ByteSize(), "float_file_bytes": single.ByteSize()}
    cost = static_cost(program, **sizes)
    cost["latency"] = latencies(model, integer, single, (3, 8, 8), repeats=1, threads=1)
    write_card(tmp_path, card("a", dq=True, cost=cost))
    (found,), notes = read_cards(tmp_path)
    assert notes == []
    latency = found.cost.latency
    assert list(latency.batches) == ["1", "32"]
    assert all(set(o) == {"integer", "onnxruntime", "torch"} for o in latency.batches.values())
    assert (latency.threads, latency.repeats) == (1, 1)
    assert found.cost.float_macs == cost["float_macs"] > 0
