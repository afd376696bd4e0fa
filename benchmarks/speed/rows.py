"""What is measured: commands with their goals, and other ways to come by the same."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

BASE, GIANT = "vit_base_patch16_224", "vit_giant_patch14_224"
ATTNLENS = (sys.executable, "-c", "from attnlens.cli import main; main()")

READ = """
import sys, time
from attnlens.models.open import open_model
opened = open_model("vit_base_patch16_224", sys.argv[1])
"""
PRODUCTS = (
    READ
    + """
from attnlens.circuits import ov_circuit, qk_circuit
from attnlens.statistics.diagonal import fit_diagonal
from attnlens.threads import over_threads
layers = [opened.heads(layer) for layer, _ in opened.architecture.indexed()]
products = [make(weights) for weights in layers for make in (qk_circuit, ov_circuit)]
def measure(product):
    return fit_diagonal(product, product.singular_values())
wall, cpu = time.perf_counter(), time.process_time()
fits = over_threads(measure, products)
print(time.perf_counter() - wall, time.process_time() - cpu, sum(len(fit.alpha) for fit in fits))
"""
)
PRODUCTS_DENSE = (
    READ
    + """
import numpy as np
weights = opened.heads(0)
count = 0
wall, cpu = time.perf_counter(), time.process_time()
for M in [q @ k.T for q, k in zip(weights.W_Q, weights.W_K)] + [v @ o for v, o in zip(weights.W_V, weights.W_O)]:
    d = len(M); diag = np.diag(M); off = M[~np.eye(d, dtype=bool)]
    s = np.linalg.svd(M, compute_uv=False); e = np.linalg.eigvals(M)
    row = [np.sqrt(d * (off**2).mean()), diag.mean(), diag.std(ddof=1) / d**0.5, diag.mean() / off.std(), s[0]]
    row += [diag.sum() / np.linalg.norm(M) / d**0.5, (s**2).sum() / s[0]**2, e.real.sum() / np.abs(e).sum()]
    row += [np.linalg.norm(M + M.T), (diag * diag.mean() > 0).mean()]
    count += 1
print((time.perf_counter() - wall) * 288 / count, (time.process_time() - cpu) * 288 / count, count)
"""
)
HEADS = (
    READ
    + """
import numpy as np
layers = [opened.heads(layer) for layer, _ in opened.architecture.indexed()]
pairs = [p for w in layers for p in ((w.W_Q, w.W_K), (w.W_V, np.swapaxes(w.W_O, 1, 2)))]
pairs = [tuple(np.ascontiguousarray(side, np.float32) for side in pair) for pair in pairs][:{layers}]
from benchmarks.suite.methods import TOOLS
tasks = [TOOLS[{tool!r}].tasks[name] for name in {tasks}]
for task in tasks:
    task(*(side[:1] for side in pairs[0]))
wall, cpu = time.perf_counter(), time.process_time()
for pair in pairs:
    for task in tasks:
        task(*pair)
count = sum(len(pair[0]) for pair in pairs)
print((time.perf_counter() - wall) * 288 / count, (time.process_time() - cpu) * 288 / count, count)
"""
)
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


def heads(tool: str, tasks: tuple[str, ...], layers: int = 24) -> str:
    """Return code in which a tool of `benchmarks.suite` does its tasks on so many of the 24 stacks of products."""
    return HEADS.format(tool=tool, tasks=tasks, layers=layers)


@dataclass(frozen=True)
class Rival:
    """Another way: code for a fresh process that is given the weights' path, and what it leaves out."""

    code: str
    says: str
    needs: str = ""
    """Module of the dependency group ``bench`` that has to be installed."""


@dataclass(frozen=True)
class Row:
    """One thing that is measured: a command of `attnlens`, or code in a fresh process that times a part of itself."""

    title: str
    command: Callable[[Path, Path], tuple[str, ...]]
    """Of the weights' path and a folder to write to"""
    weights: str = BASE
    wall: float | None = None
    """Goal, seconds on two idle cores"""
    busy: float | None = None
    """Goal beside one busy process"""
    cpu: float | None = None
    """Goal, seconds of processor time"""
    peak_mib: float | None = None
    private_mib: float | None = None
    cold: bool = False
    """The user's cache is empty and the operating system has not the weights' pages: the first run ever"""
    timed_inside: bool = False
    """The process prints wall and CPU seconds of the part that counts"""
    above: str = ""
    """Row whose private memory is taken off before ``private_mib`` is compared"""
    spent: str = ""
    """What the time goes to, which the table says where a goal is missed"""
    once: bool = False
    """Whether one run is enough, whatever ``--repeats`` says"""
    rivals: Mapping[str, Rival] = field(default_factory=dict)


def command(*words: str, model: str = BASE) -> Callable[[Path, Path], tuple[str, ...]]:
    """Return a command of a model with a checkpoint; ``OUT`` among the words is in the folder to write to."""
    return lambda weights, out: (
        *ATTNLENS,
        *(word.replace("OUT", str(out)) for word in (words[0], model, "--checkpoint", str(weights), *words[1:])),
    )


