"""The page's section on exported models."""

import json
import re
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
from defquant.report.deployed import INTEGER, read_deployed
from defquant.report.deployed_page import section
from synthetic_deployed import ROBUST, record, write, write_models
from synthetic_runs import write_runs
from test_report import HOSTILE, check


def page_of(folder: Path) -> str:
    page = build_report(folder, folder / "report.html").read_text(encoding="utf-8")
    check(page)
    return page


def test_dq_stands_beside_vanilla_at_equal_bits(tmp_path: Path) -> None:
    models, notes = read_deployed(write_models(tmp_path))
    assert notes == []
    assert [model.run for model in models] == [
        "b-vanilla4_w8", "a-dq4_w8", "b-vanilla4_w4", "a-dq4_w4",
    ]  # fmt: skip
    (table,) = section(models).tables
    assert table.precisions == [
        ("4-bit activations, 8-bit weights", 2), ("4-bit activations, 4-bit weights", 2),
    ]  # fmt: skip
    assert [name for name, _ in table.heads] == ["vanilla", "DQ (β = 0.3)"] * 2
    assert all(len(row.values) == 4 for *_, rows in table.blocks for row in rows)


def test_every_number_is_there(tmp_path: Path) -> None:
    models, _ = read_deployed(write_models(tmp_path))
    (table,) = section(models).tables
    found = {row.name: row.values[0] for *_, rows in table.blocks for row in rows}
    assert list(found) == [
        "Convolutions", "Ranges", "Input", "Same answer", "Codes flipped", "Clean", "FGSM 2/255",
        "FGSM 8/255", "PGD-20 2/255", "PGD-20 8/255", "Square-500 8/255", "File", "MACs", "BOPs",
        "Peak activations", "Batch 1", "Batch 32",
    ]  # fmt: skip
    texts = {name: (value.text, value.more) for name, value in found.items()}
    assert texts["Convolutions"] == ("15 of 15", "")
    assert texts["Same answer"] == ("99.81%", "of 10,000 images")
    assert texts["Clean"] == ("90.1 → 90.0", "89.5–90.7 → 89.4–90.6")
    assert texts["PGD-20 2/255"] == ("31.0 → 30.7", "28.2–33.9 → 27.9–33.6")
    assert texts["Square-500 8/255"] == ("11.7", "9.9–13.8")
    assert texts["File"] == ("186 kB", "0.265×")
    assert texts["MACs"] == ("27.1 M", "and 640 in float")
    assert texts["BOPs"] == ("867 M", "0.031×")
    assert texts["Peak activations"] == ("49.2 kB", "0.188×\n65.5 kB as bytes")
    assert texts["Batch 1"] == ("3.31 ms", "4.41× PyTorch\n1.82× onnxruntime")
    assert texts["Batch 32"][0] == "109 ms"


def test_what_is_said_of_them(tmp_path: Path) -> None:
    models, _ = read_deployed(write_models(tmp_path))
    (table,) = section(models).tables
    assert table.said == [
        "Every convolution of all 4 exported models runs in integers.",
        "All 16 robust accuracies of what ships lie within the trained network's 95% interval.",
        *(
            f"At 4-bit activations, {bits}-bit weights, DQ and vanilla need the same MACs, BOPs "
            f"and activation memory; their files have {size}; batch 1 is 1.82 times as fast as in "
            "float32 onnxruntime; batch 32 is 1.82 times as fast as in float32 onnxruntime."
            for bits, size in ((8, "186 kB"), (4, "100 kB"))
        ),
    ]
    assert any("int8 speed on CPUs" in note for note in section(models).notes)
    page = page_of(tmp_path)
    assert "<h1>Deployed integer models</h1>" in page
    assert page.count("<svg viewBox") == len(ROBUST)


def test_what_is_amiss_is_said_in_the_table_and_above_it(tmp_path: Path) -> None:
    own = record("v", dq=False, bits=8, convolutions=[14, 15], calibrated=2048)
    for pair in own["scores"]:
        if pair["attack"] == "FGSM":
            shift = -60 if pair["eps"] < 0.01 else 60
            pair["deployed"] = [pair["trained"][0] + shift, 1000]
    write(tmp_path, own)
    models, _ = read_deployed(tmp_path)
    (table,) = section(models).tables
    assert table.said == [
        "Convolutions run in float: 1 of 15 in vanilla 8\u00a0×\u00a08.",
        "2 of 4 robust accuracies of what ships lie within the trained network's 95% interval; "
        "vanilla 8\u00a0×\u00a08 under FGSM 2/255 lies below it and vanilla 8\u00a0×\u00a08 under "
        "FGSM 8/255 lies above it.",
    ]
    assert not any("int8 speed" in note for note in section(models).notes)
    page = page_of(tmp_path)
    for words in ("1 in float", "below the interval", "above the interval", "measured on 2,048"):
        assert re.search(f">{words}<", page)


