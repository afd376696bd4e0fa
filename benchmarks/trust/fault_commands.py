"""The commands that are tried, what they write, and how a kill of one is judged."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from attnlens.training.networks.vit import ARCHITECTURE, ViT
from benchmarks.trust.fault_checks import content_hash, contents, half_files, leftovers, states, told_apart
from benchmarks.trust.fault_runs import Child, Ended, Process, at_step
from benchmarks.trust.scale import CONFIG, write_model

FIGURES = ["--dpi", "40"]
TINY = {
    "hidden_size": 14,
    "intermediate_size": 5,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 7,
    "vocab_size": 3,
}
SHAPE = ViT(image_size=8, patch_size=4, channels=1, classes=10, embed_dim=24, depth=2, num_heads=2, mlp_ratio=2.0)


@dataclass
class Command:
    """A command with two sets of options, so that its outputs are told apart: those there before, and those to come."""

    name: str
    old: list[str]
    new: list[str]
    outputs: dict[str, dict[str, str]] = field(default_factory=dict)
    """Content hash by file, of the old and of the new run."""
    seconds: float = 0.0
    window: float = 0.0
    """From the first temporary file to the end."""
    real_seconds: float = 0.0
    """In a process of its own."""
    steps: int = 0
    manifest: str = ""
    """The file that names the sha256 of the others of its set."""

    @property
    def sets(self) -> list[set[str]]:
        """What is written as one: the files a scan keeps of a model, and all else."""
        names = {*self.outputs["old"], *self.outputs["new"]}
        models = {name.rpartition(".")[0] for name in names if "/models/" in name}
        kept = [{name for name in names if name.startswith(f"{model}.")} for model in sorted(models)]
        return [*kept, names.difference(*kept)]


NAMES = ("inspect", "fit-params", "init", "compare", "compose", "signal", "report", "scan")
"""The commands that write files and train nothing."""


def simple_commands(work: Path, names: Sequence[str] = NAMES) -> list[Command]:
    """Return these commands, which write once, at their end (a scan once more after each model), on small networks."""
    source = small_source(work)
    other = small_source(work, 2)

    def both(name: str, fixed: list[str], old: list[str], new: list[str], manifest: str = "") -> Command:
        return Command(name, [name, *fixed, *old], [name, *fixed, *new], manifest=manifest)

    raw, effective = ["--fold", "raw"], ["--fold", "effective"]
    drawn = [
        item for pair in SHAPE.model_args().items() for item in ("--model-arg", f"{pair[0]}={json.dumps(pair[1])}")
    ]
    tiny = ["--depth", "2", "--tokens", "4", "--sequences", "1", "--arms", "default"]
    known = [
        both("inspect", [str(source), "-o", "made", *FIGURES], raw, effective, "made/stats.json"),
        both("fit-params", [str(source), "-o", "params.json", "--figures", "made", *FIGURES], raw, effective),
        both("init", [ARCHITECTURE, *drawn, "-o", "model.safetensors"], ["--seed", "0"], ["--seed", "1"]),
        both("compare", [str(source), str(other), "--figures", "made", "--table", "a.csv", *FIGURES], raw, effective),
        both("compose", [str(source), *FIGURES], raw, effective, "figures/source/composition.json"),
        both("signal", [*tiny, "-o", "made", *FIGURES], ["--seeds", "1"], ["--seeds", "2"], "made/signal.json"),
        both("report", [str(source), "-o", "page.html", "--table", "page.csv"], raw, effective),
        both("scan", [*_models(work, names), "-o", "out", "--workers", "1", *FIGURES], raw, effective, "out/scan.json"),
    ]
    return [command for command in known if command.name in names]


def _models(work: Path, names: Sequence[str], models: int = 2) -> list[str]:
    """Write small decoders for a scan, and return the pattern that names them."""
    if "scan" in names:
        for number in range(models):
            folder = work / "models" / f"model{number}"
            if not folder.exists():
                write_model(folder, {**CONFIG, **TINY, "num_hidden_layers": 2}, seed=number)
    return [f"{work}/models/*"]


def measure(command: Command, work: Path, *, real: bool) -> None:
    """Run both versions whole: note what they write, how long they take, when writing begins and its steps."""
    for version, arguments in (("old", command.old), ("new", command.new)):
        folder = fresh(work / f"{command.name}-{version}")
        first = None
        run = Child(arguments, folder)
        while run.running():
            if first is None and leftovers(folder):
                first = time.monotonic()
            time.sleep(0.001)
        finished(run.wait())
        command.seconds = time.monotonic() - run.began
        command.window = time.monotonic() - (first or time.monotonic())
        command.outputs[version] = contents(folder)
    counted = fresh(work / f"{command.name}-counted")
    command.steps = count_steps(command.new, counted)
    if real:
        command.real_seconds = finished(Process(command.new, counted).wait()).seconds
    same = {name for name, value in command.outputs["new"].items() if command.outputs["old"].get(name) == value}
    assert not same, f"{same} are the same in both versions: nothing could be told from them"


def count_steps(arguments: list[str], folder: Path) -> int:
    """Return how many steps of writing a command takes in a folder."""
    told = folder.parent / f"{folder.name}.steps"
    finished(Child(arguments, folder, at_step(0, lambda: None, folder, told)).wait())
    return int(told.read_text())


def finished(ended: Ended) -> Ended:
    """Return how a run ended that had to end well."""
    if ended.code != 0:
        raise RuntimeError(f"exit code {ended.code}: {ended.err}")
    return ended


def fresh(folder: Path) -> Path:
    """Return an empty folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def put_old(command: Command, work: Path, folder: Path) -> None:
    """Put the old outputs into a folder, leaving there what killed processes left."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in command.outputs["new"]:
        (folder / name).unlink(missing_ok=True)
    shutil.copytree(work / f"{command.name}-old", folder, dirs_exist_ok=True)


def judge(command: Command, folder: Path, tally: Counter[str], started: float) -> list[str]:
    """Count when a kill came, by what is there since the run ``started``, and return what is wrong there."""
    found = states(folder, command.outputs["old"], command.outputs["new"])
    wrong = half_files(found)
    kinds = set(found.values())
    if kinds == {"new"}:
        tally["after writing"] += 1
    elif kinds == {"old"} and not leftovers(folder, newer_than=started):
        tally["before writing"] += 1
    else:
        tally["while writing"] += 1
    for files in command.sets:
        if {"old", "new"} <= {found[name] for name in files}:
            tally["sets of files from two runs"] += 1
            if command.manifest in files:
                manifest = folder / command.manifest
                told = told_apart(manifest)
                owner, beside = found[command.manifest], Path(command.manifest).parent
                right = {name: found[str(beside / name)] == owner for name in told}
                tally["of those told apart by the hashes they name"] += told == right
                if told != right:
                    wrong.append(f"{manifest} tells {json.dumps(told)}, right is {json.dumps(right)}")
    return wrong


def unchanged(folder: Path, before: dict[str, str]) -> bool:
    """Whether a folder's files hold what they held, and no temporary file is left."""
    return contents(folder) == before and not leftovers(folder)