def plain(*words: str) -> Callable[[Path, Path], tuple[str, ...]]:
    """Return a command that reads no checkpoint."""
    return lambda _, out: (*ATTNLENS, *(word.replace("OUT", str(out)) for word in words))


def code(text: str) -> Callable[[Path, Path], tuple[str, ...]]:
    """Return a process that runs code, given the weights' path."""
    return lambda weights, _: (sys.executable, "-c", text, str(weights))


LENS, WATCHER = "transformer_lens", "weightwatcher"
ROWS = {
    "inspect": Row(
        "`inspect` ViT-B, warm",
        command("inspect", "-o", "OUT"),
        wall=2.0,
        busy=4.0,
        spent="eigenvalues and singular values, drawing and encoding four figures on one core, imports",
        rivals={
            "timm and torch, dense": Rival(
                INSPECT_DENSE, "two statistics of 288 products, no spectra, sums, tables or figures"
            )
        },
    ),
    "inspect_cold": Row(
        "`inspect` ViT-B, first run ever",
        command("inspect", "-o", "OUT"),
        wall=2.2,
        cold=True,
        spent="as above, and the reading of the file",
    ),
    "inspect_real": Row(
        "`inspect` DINOv2 ViT-S, warm",
        command("inspect", "-o", "OUT", model="vit_small_patch14_dinov2.lvd142m"),
        weights="vit_small_patch14_dinov2",
    ),
    "products": Row(
        "288 head products, every statistic and spectrum, weights read",
        code(PRODUCTS),
        cpu=0.4,
        spent="eigenvalues (LAPACK's geev), half of it, then Gram matrices and singular values",
        timed_inside=True,
        rivals={
            "numpy, dense": Rival(PRODUCTS_DENSE, "the same statistics from the d x d matrices; 24 products, times 12"),
            "attnlens, norm, spectra and eigenvalues alone": Rival(
                heads("attnlens", ("spectra", "eigenvalues")), "what the next two have, one thread of layers"
            ),
            "TransformerLens FactoredMatrix, float64": Rival(
                heads("FactoredMatrix, float64", ("spectra", "eigenvalues")),
                "norm, mean diagonal, singular values with vectors, eigenvalues",
                LENS,
            ),
            "TransformerLens FactoredMatrix, float32": Rival(
                heads("FactoredMatrix, float32", ("spectra", "eigenvalues")), "the same in float32", LENS
            ),
            "WeightWatcher get_ESD": Rival(
                heads("WeightWatcher get_ESD", ("spectra",), 1), "singular values alone; 12 products, times 24", WATCHER
            ),
        },
    ),
    "giant": Row(
        "`inspect` giant (1.0 B parameters)",
        command("inspect", "-o", "OUT", model=GIANT),
        weights=GIANT,
        cpu=12.0,
        private_mib=300.0,
        above="imports_inspect",
        once=True,
        spent="the sums' d x d products and scaled copies, which grow with d^3, and the hash of 4 GB",
    ),
    "fit_params": Row(
        "`fit-params` ViT-B",
        command("fit-params", "-o", "OUT/params.json", "--figures", "OUT"),
        wall=3.0,
        busy=6.0,
        spent="balancing and the Gram matrices of 600 products, imports of scipy, drawing",
    ),
    "report": Row(
        "`report` ViT-B",
        command("report", "-o", "OUT/report.html"),
        wall=4.0,
        busy=8.0,
        spent="what `inspect` and `fit-params` measure",
    ),
    "compose": Row(
        "`compose` ViT-B",
        command("compose", "-o", "OUT"),
        wall=1.5,
        peak_mib=150.0,
        spent="imports and the drawing of three figures, the table of 28,512 rows",
    ),
    "imports_inspect": Row(
        "imports of `inspect`", lambda *_: (sys.executable, "-c", "import attnlens.inspection, attnlens.figures")
    ),
    "imports": Row("imports of torch and timm", lambda *_: (sys.executable, "-c", "import timm, torch")),
    "init": Row(
        "`init` mimetic ViT-B",
        plain("init", BASE, "-o", "OUT/model.safetensors"),
        wall=7.0,
        private_mib=1.2 * 330.2,
        above="imports",
        spent="imports of torch and timm, timm's own draws, one exact truncation a head",
        rivals={"timm alone": Rival(INIT_PLAIN, "builds and writes, draws nothing of attention anew")},
    ),
    "signal": Row(
        "`signal`, defaults",
        plain("signal", "-o", "OUT"),
        wall=4.0,
        spent="imports of torch and timm, forward passes of seven arms",
    ),
    "help": Row("`--help`", plain("--help"), wall=0.1, spent="imports of Python and typer"),
    "command_help": Row("`inspect --help`", plain("inspect", "--help"), wall=0.15, spent="imports of Python and typer"),
}
"""By the name that ``--rows`` takes."""
