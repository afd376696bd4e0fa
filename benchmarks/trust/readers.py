"""The readers that are tried, each driven as the commands drive it, and the memory each may take."""

from __future__ import annotations

import json
import sys
from functools import cache, wraps
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from attnlens import inspect
from attnlens.checkpoints import open as opening
from attnlens.checkpoints import open_checkpoint
from attnlens.cli.console import note, write_stdout
from attnlens.cli.filter_tables import filter_table
from attnlens.cli.fit_params import fit_tables
from attnlens.cli.inspect import caveats
from attnlens.cli.scan import model_table
from attnlens.cli.tables import layer_table
from attnlens.errors import AttnlensError
from attnlens.fit.params import InitParams
from attnlens.models.described import describe_architecture
from attnlens.models.open import EMBEDDED
from attnlens.reports.training import read_training
from attnlens.scans.plan import Job
from attnlens.scans.run import Scan
from attnlens.scans.store import Store as ScanStore
from attnlens.scans.tables import curves, spread
from attnlens.scans.worker import Settings
from attnlens.training.config import Config, Recipe, Run
from attnlens.training.data import reading as decoding
from attnlens.training.data import sources as datasets
from attnlens.training.data.sources import load_dataset
from attnlens.training.data.text import PREFIX, load_text
from attnlens.training.engine import Stack
from attnlens.training.networks.vit import ViT
from attnlens.training.record_schema import check_gathered, restorable
from attnlens.training.report import render_report
from attnlens.training.results import results_lines, summarise
from attnlens.training.store import Store
from benchmarks.trust.guard import IMAGES, WEIGHTS, Bound, Reader, passed

SCANNED = Job("embedded", f"local-dir:{EMBEDDED}")
"""The model of the scan whose folder is read back."""
CONFIG = Config(
    dataset="none",
    data_sha256="",
    train_items=30,
    test_items=7,
    mean=[0.3],
    std=[0.4],
    source={},
    params_sha256="",
    network=ViT(image_size=8, patch_size=4, channels=1, classes=10, embed_dim=8, depth=2, num_heads=2, mlp_ratio=2.0),
    recipe=Recipe(epochs=2, batch_size=6, lr=1e-3),
    arms=["default", "mimetic"],
    contrasts=[("mimetic", "default")],
    seeds=2,
    data_seed=0,
    init_seed=0,
    target=0.5,
    eval_every=1,
    lr_grid=[],
    tune_seeds=1,
    device="cpu",
    precision="float32",
    compiled=False,
    stack=1,
)
"""The comparison a results folder claims to hold."""


def _marked(home: Any, name: str, *, before: bool = False) -> None:
    """Tell that the parser is behind the reader once a function has returned, or when it is called."""
    inner = getattr(home, name)

    @wraps(inner)
    def marked(*arguments: Any, **options: Any) -> Any:
        if before:
            passed()
        found = inner(*arguments, **options)
        passed()
        return found

    setattr(home, name, marked)


_marked(opening, "as_read", before=True)  # is given a file whose header, pickle or directory was taken
_marked(decoding, "pixels_of")
_marked(datasets, "read_decoded")


def read_weights(path: Path, output: Path) -> None:
    """Read every tensor of a weight file, then inspect it: by what it names, and by its tensors' names."""
    checkpoint = open_checkpoint(path)
    for name in checkpoint:
        assert isinstance(checkpoint.shape(name), tuple)
        value = checkpoint[name]
        if not isinstance(value, np.ndarray):
            value.double().numpy() if not value.is_complex() else value.numpy()
        elif value.dtype.kind in "biufV":
            value.astype(np.float64)
    checkpoint.provenance()
    if "architecture" in checkpoint.metadata:
        read_model(path, output)
    _shown(inspect(path, num_heads=2))


def read_model(path: Path, _output: Path) -> None:
    """Inspect a model folder or file, and print what `attnlens inspect` prints."""
    _shown(inspect(path))


def _shown(inspection) -> None:
    for message in caveats(inspection):
        note(message)
    fold = "effective" if "effective" in inspection.folds else inspection.folds[0]
    console = Console(file=sys.stdout, width=200)
    if inspection.specs:
        console.print(layer_table(inspection, fold))
    if inspection.filters.specs:
        console.print(filter_table(inspection.filters, inspection.model))
    json.dumps(inspection.to_json(), allow_nan=False)
    for table in (inspection.stats, inspection.filters.stats):
        table.to_csv().encode()


