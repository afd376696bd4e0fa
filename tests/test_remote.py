"""A safetensors file read on the hub by ranges: equal to the local file, in fewer bytes, whatever the server does."""

import json
import struct
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save

from attnlens import inspect
from attnlens.checkpoints import SafetensorsFile
from attnlens.checkpoints.hub import fetch, find_weights, open_weights
from attnlens.checkpoints.remote import FIRST_REQUEST, GAP, RemoteSafetensors, open_remote
from attnlens.errors import CheckpointError, ModelNotFoundError
from tests.hub_server import COMMIT, OLD_COMMIT

FILE = "model.safetensors"
REPO = "owner/name"
RNG = np.random.default_rng(0)
TENSORS = {
    "blocks.0.attn.proj.weight": RNG.normal(size=(127, 131)).astype(np.float32),
    "blocks.0.attn.qkv.weight": RNG.normal(size=(381, 131)).astype(np.float16),
    "blocks.0.mlp.fc1.weight": RNG.normal(size=(1021, 509)).astype(np.float32),
    "blocks.1.attn.qkv.weight": RNG.normal(size=(381, 131)).astype(ml_dtypes.bfloat16),
    "head": np.zeros((0, 3), np.float32),
}
CONTENT = save(TENSORS, {"architecture": "some_vit"})
ATTENTION = [name for name in TENSORS if "attn" in name]


@pytest.fixture
def stocked(hub):
    hub.put(REPO, {FILE: CONTENT})
    return hub


def test_every_tensor_equals_that_of_the_whole_file(stocked, tmp_path):
    (tmp_path / FILE).write_bytes(stocked.files[REPO, COMMIT, FILE])
    remote, whole = open_remote(REPO, FILE), SafetensorsFile(tmp_path / FILE)
    assert dict(remote.metadata) == {"architecture": "some_vit"}
    assert set(remote) == set(whole) == set(TENSORS)
    for name, expected in whole.items():
        assert remote.shape(name) == expected.shape == TENSORS[name].shape
        assert remote[name].dtype == expected.dtype
        assert remote[name].tobytes() == expected.tobytes()


def test_only_what_is_asked_for_is_fetched_once(stocked):
    remote = open_remote(REPO, FILE)
    for _ in range(2):
        for name in ATTENTION:
            remote[name].sum()
    needed = sum(TENSORS[name].nbytes for name in ATTENTION)
    fetched = remote.provenance()["bytes_fetched"]
    assert needed - FIRST_REQUEST <= fetched <= needed + FIRST_REQUEST
    assert fetched < len(CONTENT) / 4
    assert remote.provenance()["requests"] == len(stocked.asked("GET", FILE)) <= 1 + len(ATTENTION)