def small_source(folder: Path, seed: int = 1) -> Path:
    """Write a "pre-trained" ViT of two layers, for comparisons of some seconds."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    state = {
        name: (value + 0.1 * torch.randn(value.shape, generator=generator)).contiguous()
        for name, value in SHAPE.build(5).state_dict().items()
    }
    path = folder / ("source.safetensors" if seed == 1 else f"source{seed}.safetensors")
    save_file(state, path, SHAPE.exported())
    return path


def comparison(source: Path) -> list[str]:
    """Return the command line of a comparison of four runs."""
    sizes = ["--train-images", "120", "--test-images", "60", "--batch-size", "40", "--patch-size", "4"]
    runs = ["--arms", "default,mimetic", "--seeds", "2", "--epochs", "2", "--workers", "1", "--device", "cpu"]
    return ["train-compare", "--model", str(source), *sizes, *runs, "--augment", "flip-shift", "-o", "out"]


def often_saved() -> None:
    """Let a comparison write a checkpoint after every epoch; the command line writes one a minute."""
    from attnlens.training import comparison as module

    assert module.train_compare.__kwdefaults__ is not None
    module.train_compare.__kwdefaults__["checkpoint_seconds"] = 0.0


def check_comparison(folder: Path, whole: dict[str, str], tally: Counter[str]) -> list[str]:
    """Return what is wrong in the folder of a comparison that was stopped anywhere.

    Result files are written anew after every evaluation: until all runs are in them they are whole, but not those of a
    comparison that was never killed.
    """
    import torch

    wrong = []
    found = contents_or_errors(folder)
    under_way = found.get("summary.json") != whole["summary.json"]
    if "summary.json" in found:
        says = json.loads((folder / "summary.json").read_text())["complete"]
        ended = all(found.get(name) == value for name, value in whole.items())
        tally["summaries that tell whether all has ended"] += says is ended
        wrong += [] if says is ended else [f"{folder}: summary.json says complete: {says}"]
    for name, value in found.items():
        renewed = under_way and "/" not in name and name not in ("config.json", "params.json")
        if value != whole.get(name) and not (renewed and re.fullmatch("[0-9a-f]{64}", value)):
            wrong.append(f"{folder / name}: {value} is not what a comparison that was never killed writes")
    for path in sorted(folder.glob("checkpoints/*.pt")):
        try:
            torch.load(path, weights_only=True)
            tally["checkpoints that open whole"] += 1
        except Exception as error:  # noqa: BLE001  # torch raises half a dozen kinds for a damaged file
            wrong.append(f"{path} does not open: {error}")
    return wrong


def contents_or_errors(folder: Path) -> dict[str, str]:
    """Return `contents`, with what is wrong in the place of the hash of a file that does not open whole."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.name.startswith(".") and path.suffix != ".pt":
            try:
                found[str(path.relative_to(folder))] = content_hash(path)
            except Exception as error:  # noqa: BLE001  # it is the answer
                found[str(path.relative_to(folder))] = str(error)
    return found
