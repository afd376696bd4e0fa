"""Faults that are no kill: inputs and folders that vanish, two writers of the same output, a hub that misbehaves."""

from __future__ import annotations

import json
import os
import random
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.trust.fault_checks import contents, half_files, leftovers, states
from benchmarks.trust.fault_commands import (
    NAMES,
    comparison,
    finished,
    fresh,
    measure,
    often_saved,
    put_old,
    simple_commands,
    small_source,
)
from benchmarks.trust.fault_kills import both, resumable
from benchmarks.trust.fault_runs import Child, Ended, at_step


@dataclass
class Cases:
    """Cases by what was tried, and what was wrong with any."""

    cases: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def expect(self, what: str, right: bool, told: object = "") -> None:
        """Count a case."""
        self.cases[what] += 1
        if not right:
            self.wrong.append(f"{what}: {told}")

    def to_json(self) -> dict[str, Any]:
        """Return the counts."""
        return {"cases": sum(self.cases.values()), "wrong": self.wrong, "by_case": dict(self.cases)}


def other_file(path: Path) -> None:
    """Give the name of a weight file to another one of the same architecture."""
    shutil.copy(path.with_name("other.safetensors"), path.with_name("moved.safetensors"))
    path.with_name("moved.safetensors").replace(path)


def cut(path: Path) -> None:
    """Cut a file to its half where it lies."""
    os.truncate(path, path.stat().st_size // 2)


def written_over(path: Path) -> None:
    """Write another content of the same length over a file."""
    with path.open("r+b") as file:
        file.write(path.with_name("other.safetensors").read_bytes())


INPUT_FAULTS: dict[str, Callable[[Path], Any]] = {
    "removed": Path.unlink,
    "replaced by another": other_file,
    "cut to its half": cut,
    "written over": written_over,
}


def vanishing_inputs(work: Path, tensors: tuple[int, ...] = (1, 3, 6)) -> Cases:
    """Let something happen to the weight file when its n-th tensor is read: a one-line error, or the right table."""
    found = Cases()
    source = small_source(work)
    shutil.copy(source, other := work / "other.safetensors")
    data = bytearray(other.read_bytes())
    data[-400:] = bytes(400)
    other.write_bytes(data)
    arguments = ["inspect", str(work / "input.safetensors"), "-o", "made", "--dpi", "50"]
    shutil.copy(source, work / "input.safetensors")
    finished(Child(arguments, fresh(work / "untouched")).wait())
    right = contents(work / "untouched")
    for what, act in INPUT_FAULTS.items():
        for number in tensors:
            path = work / "input.safetensors"
            shutil.copy(source, path)
            folder = fresh(work / "vanishing")
            ended = Child(arguments, folder, _at_tensor(number, partial(act, path))).wait()
            told = ended.code == 1 and ended.one_line and not contents(folder)
            found.expect(f"weight file {what}", told or (ended.code == 0 and contents(folder) == right), ended)
            assert not leftovers(folder)
    return found


def _at_tensor(number: int, act: Callable[[], Any]) -> Callable[[], None]:
    """Return what makes a child ``act`` when the n-th tensor of a weight file is asked for."""

    def before() -> None:
        from attnlens.checkpoints.files import SafetensorsFile

        original, count = SafetensorsFile.__getitem__, [0]

        def counted(self: SafetensorsFile, name: str) -> Any:
            count[0] += 1
            if count[0] == number:
                act()
            return original(self, name)

        SafetensorsFile.__getitem__ = counted  # type: ignore[method-assign]

    return before


def vanishing_folders(draws: int, rng: random.Random, work: Path) -> Cases:
    """Remove the output folder at a step of the writing: an error of one line, or every output whole."""
    found = Cases()
    (inspect,) = simple_commands(work, ["inspect"])
    measure(inspect, work, real=False)
    base = comparison(small_source(work))
    counted, told = fresh(work / "counted"), work / "counted.steps"
    finished(Child(base, counted, both(often_saved, at_step(0, lambda: None, counted, told))).wait())
    whole, steps = contents(counted / "out"), int(told.read_text())
    for _ in range(draws):
        folder = fresh(work / "removed")
        step = rng.randint(2, inspect.steps)
        ended = Child(inspect.new, folder, at_step(step, partial(_remove, folder / "made"), folder)).wait()
        right = ended.code == 1 and ended.one_line
        known = contents(folder).items() <= inspect.outputs["new"].items()
        found.expect("output folder of inspect", (right or ended.code == 0) and known, ended)

        folder = fresh(work / "removed")
        step = rng.randint(5, steps)
        before = both(often_saved, at_step(step, partial(_remove, folder / "out"), folder))
        ended = Child(base, folder, before).wait()
        right = (ended.code == 1 and ended.one_line) or ended.code == 0
        again = Child(resumable(base, folder), folder).wait()
        found.expect("output folder of train-compare", right, ended)
        found.expect("comparison after its folder was removed", contents(folder / "out") == whole, again)
    return found


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def two_writers(draws: int, work: Path) -> Cases:
    """Start two processes with the same output: what is there afterwards is of one of them."""
    found = Cases()
    for command in simple_commands(work, [name for name in NAMES if name != "scan"]):  # whose sets are several
        measure(command, work, real=False)
        for _ in range(draws):
            folder = fresh(work / "shared")
            put_old(command, work, folder)
            pair = Child(command.old, folder, words=work / "one"), Child(command.new, folder, words=work / "two")
            codes = [run.wait().code for run in pair]
            kinds = states(folder, command.outputs["old"], command.outputs["new"])
            right = codes == [0, 0] and len(set(kinds.values())) == 1 and not half_files(kinds)
            found.expect(f"two of {command.name}", right and not leftovers(folder), (codes, kinds))
    return found


def two_comparisons(draws: int, rng: random.Random, work: Path) -> Cases:
    """Start two comparisons in the same folder, at once or one upon the other: one of them refuses, or comes after."""
    found = Cases()
    base = comparison(small_source(work))
    whole = finished(Child(base, fresh(work / "whole")).wait())
    known = contents(work / "whole" / "out")
    for draw in range(draws):
        folder = fresh(work / "shared")
        first = Child(base, folder, often_saved, words=work / "one")
        if draw % 2:  # the second one finds a comparison that is on its way, and says --resume
            while first.running() and not (folder / "out" / "config.json").is_file():
                time.sleep(0.002)
            time.sleep(rng.uniform(0, whole.seconds / 4))
        second = Child(resumable(base, folder), folder, often_saved, words=work / "two")
        ends = first.wait(), second.wait()
        refused = [end for end in ends if end.code != 0]
        right = contents(folder / "out") == known and not leftovers(folder)
        right = right and len(refused) <= 1 and all(end.one_line and _REFUSED in end.err for end in refused)
        found.expect("two of train-compare" + (", one refused" if refused else ", one after the other"), right, ends)
    return found


_REFUSED = "or choose another --output"
"""Of a folder that holds a comparison already, and of one that another process is at work in."""


@dataclass
class HubCase:
    """What a hub does, and what is to come of it."""

    name: str
    does: dict[str, Any]
    told: str
    """Part of the error; empty where the file is to be read."""
    options: tuple[str, ...] = ()


HUB_CASES = (
    HubCase("answers slowly", {"pause": 0.2}, ""),
    HubCase("is busy twice", {"failures": 2}, ""),
    HubCase("stays busy", {"failures": 1000}, "503"),
    HubCase("cuts a body off", {"cuts": 1}, ""),
    HubCase("cuts every body off", {"cuts": 1000}, "hf download"),
    HubCase("sends damaged bytes", {"damages": True}, "has not the sha256 it declares"),
    HubCase("announces another length", {"announced_size": 1000}, "cannot download"),
    HubCase("answers nothing", {"silent": True}, "cannot be reached"),
    HubCase("stops in a body", {"stalls": True}, "hf download"),
    HubCase("sends a page instead", {"page": True}, "safetensors"),
    HubCase("answers slowly, by range", {"pause": 0.2}, "", ("--remote",)),
    HubCase("cuts ranges off", {"cuts": 2}, "", ("--remote",)),
    HubCase("cuts every range off", {"cuts": 1000}, "hf download", ("--remote",)),
    HubCase("sends another range", {"wrong_range": True}, "when asked for", ("--remote",)),
    HubCase("stops in a range", {"stalls": True}, "hf download", ("--remote",)),
)


def misbehaving_hub(work: Path, cases: tuple[HubCase, ...] = HUB_CASES) -> Cases:
    """Inspect a file on a hub that misbehaves, then on one that does not: nothing damaged is believed."""
    from safetensors import safe_open

    from tests.hub_server import Hub, serve

    found = Cases()
    repo, name = "owner/name", "model.safetensors"
    source = small_source(work)
    content = source.read_bytes()
    with safe_open(source, "np") as file:
        told = file.metadata()
    config = {"architecture": told["architecture"], "model_args": json.loads(told["model_args"])}
    described = {"config.json": json.dumps(config).encode()}
    for case in cases:
        hub = Hub()
        server = serve(hub)
        hub.put(repo, {**described, name: b"<html>later</html>" * 40 if case.does.get("page") else content})
        hub.stall = threading.Event() if case.does.get("stalls") else None
        for key, value in case.does.items():
            if hasattr(hub, key):
                setattr(hub, key, value)
        caches = fresh(work / "caches")
        before = _pointed(hub.url, caches)
        arguments = ["inspect", f"hf-hub:{repo}", "-o", "made", "--dpi", "50", *case.options]
        ended = Child(arguments, fresh(work / "asked"), before).wait(60)
        right = ended.code == 0 if not case.told else _told(ended, case.told)
        found.expect(f"a hub that {case.name}", right, ended)
        if hub.stall is not None:
            hub.stall.set()
        server.shutdown()
        server.server_close()
        healthy = Hub()
        server = serve(healthy)
        healthy.put(repo, {**described, name: content})
        again = Child(arguments, fresh(work / "asked"), _pointed(healthy.url, caches)).wait(60)
        found.expect("the same hub, mended", again.code == 0 or bool(case.does.get("page")), again)
        server.shutdown()
        server.server_close()
    return found


def _told(ended: Ended, part: str) -> bool:
    return ended.code == 1 and ended.one_line and part in ended.err and ended.seconds < 40


def _pointed(url: str, caches: Path) -> Callable[[], None]:
    """Return what points a child at a hub, with a second of patience where the default is ten."""

    def before() -> None:
        from huggingface_hub import constants

        constants.ENDPOINT = url
        constants.HUGGINGFACE_CO_URL_TEMPLATE = url + "/{repo_id}/resolve/{revision}/{filename}"
        constants.HF_HUB_CACHE = str(caches / "hub")
        constants.HF_HUB_OFFLINE = False
        constants.HF_HUB_ETAG_TIMEOUT = constants.HF_HUB_DOWNLOAD_TIMEOUT = 1
        os.environ["NO_PROXY"] = "127.0.0.1"

    return before
