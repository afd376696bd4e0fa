"""Weights on a hub and at plain URLs, against a server of our own: caches, offline, revisions, kinds of failure."""

import hashlib
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from attnlens.checkpoints.download import cached_path, fetch_url
from attnlens.checkpoints.hub import cached_tags, fetch, fetch_weights, find_weights, open_weights
from attnlens.errors import CheckpointError, ModelNotFoundError, UsageError
from attnlens.models.open import open_model
from attnlens.models.opened import Access
from tests.hub_server import COMMIT, OLD_COMMIT

FILE = "model.safetensors"
REPO = "owner/name"
OLD, NEW = (save({"weight": np.full((7, 11), value, np.float32)}) for value in (1, 2))


@pytest.fixture
def stocked(hub):
    hub.put(REPO, {FILE: OLD}, OLD_COMMIT)
    hub.put(REPO, {FILE: NEW, "config.json": b"{}"})
    return hub


def attnlens(environment, *arguments, cwd, timeout=300):
    return subprocess.run(
        [sys.executable, "-c", "from attnlens.cli import main; main()", *map(str, arguments)],
        env=environment,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def kept(tmp_path):
    """Return every file of the hub's cache that a later run could take for weights."""
    return [path for path in (tmp_path / "hf").rglob("*") if path.name == FILE]


def test_a_file_is_downloaded_once_and_then_read_without_asking(stocked):
    first = fetch(REPO, FILE)
    assert first.read_bytes() == NEW
    before = len(stocked.log)
    assert fetch(REPO, FILE) == first
    assert len(stocked.log) == before


def test_a_missing_file_is_none_and_the_next_name_is_tried(hub):
    hub.put(REPO, {"pytorch_model.bin": b"x"})
    assert fetch(REPO, FILE) is None
    assert fetch_weights(REPO).name == "pytorch_model.bin"


@pytest.mark.usefixtures("stocked")
@pytest.mark.parametrize(("revision", "content", "commit"), [(None, NEW, COMMIT), ("v1", OLD, OLD_COMMIT)])
def test_a_revision_is_pinned_and_the_commit_is_told(revision, content, commit):
    weights, source = open_weights(REPO, revision=revision)
    assert weights["weight"][0, 0] == np.frombuffer(content[-4:], np.float32)[0]
    assert source == {"hub": REPO, "revision": commit}


def test_a_body_that_is_cut_off_is_asked_for_again(stocked, tmp_path):
    stocked.cuts = 1
    assert fetch(REPO, FILE).read_bytes() == NEW
    assert len(stocked.asked("GET", FILE)) == 2
    assert len(kept(tmp_path)) == 1


def test_a_server_that_is_busy_is_asked_again(stocked):
    stocked.failures = 2
    assert fetch(REPO, FILE).read_bytes() == NEW


@pytest.mark.parametrize("announced", [len(NEW) - 1, len(NEW) + 1])
def test_a_body_of_another_size_than_announced_is_not_kept(stocked, tmp_path, announced):
    stocked.announced_size = announced
    with pytest.raises(ModelNotFoundError, match=r"^cannot download owner/name/model.safetensors: Consistency check"):
        fetch(REPO, FILE)
    assert kept(tmp_path) == []


def test_a_body_with_another_hash_than_declared_is_refused_and_not_kept(stocked, tmp_path):
    stocked.damages = True
    with pytest.raises(CheckpointError, match=r"sends for owner/name/model.safetensors has not the sha256 it declares"):
        fetch(REPO, FILE)
    assert kept(tmp_path) == []
    assert find_weights(REPO) is None
    stocked.damages = False
    assert fetch(REPO, FILE).read_bytes() == NEW


def test_a_body_that_comes_in_pieces_is_waited_for(stocked):
    stocked.pause = 0.05
    assert fetch(REPO, FILE).read_bytes() == NEW


def test_a_hub_that_takes_requests_and_answers_nothing_is_given_up(stocked, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.3)
    stocked.silent = True
    begin = time.monotonic()
    with pytest.raises(ModelNotFoundError, match=r"the hub cannot be reached \(.*hf download owner/name model.safet"):
        fetch(REPO, FILE)
    assert time.monotonic() - begin < 5


def test_a_process_killed_in_a_download_leaves_nothing_that_is_believed(stocked, hub_environment, tmp_path):
    stocked.stall = threading.Event()
    code = f"from attnlens.checkpoints.hub import fetch; fetch({REPO!r}, {FILE!r})"
    with subprocess.Popen([sys.executable, "-c", code], env=hub_environment) as process:
        deadline = time.monotonic() + 60
        while not stocked.asked("GET", FILE) and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.3)
        process.kill()
    stocked.stall.set()
    stocked.stall = None
    assert kept(tmp_path) == []
    assert find_weights(REPO) is None
    assert fetch(REPO, FILE).read_bytes() == NEW


