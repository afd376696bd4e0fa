"""What is measured: commands with their goals and why one is missed, and other ways to come by the same."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

BASE, GIANT = "vit_base_patch16_224", "vit_giant_patch14_224"
BASE_MIB = 330.2
"""Size of ViT-B's parameters in float32."""

Make = Callable[[Path, Path], tuple[str, ...]]
"""A process, of the weights' path and a folder to write to."""
Quantity = Literal["wall", "busy", "cpu", "peak_mib", "private_mib"]
UNITS: Mapping[Quantity, str] = {
    "wall": "s",
    "busy": "s beside a busy process",
    "cpu": "s CPU",
    "peak_mib": "MiB",
    "private_mib": "MiB private above imports",
}


@dataclass(frozen=True)
class Rival:
    """Another way: a process, and what it leaves out."""

    make: Make
    says: str
    needs: str = ""
    """Module of the dependency group ``bench`` that has to be installed."""


@dataclass(frozen=True)
class Row:
    """One thing that is measured: a command of `attnlens`, or a fresh process that times a part of itself."""

    title: str
    make: Make
    weights: str = BASE
    goals: Mapping[Quantity, float] = field(default_factory=dict)
    """Most of a quantity: seconds on two idle cores (``wall``), beside one busy process, of a processor; MiB"""
    why: str = ""
    """What a goal is missed for: what the time or memory goes to. The table says it where one is missed"""
    cold: bool = False
    """The user's cache is empty and the operating system has not the weights' pages: the first run ever"""
    timed_inside: bool = False
    """The process prints wall and CPU seconds of the part that counts"""
    above: str = ""
    """Row whose private memory is taken off before ``private_mib`` is compared"""
    once: bool = False
    """Whether one run is enough, whatever ``--repeats`` says"""
    rivals: Mapping[str, Rival] = field(default_factory=dict)


def plain(*words: str) -> Make:
    """Return a command of attnlens; ``OUT`` among the words is in the folder to write to, ``WEIGHTS`` the weights."""
    start = (sys.executable, "-c", "from attnlens.cli import main; main()")
    return lambda weights, out: (*start, *(w.replace("OUT", str(out)).replace("WEIGHTS", str(weights)) for w in words))


def command(name: str, *words: str, model: str = BASE) -> Make:
    """Return a command of a model with a checkpoint."""
    return plain(name, model, "--checkpoint", "WEIGHTS", *words)


def code(text: str, python: str = sys.executable) -> Make:
    """Return a process that runs code, given the weights' path."""
    return lambda weights, _: (python, "-c", text, str(weights))


def inside(*words: str) -> Make:
    """Return work on head products that times itself."""
    return lambda weights, _: (sys.executable, "-m", "benchmarks.speed.inside", str(weights), *words)


def heads(tool: str, says: str, needs: str = "", tasks: str = "spectra,eigenvalues", stacks: int = 24) -> Rival:
    """Return a tool of `benchmarks.suite` on so many of the 24 stacks of products."""
    return Rival(inside(tool, tasks, str(stacks)), says, needs)


