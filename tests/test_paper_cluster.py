"""Jobs on a Ray cluster of two nodes on this machine, one of which dies."""

import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from defquant.errors import UserError
from defquant.paper import workers
from defquant.paper.grid import Trial
from defquant.paper.run import run
from defquant.paper.workers import each_on_cluster
from small_experiment import CELLS, FLOAT, each_once, make_undisturbed, same, stamps, until

JOBS = [("a", partial(str, "done"))]


def test_without_ray_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"need Ray: pip install 'defquant\[ray\]'"):
        list(each_on_cluster("t", JOBS, "auto"))


def test_wrong_and_dead_addresses_are_one_line() -> None:
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'defquant[ray]'")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]  # free again, and nobody's, when this block is left
    for address, problem in {
        f"127.0.0.1:{port}": "nothing answers at .*refused",
        f"ray://127.0.0.1:{port}": "nothing answers at .*refused",
        "ray://nowhere.invalid:10001": "nothing answers at ",
        "127.0.0.1:99999999": "nothing answers at ",
        "head": "workers are at ray://HOST:10001",
        "http://127.0.0.1": "workers are at ray://HOST:10001",
    }.items():
        with pytest.raises(UserError, match=problem) as error:
            list(each_on_cluster("t", JOBS, address))
        assert "\n" not in str(error.value)


def test_networks_of_gpus_ask_for_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def cluster(
        title: str, jobs: Any, address: str, *, gpus: int | None, total: int
    ) -> Iterator[Any]:
        asked.append((address, gpus))
        yield from ((name, f"{name}: no") for name, _ in jobs)

    monkeypatch.setattr("defquant.paper.run.each_on_cluster", cluster)
    for device in ("auto", "cpu", "cuda", "cuda:0"):
        network = replace(FLOAT, train=replace(FLOAT.train, device=device))
        assert run([Trial().cell(network)], tmp_path, workers="ray") == [f"{network.name}: no"]
    assert asked == [("ray", None), ("ray", 0), ("ray", 1), ("ray", 1)]


def test_a_job_that_always_dies_is_given_up_and_others_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ray = SimpleNamespace(exceptions=pytest.importorskip("ray").exceptions)
    begun: list[str] = []

    def remote(_: str, job: Callable[[], str]) -> Callable[[], str]:
        return lambda: job()  # another reference each time

    def dies(times: int, name: str) -> str:
        begun.append(name)
        if begun.count(name) <= times:
            raise ray.exceptions.OutOfMemoryError("")
        return "done"

    ray.remote = lambda **how: (
        how == {"num_cpus": 1, "num_gpus": 0, "max_retries": 0}
        and (lambda _: SimpleNamespace(remote=remote))
    )
    ray.is_initialized, ray.cluster_resources, ray.get = lambda: True, dict, lambda job: job()
    ray.wait = lambda references, timeout: (references[:1], references[1:])
    monkeypatch.setattr(workers, "_connected", lambda _: nullcontext(ray))
    jobs = [(name, partial(dies, n, name)) for name, n in {"a": 1000, "b": 9, "c": 0}.items()]
    found = dict(each_on_cluster("t", jobs, "auto"))
    assert found["b"] == found["c"] == "done"
    assert found["a"].startswith("a: its worker died 10 times (out of memory?): ")
    assert [begun.count(name) for name in "abc"] == [10, 10, 1]


# ------------------------------------------------------------------------- a real cluster


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    """A head that runs one job at a time; `add_node` adds others."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'defquant[ray]'")
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        # so that nodes know this file
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        head = {"num_cpus": 1, "object_store_memory": 100 * 2**20, "include_dashboard": False}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            yield cluster
        finally:
            cluster.shutdown()  # type: ignore[no-untyped-call]


@pytest.fixture
def doomed(nodes: Any) -> Iterator[Any]:
    """A second node, which the driver does not hang on: the driver is connected before."""
    import ray

    with ray.init(nodes.address):
        yield nodes.add_node(num_cpus=1, object_store_memory=100 * 2**20)


@pytest.mark.slow
def test_networks_on_a_cluster_that_loses_a_node_are_as_on_one_machine(
    nodes: Any, doomed: Any, tmp_path: Path
) -> None:
    out = tmp_path / "out"

    def kill() -> None:
        assert until(partial(stamps, out), 100)  # both nodes are at work
        nodes.remove_node(doomed, allow_graceful=False)

    thread = threading.Thread(target=kill)
    thread.start()
    assert run(CELLS, out, workers=nodes.address) == []
    thread.join()
    assert each_once(out)  # nothing is lost, or made twice
    assert same(out, make_undisturbed(tmp_path / "undisturbed"))


def die() -> str:
    os.kill(os.getpid(), 9)
    return "unreached"


def refuse() -> str:
    raise UserError("a rule, the value, the remedy")


@pytest.mark.slow
def test_errors_on_a_cluster(nodes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(each_on_cluster("t", JOBS, nodes.address)) == [("a", "done")]
    with pytest.raises(UserError, match=r"^a rule, the value, the remedy$"):
        list(each_on_cluster("t", [("a", refuse)], nodes.address))
    with pytest.raises(ValueError, match="invalid literal"):
        list(each_on_cluster("t", [("a", partial(int, "x"))], nodes.address))  # type: ignore[list-item]
    monkeypatch.setattr(workers, "DEATHS", 2)
    found = dict(each_on_cluster("t", [("dies", die), *JOBS], nodes.address))
    assert found["a"] == "done"
    assert "dies: its worker died 2 times" in found["dies"]
    (tmp_path / "only_here.py").write_text("def job():\n    return 'done'\n")
    monkeypatch.syspath_prepend(tmp_path)
    import only_here  # type: ignore[import-not-found]

    with pytest.raises(UserError, match="cannot import the job: install the same defquant on all"):
        list(each_on_cluster("t", [("a", only_here.job)], nodes.address))
