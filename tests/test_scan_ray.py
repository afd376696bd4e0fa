"""A scan on a real Ray cluster of several nodes on this machine, one of which is killed while it works."""

import json
import time
from pathlib import Path

import pytest

import attnlens
from attnlens.errors import AttnlensError
from tests.test_scan import plant

ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'attnlens[ray]'")
pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own, of its imports and of sockets of killed nodes


@pytest.fixture
def cluster(monkeypatch):
    """Start a head without CPUs and two nodes with one each, and leave nothing behind."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("PYTHONPATH", str(Path(attnlens.__file__).parents[1]))
    small = {"object_store_memory": 80_000_000, "include_dashboard": False}
    started = Cluster()
    try:
        try:
            started.add_node(num_cpus=0, **small)
            started.workers = [started.add_node(num_cpus=1, object_store_memory=80_000_000) for _ in range(2)]
            started.wait_for_nodes()
        except Exception as error:  # noqa: BLE001  # Ray raises Exception itself where a node is not up in 30 s
            pytest.skip(f"Ray could not start three nodes here: {error}")
        yield started
    finally:
        ray.shutdown()
        started.shutdown()


def test_a_node_killed_while_it_works_loses_nothing_and_counts_nothing_twice(cluster, tmp_path):
    folder, output = tmp_path / "models", tmp_path / "out"
    folder.mkdir()
    wrong = plant(folder, 12)
    killed = []

    def kill_a_node(missing):
        """Kill one node once two models are done and others are under way."""
        for place, job in enumerate(missing):
            if place == 2:
                cluster.remove_node(cluster.workers[0], allow_graceful=False)
                killed.append(job.name)
            yield job

    found = attnlens.scan(f"{folder}/*", output, ray=cluster.address, progress=kill_a_node)
    assert killed
    assert len(found.results) == 15
    assert {Path(name).name for name in found.failed} == set(wrong)
    results = [json.loads(path.read_text()) for path in (output / "models").glob("*.json")]
    assert sorted(result["model"] for result in results) == sorted(str(path) for path in folder.iterdir())
    for name, result in found.results.items():
        if result["status"] == "ok":
            file = next((output / "models").glob(f"*_{Path(name).name}-*.csv"))
            assert file.read_text() == attnlens.inspect(name).stats.to_csv()
    assert attnlens.scan(f"{folder}/*", output, ray=cluster.address).measured == 0


def test_no_cluster_at_the_address_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_gcs_rpc_server_connect_timeout_s", "1")
    (tmp_path / "models").mkdir()
    plant(tmp_path / "models", 1, corrupt=False)
    begin = time.monotonic()
    with pytest.raises(AttnlensError, match=r"no Ray cluster answers at 'nowhere'.*ray start --head"):
        attnlens.scan(f"{tmp_path}/models/*", tmp_path / "out", ray="nowhere")
    assert time.monotonic() - begin < 60