INSPECT_DENSE = """
import sys, timm, torch
from safetensors.torch import load_file
model = timm.create_model("vit_base_patch16_224")
model.load_state_dict(load_file(sys.argv[1]))
rows = []
for block in model.blocks:
    q, k, v = block.attn.qkv.weight.detach().double().reshape(3, 12, 64, 768)
    o = block.attn.proj.weight.detach().double().reshape(768, 12, 64).permute(1, 2, 0)
    for M in (q.mT @ k, v.mT @ o):
        diag = M.diagonal(dim1=-2, dim2=-1)
        rows += [diag.mean(-1), (M.square().sum((-2, -1)) - diag.square().sum(-1)).sqrt()]
"""
INIT_PLAIN = """
import tempfile, timm
from safetensors.torch import save_model
with tempfile.TemporaryDirectory() as folder:
    save_model(timm.create_model("vit_base_patch16_224"), folder + "/model.safetensors")
"""
LENS, WATCHER = "transformer_lens", "weightwatcher"
INSPECT = ("inspect", "-o", "OUT")
ROWS = {
    "inspect": Row(
        "`inspect` ViT-B, warm",
        command(*INSPECT),
        goals={"wall": 2.0, "busy": 4.0},
        why="imports (numpy, matplotlib) and drawing, which hold one core, beside eigenvalues and singular values",
        rivals={
            "timm and torch, dense": Rival(
                code(INSPECT_DENSE), "two statistics of 288 products, no spectra, sums, tables or figures"
            )
        },
    ),
    "inspect_cold": Row(
        "`inspect` ViT-B, first run ever",
        command(*INSPECT),
        goals={"wall": 2.2},
        why="as above, and reading the file from the disk",
        cold=True,
    ),
    "inspect_real": Row(
        "`inspect` DINOv2 ViT-S, warm",
        command(*INSPECT, model="vit_small_patch14_dinov2.lvd142m"),
        weights="vit_small_patch14_dinov2",
    ),
    "products": Row(
        "288 head products, every statistic and spectrum, weights read",
        inside("attnlens"),
        goals={"cpu": 0.4},
        why="eigenvalues (LAPACK's geev), half of it, then Gram matrices and singular values",
        timed_inside=True,
        rivals={
            "numpy, dense": Rival(inside("dense"), "the same statistics from the d x d matrices; 6 products, times 48"),
            "attnlens, norm, spectra and eigenvalues alone": heads(
                "attnlens", "what the next two have, one thread of layers"
            ),
            "TransformerLens FactoredMatrix, float64": heads(
                "FactoredMatrix, float64", "norm, mean diagonal, singular values with vectors, eigenvalues", LENS
            ),
            "TransformerLens FactoredMatrix, float32": heads("FactoredMatrix, float32", "the same in float32", LENS),
            "WeightWatcher get_ESD": heads(
                *("WeightWatcher get_ESD", "singular values alone; 12 products, times 24", WATCHER, "spectra", 1)
            ),
        },
    ),
    "giant": Row(
        "`inspect` giant (1.0 B parameters)",
        command(*INSPECT, model=GIANT),
        weights=GIANT,
        goals={"cpu": 12.0, "private_mib": 300.0},
        why="each layer's sum of heads, a d x d product and its largest singular value, which grow with d^3 and d^2; "
        "eigenvalues of heads; the hash of 4 GB. Memory: two layers in float64, a thread each, with their folds",
        above="imports_inspect",
        once=True,
    ),
    "fit_params": Row(
        "`fit-params` ViT-B",
        command("fit-params", "-o", "OUT/params.json", "--figures", "OUT"),
        goals={"wall": 3.0, "busy": 6.0},
        why="balancing and Gram matrices of 900 products under three folds (the balanced one came after the goal), "
        "sampled entries, imports of scipy and pydantic",
    ),
    "report": Row(
        "`report` ViT-B",
        command("report", "-o", "OUT/report.html"),
        goals={"wall": 4.0, "busy": 8.0},
        why="what `inspect` and `fit-params` measure, one after the other",
    ),
    "compose": Row(
        "`compose` ViT-B",
        command("compose", "-o", "OUT"),
        goals={"wall": 1.5, "peak_mib": 150.0},
        why="imports, drawing and the table of 28,512 rows. Memory: the factors of all layers' writers and readers in "
        "float64, 208 MiB, which are read once and compared block by block",
    ),
    "imports_inspect": Row("imports of `inspect`", code("import attnlens.inspection, attnlens.figures")),
    "imports": Row("imports of torch and timm", code("import timm, torch")),
    "init": Row(
        "`init` mimetic ViT-B",
        plain("init", BASE, "-o", "OUT/model.safetensors"),
        goals={"wall": 7.0, "private_mib": 1.2 * BASE_MIB},
        why="imports of torch and timm, timm's own draws, one exact truncation a head",
        above="imports",
        rivals={"timm alone": Rival(code(INIT_PLAIN), "builds and writes, draws nothing of attention anew")},
    ),
    "signal": Row(
        "`signal`, defaults",
        plain("signal", "-o", "OUT"),
        goals={"wall": 4.0},
        why="imports of torch and timm, forward passes of seven arms",
    ),
    "help": Row("`--help`", plain("--help"), goals={"wall": 0.1}, why="imports of Python and typer"),
    "command_help": Row(
        "`inspect --help`", plain("inspect", "--help"), goals={"wall": 0.15}, why="imports of Python and typer"
    ),
}
"""By the name that ``--rows`` takes."""