def test_neighbours_that_are_expected_share_a_request(hub):
    tensors = {f"{index:03}": np.full(GAP // 8, index, np.float32) for index in range(40)}  # each GAP / 2 bytes
    hub.put(REPO, {FILE: save(tensors)})
    remote = open_remote(REPO, FILE)
    wanted = [name for name in tensors if int(name) % 10 in (4, 6)]  # 4 and 6 are GAP / 2 apart, the tens 3.5 GAP
    remote.expect(wanted)
    first = len(hub.asked("GET", FILE))
    for name in wanted:
        assert (remote[name] == int(name)).all()
    assert len(hub.asked("GET", FILE)) - first == 4


def test_going_through_all_tensors_takes_one_request(stocked):
    remote = open_remote(REPO, FILE)
    assert {name: value.tobytes() for name, value in remote.items()} == {
        name: value.tobytes() for name, value in TENSORS.items()
    }
    assert len(stocked.asked("GET", FILE)) == 2


def test_provenance_tells_the_declared_hash_and_the_commit(hub):
    hub.put(REPO, {FILE: CONTENT}, OLD_COMMIT)
    told = open_remote(REPO, FILE, "v1").provenance()
    assert told["url"] == f"{hub.url}/{REPO}/resolve/v1/{FILE}"
    assert (told["file"], told["bytes"], told["revision"]) == (FILE, len(CONTENT), OLD_COMMIT)
    assert told["sha256_declared"] == told["etag"]
    assert "sha256" not in told
    assert all(OLD_COMMIT in path for verb, path, _ in hub.log if verb == "GET")


def test_a_body_that_is_cut_off_is_taken_up_where_it_broke(stocked):
    remote = open_remote(REPO, FILE)
    name = "blocks.0.mlp.fc1.weight"
    stocked.cuts = 2
    assert remote[name].tobytes() == TENSORS[name].tobytes()
    ranges = [asked.removeprefix("bytes=").split("-") for asked in stocked.asked("GET", FILE)[1:]]
    assert len(ranges) == 3
    assert len({end for _, end in ranges}) == 1
    assert int(ranges[0][0]) < int(ranges[1][0]) < int(ranges[2][0])
    assert remote.provenance()["bytes_fetched"] == int(ranges[0][1]) + 1  # the file up to there, each byte once


def test_a_server_that_is_busy_is_asked_again(stocked):
    stocked.failures = 3
    remote = open_remote(REPO, FILE)
    stocked.failures = 3
    assert remote["blocks.0.attn.qkv.weight"].shape == (381, 131)


def test_a_server_that_stays_busy_is_given_up_in_one_line(stocked):
    remote = open_remote(REPO, FILE)
    stocked.failures = 100
    with pytest.raises(ModelNotFoundError, match=rf"^cannot download {REPO}/{FILE}: .*503"):
        remote["blocks.0.mlp.fc1.weight"]
    assert 100 - stocked.failures == 4


@pytest.mark.usefixtures("stocked")
def test_a_server_that_is_gone_is_told_in_one_line(monkeypatch):
    remote = open_remote(REPO, FILE)
    monkeypatch.setattr(remote._remote, "url", "http://127.0.0.1:9/file")
    with pytest.raises(ModelNotFoundError, match="the hub cannot be reached"):
        remote["blocks.0.mlp.fc1.weight"]


def test_a_server_without_ranges_makes_it_a_download(stocked):
    stocked.ignores_ranges = True
    weights, source = open_weights(REPO, remote=True)
    assert isinstance(weights, SafetensorsFile)
    assert source == {"hub": REPO, "revision": COMMIT}
    assert weights["blocks.0.attn.qkv.weight"].tobytes() == TENSORS["blocks.0.attn.qkv.weight"].tobytes()


def test_a_server_that_sends_other_bytes_is_refused(stocked):
    stocked.wrong_range = True
    with pytest.raises(CheckpointError, match=r"sends bytes 1-\d+/\d+ when asked for bytes 0-"):
        open_remote(REPO, FILE)


def test_a_repository_with_a_pickle_alone_is_downloaded(hub):
    import io

    import torch

    buffer = io.BytesIO()
    torch.save({"weight": torch.ones(3)}, buffer)
    hub.put(REPO, {"pytorch_model.bin": buffer.getvalue()})
    weights, _ = open_weights(REPO, remote=True)
    assert weights["weight"].tolist() == [1, 1, 1]


def test_a_cached_file_is_read_without_asking(stocked):
    fetch(REPO, FILE)
    stocked.log.clear()
    weights, _ = open_weights(REPO, remote=True)
    assert isinstance(weights, SafetensorsFile)
    assert stocked.log == []


@pytest.mark.usefixtures("stocked")
def test_remote_weights_are_opened_by_the_same_call():
    weights, source = open_weights(REPO, remote=True)
    assert isinstance(weights, RemoteSafetensors)
    assert source == {"hub": REPO}


def file_with(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def place(begin, end, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"short", "its header would have"),
        (file_with({}, length=10**8 + 1), "its header would have 100000001 bytes"),
        (file_with({}, length=1000), "its header would have 1000 bytes, the file has 10"),
        (b"<html>no such page</html>" * 9, "its header would have"),
        (file_with(b"{not json", bytes(8)), "is no safetensors file"),
        (file_with({"a": place(0, 8), "b": place(4, 12)}, bytes(12)), "is no safetensors file"),
        (file_with({"a": place(0, 8)}, bytes(4)), "is no safetensors file"),
        (file_with({"a": place(0, 8)}, bytes(16)), "is no safetensors file"),
        (file_with({"a": place(0, 8, (3,))}, bytes(8)), "is no safetensors file"),
        (file_with({"a": place(0, 2**70)}, bytes(8)), "is no safetensors file"),
    ],
    ids=["short", "huge", "beyond", "html", "broken", "overlapping", "truncated", "trailing", "shape", "absurd"],
)
def test_a_header_that_is_wrong_is_refused_in_one_line(hub, content, told):
    hub.put(REPO, {FILE: content})
    with pytest.raises(CheckpointError, match=told) as caught:
        open_remote(REPO, FILE)
    assert "\n" not in str(caught.value)
    assert REPO in str(caught.value)


@pytest.mark.weights
def test_inspect_remote_equals_the_local_read_and_fetches_a_third(hub, hub_environment, tmp_path, dinov2_file):
    hub.put("timm/vit_small_patch14_dinov2.lvd142m", {FILE: dinov2_file.read_bytes()})
    command = ["inspect", "vit_small_patch14_dinov2", "--remote", "--json", "--fold", "raw"]
    done = subprocess.run(
        [sys.executable, "-c", "from attnlens.cli import main; main()", *command],
        env=hub_environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    remote = json.loads(done.stdout)
    local = inspect("vit_small_patch14_dinov2", dinov2_file, fold="raw").to_json()
    assert remote["stats"] == json.loads(json.dumps(local["stats"]))
    file = SafetensorsFile(dinov2_file)
    attention = sum(file[name].nbytes for name in file if ".attn." in name)
    fetched, size = remote["provenance"]["bytes_fetched"], dinov2_file.stat().st_size
    assert attention < fetched < 1.02 * attention < 0.36 * size
    assert remote["provenance"]["sha256_declared"] == local["provenance"]["sha256"]
    assert (
        f"fetched {fetched / 1e6:.1f} of {size / 1e6:.1f} MB in {len(hub.asked('GET', FILE))} requests" in done.stderr
    )
    assert find_weights("timm/vit_small_patch14_dinov2.lvd142m") is None  # what is there in part is no cached file