def test_it_joins_the_other_sections(tmp_path: Path) -> None:
    write_runs(tmp_path, seeds=1, networks=("float", "dq-4bit"))
    assert 'id="deployed"' not in page_of(tmp_path)
    write_models(tmp_path)
    page = page_of(tmp_path)
    order = [page.index(f'<section id="{name}">') for name in ("summary", "deployed", "settings")]
    assert order == sorted(order)
    assert '<a href="#deployed">' in page
    assert "<title>Accuracy under attack" in page
    assert page == page_of(tmp_path)


def test_least_and_other_data(tmp_path: Path) -> None:
    """No attack, no latency, another engine, one method alone, two data sets."""
    bare = record("a", dq=False, bits=1)
    bare["scores"] = bare["scores"][:1]
    bare["cost"]["latency"] = {}
    other = record("b", dq=True, data="digits", model="vgg-16")
    other["cost"]["latency"] = {"1": {"OpenVINO": other["cost"]["latency"]["1"]["PyTorch float32"]}}
    write(tmp_path, bare)
    write(tmp_path, other)
    page = page_of(tmp_path)
    assert "<h3>vgg-16 on digits</h3>" in page
    assert "No attack was run on both" in page
    assert "1-bit activations, 8-bit weights" in page


def test_files_that_are_not_ours_are_ignored_and_broken_ones_named(tmp_path: Path) -> None:
    write_models(tmp_path)
    whole = json.dumps(record("c", dq=True), indent=1)
    files = {
        "theirs.json": '{"kind": "other"}', "list.json": "[1]", "cut-theirs.json": "{",
        "cut.json": whole[:2000], "cut-early.json": whole[:20], "later.json": whole.replace(
            '"format": 1', '"format": 2'
        ),
        "nan.json": whole.replace('"flipped_codes": 0.00031', '"flipped_codes": NaN'),
        "many.json": whole.replace("9031,", "10001,"),
        "none.json": whole.replace('"float_file_bytes": 702000', '"float_file_bytes": 0'),
        "text.json": whole.replace('"bits": 4', '"bits": "4"'),
    }  # fmt: skip
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe")
    for name in ("theirs", "cut-early"):
        (tmp_path / f"{name}.onnx").write_bytes(b"")
    models, notes = read_deployed(tmp_path)
    assert len(models) == 4
    assert [note.split(":")[0] for note in notes] == [
        "cut-early.json", "cut.json", "later.json", "many.json", "nan.json", "none.json",
        "text.json",
    ]  # fmt: skip
    assert all("\n" not in note and "left out" in note for note in notes)
    assert page_of(tmp_path).count("Unreadable") == len(notes)
    write_runs(tmp_path, seeds=1, networks=("float",))
    assert page_of(tmp_path).count("Unreadable") == len(notes)


def test_a_folder_of_broken_files_alone_has_no_results(tmp_path: Path) -> None:
    write(tmp_path, record("a", dq=True)).write_text("{")
    with pytest.raises(UserError, match="no results"):
        build_report(tmp_path, tmp_path / "r.html")


def test_everything_in_the_files_is_escaped(tmp_path: Path) -> None:
    names = ("method", "model", "data", "fingerprint", "input", "command")
    own = record("run", dq=True) | dict.fromkeys(names, HOSTILE)
    own |= {"versions": {HOSTILE: HOSTILE}}
    own["scores"][1] |= {"attack": HOSTILE, "settings": HOSTILE}
    latency = own["cost"]["latency"]["1"]
    latency[HOSTILE] = latency["PyTorch float32"]
    write(tmp_path, own)
    write(tmp_path / "b", own | {"run": "broken", "bits": HOSTILE})
    page = page_of(tmp_path)
    assert "<script" not in page
    assert "<img" not in page


def test_it_reads_what_the_export_measures(tmp_path: Path) -> None:
    model = wide_resnet(10, 1, bits=2, weight_bits=4, deployable=True, num_classes=4)
    model(torch.rand(8, 3, 8, 8))  # gives the branches their ranges
    program = lower(model.eval(), (3, 8, 8))
    integer, single = graph(program), graph(program, integers=False)
    sizes = {"file_bytes": integer.ByteSize(), "float_file_bytes": single.ByteSize()}
    card = static_cost(program, **sizes)
    card["latency"] = latencies(model, integer, single, (3, 8, 8), repeats=1, threads=1)
    write(tmp_path, record("a", dq=True, cost=card))
    (found,), notes = read_deployed(tmp_path)
    assert notes == []
    assert list(found.cost.latency) == [1, 32]
    names = {INTEGER, "onnxruntime float32", "PyTorch float32"}
    assert all(set(engines) == names for engines in found.cost.latency.values())
    assert (found.cost.threads, found.cost.repeats) == (1, 1)
    assert found.cost.float_macs == card["float_macs"] > 0


def test_it_stands_after_the_papers_sections(tmp_path: Path) -> None:
    write_runs(tmp_path, seeds=1, networks=("float",))
    write_models(tmp_path)
    figure = Section("fig1", "Figure 1", ("Text.",))
    page = build_report(tmp_path, tmp_path / "report.html", sections=[figure]).read_text()
    check(page)
    names = ("paper-fig1", "deployed", "all")
    order = [page.index(f'<section id="{name}">') for name in names]
    assert order == sorted(order)
    assert page.count('<a href="#deployed">') == 1
