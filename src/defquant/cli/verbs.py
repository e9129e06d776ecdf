"""What each verb does. Its signature is its flags, its docstring its help. No torch on import."""

from pathlib import Path
from typing import Any

from defquant.cli import rows, scores
from defquant.cli.making import demo, reproduce, seconds_of, train
from defquant.cli.rows import print_json
from defquant.cli.shipping import export, pull, push, verify
from defquant.errors import UserError, needs
from defquant.progress import keep_log, say
from defquant.records import read_folder

__all__ = ["VERBS"]


def diagnose(
    run: str | None = None,
    *,
    own: scores.Own = scores.OWN,
    out: str | None = None,
    against: tuple[str, ...] = (),
    substitute: str | None = None,
    eps: float = 8 / 255,
    images: scores.Images = 200,
    steps: int = 40,
    restarts: int = 2,
    queries: int = 500,
    audited: int = 8,
    no_audit: bool = False,
    seed: scores.Seed = 0,
    batch_size: scores.Batch = 256,
    data_root: scores.Root = None,
    device: scores.Device = "auto",
    json: scores.Json = False,
) -> int:
    """Say whether the robustness of a run or of your own model is real, and where noise grows.

    Three parts on stdout, diagnosis.json in the run's folder; exit status 1 on FAIL or OVERSTATED.

    Args:
        run: folder of the run, if no --model-file.
        out: for --model-file: folder of the results.
        against: runs to set its error amplification beside: its float and its vanilla twin.
        substitute: run through which the black box goes.
        eps: radius, as 8/255.
        steps: of the usual attack, PGD.
        restarts: of the usual attack.
        queries: of the random search.
        audited: images of the Lipschitz audit.
        no_audit: leave the audit out.
    """
    mine = {"against": against, "substitute": substitute}
    scores.check_model("diagnose", [run] if run else [], own, out, mine)
    scores.least(1, batch_size=batch_size, steps=steps, restarts=restarts, queries=queries)
    from defquant.diagnose import Effort
    from defquant.diagnose.runs import diagnose_foreign, diagnose_run
    from defquant.distributed import pick_device
    from defquant.files import make_folder, write_json
    from defquant.foreign import blamed

    effort = Effort(
        steps=steps, restarts=restarts, queries=queries, seed=seed, batch_size=batch_size
    )
    how: Any = {"audited": 0 if no_audit else audited, "effort": effort}
    place = pick_device(device)
    keep_log(Path(run or out or ""))
    if own.model_file is None:
        record = diagnose_run(
            Path(run or ""), eps, against=[Path(other) for other in against],
            substitute=Path(substitute) if substitute else None, images=images,
            data_root=data_root, device=place, **how,
        )  # fmt: skip
    else:
        asked = own.opened(data_root, images, batch_size, place)
        with blamed(own.model_file):
            record = diagnose_foreign(Path(out or ""), *asked, eps, **how)
        make_folder(Path(out or ""))
    print_json(record) if json else print("\n".join(rows.diagnosis_rows(record)))
    print(write_json(Path(run or out or "") / "diagnosis.json", record))
    return int(record["verdict"] in ("FAIL", "OVERSTATED"))


def judge(
    model: str,
    *,
    data: str | None = None,
    reference: str | None = None,
    eps: tuple[float, ...] = (1 / 255, 2 / 255, 8 / 255),
    margin: float = 1.0,
    budget: str = "10m",
    out: str = "judged",
    weights: str | None = None,
    reference_weights: str | None = None,
    input: str | None = None,
    reference_input: str | None = None,
    images: scores.Images = None,
    seed: scores.Seed = 0,
    data_root: scores.Root = None,
    json: scores.Json = False,
) -> int:
    """Say whether a quantised model's robustness is real, whoever made it.

    A verdict on stdout, judgement.json and a page in --out. Exit status 1 where its gradients are
    masked, or it is surely worse than the reference by more than the margin.

    Args:
        model: folder of a run, NAME.onnx, NAME.pt2, my.py:make_model, torchscript:FILE. THE LAST
            THREE CAN RUN THEIR MAKER'S CODE.
        data: digits, cifar10, svhn, folder or npz; a run knows its own.
        reference: the float model that it must not fall behind, named in the same ways.
        eps: radii, as 8/255, at least 1/255.
        margin: points of robust accuracy that it may fall behind.
        budget: of time, as 90s, 10m or 1h; it stops earlier, once all is decided.
        out: folder of the verdict.
        weights: for my.py:make_model: a .safetensors file.
        reference_weights: the same for --reference.
        input: how an ONNX file takes images, if not found: '0..1, NHWC', 'mean 0.5 std 0.2'.
        reference_input: the same for --reference.
        images: at most so many test images; none for all.
        seed: of the images' order and the attacks' draws.
        data_root: where the data lies.
    """
    scores.least(1, images=images)
    seconds = seconds_of(budget)
    keep_log(Path(out))
    from defquant.files import write_bytes, write_json
    from defquant.judging.suspects import images_for
    from defquant.judging.verdict import judge as judged
    from defquant.report import judged_page

    found = judged(
        model, images_for(model, data, data_root), reference=reference, eps=eps,
        margin=margin, budget=seconds, images=images, weights=weights,
        reference_weights=reference_weights, input=input, reference_input=reference_input,
        seed=seed,
        tell=lambda line: say(f"defquant: {line}"),
    )  # fmt: skip
    print_json(found.record) if json else print("\n".join(rows.judged_rows(found.record)))
    page = judged_page(found.record).encode()
    print(write_json(Path(out) / "judgement.json", found.record))
    print(write_bytes(Path(out) / "judgement.html", page))
    return int(found.finding)