def read_params(path: Path, _output: Path) -> None:
    """Read a parameter file, ask it for the shipped network's requests, print its tables, write it again."""
    params = InitParams.load(path)
    passed()
    params.requests(_architecture())
    for form in ("full", "parametric"):
        params.filter_covariance(0.3, (5, 5), form)
    console = Console(file=sys.stdout, width=200)
    for table in islice(fit_tables(params), 5):
        console.print(table)
    params.to_json()


@cache
def _architecture():
    return describe_architecture("vit_tiny_patch16_224")


def read_results(folder: Path, _output: Path) -> None:
    """Read a results folder as ``report --train`` and ``train-compare --resume`` do."""
    refused: AttnlensError | None = None
    for read in (_report, _resume):
        try:
            read(folder)
        except AttnlensError as error:
            str(error)
            refused = error
    if refused is not None:
        raise refused


def read_scan(folder: Path, _output: Path) -> None:
    """Read the folder of a scan as another scan does, and show what is believed."""
    result = ScanStore(folder, Settings()).load(SCANNED)
    if result is None:
        raise AttnlensError("the result is not believed: it would be measured again")
    passed()
    found = Scan({SCANNED.name: result}, (), 0, 0)
    Console(file=sys.stdout, width=200).print(model_table(found, "effective"))
    for circuit in ("qk", "ov"):
        spread(curves(found.results, circuit, "effective"))
    json.dumps([found.rows(), result], allow_nan=False).encode()


def _report(folder: Path) -> None:
    training = read_training(folder)
    passed()
    json.dumps([point.model_dump() for point in training.points], allow_nan=False).encode()


def _resume(folder: Path) -> None:
    store = Store.open(folder, CONFIG, resume=True)
    records = store.load_runs()
    passed()
    summary = summarise(CONFIG, records)
    write_stdout(render_report(summary))
    results_lines(CONFIG, records).encode()
    json.dumps(summary.to_json(), allow_nan=False)
    summary.to_csv().encode()
    run = Run("default", 1, 1e-3)
    state = store.load_checkpoint(run.name)
    if state is not None:
        stack = loaded_stack()
        like = stack.snapshot()
        restorable(state, unit=[run.name], seeds=[1], config=CONFIG, steps=CONFIG.steps, like=like)
        check_gathered(state["stack"], stack.optimizer, "the checkpoint")
        stack.restore(state["stack"])


def loaded_stack() -> Stack:
    """Return a stack of one network at its start."""
    import torch

    stack = Stack(CONFIG, 1, torch.device("cpu"))
    stack.load([CONFIG.network.build(0).state_dict()], [1e-3], 10)
    return stack


def read_images(path: Path, output: Path) -> None:
    """Decode a folder or tar of images."""
    load_dataset(str(path), cache=output)


def read_text(path: Path, _output: Path) -> None:
    """Read a folder of text files."""
    text = load_text(f"{PREFIX}{path}")
    passed()
    text.cut(4, 2, None).sha256()


def read_cache(path: Path, output: Path) -> None:
    """Read a decoded data set from the cache; a damaged one is made again, of images that are none here."""
    key = "key"
    hashed = datasets.hashlib.sha256(f"{datasets._FORMAT} {key}".encode()).hexdigest()  # noqa: SLF001
    (output / f"{hashed[:24]}.npz").write_bytes(path.read_bytes())
    datasets._cached(output, "cached", key, lambda: iter(()), None, lambda _: None)  # noqa: SLF001


READERS: dict[str, tuple[Reader, Bound]] = {
    "safetensors": (read_weights, WEIGHTS),
    "pth": (read_weights, WEIGHTS),
    "legacy pickle": (read_weights, WEIGHTS),
    "npz": (read_weights, WEIGHTS),
    "packed": (read_weights, WEIGHTS),
    "timm folder": (read_model, WEIGHTS),
    "transformers folder": (read_model, WEIGHTS),
    "shard index": (read_model, WEIGHTS),
    "params.json": (read_params, WEIGHTS),
    "results folder": (read_results, WEIGHTS),
    "scan folder": (read_scan, WEIGHTS),
    "image folder": (read_images, IMAGES),
    "image tar": (read_images, IMAGES),
    "decoded cache": (read_cache, IMAGES),
    "text folder": (read_text, WEIGHTS),
}