@pytest.mark.parametrize(
    ("repo", "revision", "told"),
    [
        ("owner/gated", None, "owner/gated needs its licence accepted on the hub"),
        ("owner/absent", None, "the hub has no repository 'owner/absent'"),
        (REPO, "v9", "owner/name has no revision 'v9': give a branch, a tag or a commit"),
        ("owner/name/more", None, "'owner/name/more' is no hub repository: give owner/name"),
    ],
)
def test_what_the_hub_refuses_is_told_in_one_line(stocked, repo, revision, told):
    stocked.gated.add("owner/gated")
    with pytest.raises(ModelNotFoundError) as caught:
        fetch_weights(repo, revision=revision)
    assert str(caught.value).startswith(told)
    assert "\n" not in str(caught.value)


def test_a_repository_without_weights_is_named(hub):
    hub.put(REPO, {"config.json": b"{}"})
    with pytest.raises(
        ModelNotFoundError, match=r"owner/name holds no weights named model.safetensors, .*checkpoint=FILE"
    ):
        fetch_weights(REPO)


@pytest.mark.usefixtures("hub")
def test_a_hub_that_is_not_there_is_given_up_at_once(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/{revision}/{filename}")
    begin = time.monotonic()
    with pytest.raises(ModelNotFoundError, match=r"the hub cannot be reached \(.*hf download owner/name model.safet"):
        fetch_weights(REPO)
    assert time.monotonic() - begin < 5


def test_offline_asks_nothing_and_says_what_to_do(stocked, monkeypatch):
    from huggingface_hub import constants

    with pytest.raises(
        ModelNotFoundError, match=r"offline=True or HF_HUB_OFFLINE forbids .*hf download owner/name model"
    ):
        fetch_weights(REPO, offline=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelNotFoundError, match=r"offline=True or HF_HUB_OFFLINE forbids"):
        open_weights(REPO, remote=True)
    assert stocked.log == []


def test_offline_reads_what_is_cached(stocked):
    fetch(REPO, FILE)
    stocked.log.clear()
    weights, _ = open_weights(REPO, offline=True)
    assert weights["weight"].shape == (7, 11)
    assert stocked.log == []


def test_shards_are_fetched_beside_their_index(hub):
    index = {"weight_map": {"a": "part-1.safetensors", "b": "part-2.safetensors"}}
    parts = {f"part-{n}.safetensors": save({name: np.full(3, n, np.float32)}) for n, name in ((1, "a"), (2, "b"))}
    hub.put(REPO, {"model.safetensors.index.json": json.dumps(index).encode(), **parts})
    weights, _ = open_weights(REPO)
    assert weights["b"].tolist() == [2, 2, 2]


# Plain URLs, in torch.hub's folder.


def named_after_hash(content, digits=8):
    return f"/files/weights-{hashlib.sha256(content).hexdigest()[:digits]}.pth"


def test_a_url_is_kept_where_timm_looks_for_it(hub, tmp_path):
    path = named_after_hash(NEW)
    hub.files["", "", path] = NEW
    found = fetch_url(hub.url + path)
    assert found == tmp_path / "torch" / "hub" / "checkpoints" / Path(path).name
    assert found.read_bytes() == NEW
    before = len(hub.log)
    fetch_url(hub.url + path, offline=True)
    assert len(hub.log) == before


def test_a_url_whose_content_has_another_hash_is_refused_and_not_kept(hub, tmp_path):
    path = named_after_hash(OLD)
    hub.files["", "", path] = NEW
    with pytest.raises(CheckpointError, match=r"has not the sha256 its name begins with"):
        fetch_url(hub.url + path)
    assert [entry for entry in (tmp_path / "torch").rglob("*") if entry.is_file()] == []


def test_a_damaged_file_in_the_folder_is_replaced_or_refused_offline(hub):
    path = named_after_hash(NEW)
    hub.files["", "", path] = NEW
    kept_at = cached_path(hub.url + path)
    kept_at.parent.mkdir(parents=True)
    kept_at.write_bytes(NEW[:-1])
    with pytest.raises(ModelNotFoundError, match=r"is damaged, and offline=True"):
        fetch_url(hub.url + path, offline=True)
    assert fetch_url(hub.url + path).read_bytes() == NEW


def test_a_name_that_only_looks_like_a_hash_is_none(hub):
    path = "/ijepa/IN1K-vit.h.14-300e.pth.tar"  # a tag of timm's: torch.hub's pattern finds the hash "300e" in it
    hub.files["", "", path] = NEW
    assert fetch_url(hub.url + path).read_bytes() == NEW


def test_a_url_that_is_cut_off_or_busy_is_asked_again(hub):
    hub.files["", "", "/files/weights.pth"] = NEW
    hub.cuts, hub.failures = 1, 1
    assert fetch_url(f"{hub.url}/files/weights.pth").read_bytes() == NEW


@pytest.mark.parametrize(("path", "told"), [("/files/absent.pth", "404")])
def test_a_url_that_is_not_there_is_told_in_one_line(hub, path, told):
    with pytest.raises(ModelNotFoundError, match=rf"cannot download {hub.url}{path}: .*{told}.*checkpoint=FILE$"):
        fetch_url(hub.url + path)


def test_tags_are_known_as_cached_in_either_place(stocked):
    url = f"{stocked.url}{named_after_hash(NEW)}"
    stocked.files["", "", named_after_hash(NEW)] = NEW
    tags = {
        "hub": {"hf_hub_id": REPO, "hf_hub_filename": None, "url": None},
        "url": {"hf_hub_id": None, "hf_hub_filename": None, "url": url},
        "absent": {"hf_hub_id": "owner/other", "hf_hub_filename": None, "url": None},
    }
    assert cached_tags(tags) == {}
    fetch(REPO, FILE)
    fetch_url(url)
    assert list(cached_tags(tags)) == ["hub", "url"]


def test_offline_and_remote_exclude_each_other():
    with pytest.raises(UsageError, match="offline=True and remote=True exclude each other"):
        open_model("test_vit", None, access=Access(offline=True, remote=True))


# The command, in a process of its own.


@pytest.fixture(scope="module")
def tiny():
    """Return the files of a small timm repository, with random weights."""
    import timm
    import torch
    from safetensors.torch import save as save_torch

    torch.manual_seed(0)
    config = {"architecture": "test_vit", "num_classes": 1000}
    return {"config.json": json.dumps(config).encode(), FILE: save_torch(timm.create_model("test_vit").state_dict())}


@pytest.mark.parametrize("name", ["timm/test_vit.r160_in1k@v1", "hf-hub:timm/test_vit.r160_in1k@v1"])
def test_inspect_reads_a_pinned_revision_and_keeps_stdout_clean(hub, hub_environment, tmp_path, tiny, name):
    hub.put("timm/test_vit.r160_in1k", tiny, OLD_COMMIT)
    done = attnlens(hub_environment, "inspect", name, "--json", "--layers", "0", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    provenance = json.loads(done.stdout)["provenance"]
    assert provenance["revision"] == OLD_COMMIT
    assert provenance["sha256"] == hashlib.sha256(tiny[FILE]).hexdigest()


@pytest.mark.parametrize(("option", "variable"), [("--offline", None), (None, "HF_HUB_OFFLINE")])
def test_inspect_offline_with_an_empty_cache_says_what_to_do(hub, hub_environment, tmp_path, option, variable):
    environment = {**hub_environment, **({variable: "1"} if variable else {})}
    done = attnlens(environment, "inspect", "test_vit", *([option] if option else []), cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1
    assert "hf download timm/test_vit.r160_in1k model.safetensors" in done.stderr
    assert hub.log == []


@pytest.mark.weights
def test_inspect_dinov2_by_name_online_from_the_cache_and_without_a_hub(hub, hub_environment, tmp_path, dinov2_file):
    hub.put("timm/vit_small_patch14_dinov2.lvd142m", {FILE: dinov2_file.read_bytes()})
    command = ("inspect", "vit_small_patch14_dinov2", "--json", "--fold", "raw")
    online = attnlens(hub_environment, *command, cwd=tmp_path)
    assert online.returncode == 0, online.stderr
    asked = len(hub.log)
    assert hub.asked("GET", FILE) == [None]
    cached = attnlens(hub_environment, *command, cwd=tmp_path)
    assert len(hub.log) == asked
    gone = {**hub_environment, "HF_ENDPOINT": "http://127.0.0.1:9"}
    offline = attnlens(gone, *command, "--offline", cwd=tmp_path)
    stats = [json.loads(done.stdout)["stats"] for done in (online, cached, offline)]
    assert len(stats[0]) == 12 * (6 + 6 + 1)
    assert stats[0] == stats[1] == stats[2]