def explore(
    models: tuple[str, ...] = (),
    *,
    data: str | None = None,
    weights: scores.Weights = None,
    host: str = "127.0.0.1",
    port: int = 7860,
    data_root: scores.Root = None,
) -> None:
    """Fool networks by hand, in the browser: pick or draw a picture, and see where the error grows.

    Args:
        models: folders of runs, or of several runs, NAME.onnx, NAME.pt2, my.py:make_model,
            torchscript:FILE, of one data set. THE LAST THREE CAN RUN THEIR MAKER'S CODE.
        data: digits, cifar10, svhn, folder or npz; a run knows its own.
        host: 0.0.0.0 lets everybody on the network in.
        port: of the page; 0 for any that is free.
    """
    if not models:
        raise UserError("explore needs a model: folders of runs, NAME.onnx, my.py:make_model, ...")
    needs("explore", "gradio")
    from defquant.explore.server import LOOPBACK, Page, serve
    from defquant.explore.trial import specs_of
    from defquant.judging.suspects import images_for

    specs = specs_of(models)
    known = next((spec for spec in specs.values() if Path(spec).is_dir()), models[0])
    if host not in LOOPBACK:
        say(f"defquant: whoever reaches {host}:{port} can use it")
    serve(
        Page(specs, images_for(known, data, data_root), weights), host, port,
        lambda address: print(address, flush=True),
    )  # fmt: skip


def report(
    folder: str,
    *,
    out: str = "report.html",
    markdown: str | None = None,
    figure: str | None = None,
    ladder: str | None = None,
    json: scores.Json = False,
) -> None:
    """Make one self-contained HTML page of a folder of runs; its summary on stdout.

    Args:
        folder: folder that holds runs.
        out: the page.
        markdown: also a Markdown table.
        figure: also accuracy over eps, as PNG, SVG or PDF.
        ladder: also accuracy from the weakest attack to the strongest, as PNG, SVG or PDF.
    """
    from defquant.files import write_bytes
    from defquant.report import build_report, markdown_table, plot_curves, plot_ladder

    try:
        measurements = read_folder(Path(folder))
    except UserError:  # cards of exported models alone, or what `build_report` refuses
        measurements = []
    page = build_report(Path(folder), Path(out), measurements=measurements or None)
    if markdown:
        write_bytes(Path(markdown), markdown_table(measurements).encode())
    if figure:
        plot_curves(measurements, Path(figure))
    if ladder:
        plot_ladder(measurements, Path(ladder))
    rows.print_summary(measurements, as_json=json)
    print(page)


def data(action: str, name: str, *, data_root: str = "data", out: str | None = None) -> None:
    """Fetch a data set, or pack one into a single file that loads at once.

    Args:
        action: fetch (download, check, unpack) or pack.
        name: cifar10 or svhn; pack takes folder and npz, too.
        data_root: where the files go, or lie.
        out: of pack; NAME.safetensors if not given. Give it as --data-root then.
    """
    from defquant.data import fetch, load, pack

    if action == "pack" and name != "digits":
        splits = load(name, data_root, "train"), load(name, data_root, "test")
        print(pack(name, *splits, Path(out or f"{name}.safetensors")))
    elif action == "fetch" and out is None:
        print(fetch(name, Path(data_root)))
    else:
        raise UserError(
            "use `defquant data fetch NAME`, or `defquant data pack NAME --out FILE`, not of "
            f"digits; found {action} {name}" + " --out" * (out is not None)
        )


VERBS = {
    verb.__name__: verb
    for verb in (
        demo, train, scores.attack, scores.rescore, scores.transfer, diagnose, judge, explore,
        export, verify, push, pull, reproduce, report, data,
    )
}  # fmt: skip
"""Every verb, in the order of the help."""
