"""Whether a scan of hundreds of models loses or doubles one: corrupt files, kills of the scan, killed nodes.

    python -m benchmarks.trust.scan                # 232 models, 8 kills, a Ray cluster of which 2 nodes are killed
    python -m benchmarks.trust.scan --kinds decoders --each 26 --kills 3 --without-ray   # needs neither torch nor timm
    python -m benchmarks.trust.scan --kinds decoders --each 375 --kills 12 --without-ray --entry scan_of_3000

Builds small checkpoints with random weights: `--each` of every transformers model type that attnlens reads
(tests/transformers_models.py), of tiny timm architectures, and of decoders in the manner of LLaMA in shards; every
tenth is spoilt in one of four ways. `attnlens scan` is then killed (SIGKILL) `--kills` times as it works, each time
after some more results, and started again until it ends; then the same models are scanned into another folder on a
local Ray cluster of four nodes, and nodes are killed as it works. Both must give each model one result, equal to
`inspect`'s own for a sample, and fail on the models that were spoilt and on no other. Fills the entry "scan" of
trust.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator
from itertools import chain, product
from pathlib import Path
from typing import Any

import attnlens
from attnlens.scans import Scan
from benchmarks.trust.fault_workers import children
from benchmarks.trust.record import record
from benchmarks.trust.scale import CONFIG, write_model

TIMM = {
    "vit_tiny_patch16_224": {"img_size": 32, "embed_dim": 24, "depth": 3, "num_heads": 3},
    "deit_tiny_patch16_224": {"img_size": 32, "embed_dim": 16, "depth": 4, "num_heads": 2},
    "beit_base_patch16_224": {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 3},
    "eva02_tiny_patch14_224": {"img_size": 28, "embed_dim": 24, "depth": 3, "num_heads": 3},
    "cait_xxs24_224": {"img_size": 32, "embed_dim": 16, "depth": 2, "num_heads": 2},
    "swin_tiny_patch4_window7_224": {
        "img_size": 56,
        "embed_dim": 12,
        "depths": [1, 1, 2, 1],
        "num_heads": [1, 2, 2, 4],
    },
    "swinv2_tiny_window8_256": {"img_size": 64, "embed_dim": 12, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 2, 4]},
}
SPOILT = ("truncated", "not a number", "no config", "unknown type")
LLAMA = {
    **CONFIG,
    "hidden_size": 40,
    "intermediate_size": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 3,
}


def build(root: Path, each: int, kinds: str) -> dict[str, str]:
    """Write the models; return for each folder how it was spoilt, "" where it was not."""
    root.mkdir()
    for seed in range(each):
        folders = chain(write_decoders(root, seed), write_others(root, seed) if kinds == "all" else ())
        for number, folder in enumerate(folders):
            if number % 10 == 3:
                spoil(folder, SPOILT[(number // 10 + seed) % len(SPOILT)])
    return {
        str(folder): (folder / "spoilt").read_text() if (folder / "spoilt").exists() else ""
        for folder in root.iterdir()
    }


def write_decoders(root: Path, seed: int) -> Iterator[Path]:
    """Write decoders of four model types and two depths, and yield their folders."""
    for number, (kind, layers) in enumerate(product(("llama", "mistral", "qwen2", "gemma"), (2, 5))):
        folder = root / f"{kind}_{layers}-{seed}"
        config = {**LLAMA, "model_type": kind, "num_hidden_layers": layers}
        write_model(folder, config, 100 * seed + number, layers_a_shard=2)
        yield folder


def write_others(root: Path, seed: int) -> Iterator[Path]:
    """Write one of every other kind, by transformers and timm, and yield its folder."""
    import timm
    import torch
    from safetensors.torch import save_model

    from tests.transformers_models import CASES
    from tests.transformers_models import build as build_case

    for name, case in CASES.items():
        folder = root / f"{name.replace(' ', '_').replace(',', '')}-{seed}"
        build_case(case, seed).save_pretrained(folder)
        yield folder
    for name, sizes in TIMM.items():
        folder = root / f"{name}-{seed}"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"architecture": name, "model_args": sizes}))
        torch.manual_seed(seed)
        save_model(timm.create_model(name, **sizes), str(folder / "model.safetensors"))
        yield folder


def spoil(folder: Path, how: str) -> None:
    """Break a model in one of the ways `SPOILT` names, and note how."""
    weights = next(folder.glob("*.safetensors"))
    if how == "truncated":
        weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    elif how == "not a number":
        content = bytearray(weights.read_bytes())
        start = 8 + int.from_bytes(content[:8], "little")
        content[start:] = b"\xff" * (len(content) - start)  # NaN in every floating type
        weights.write_bytes(content)
    elif how == "no config":
        (folder / "config.json").unlink()
    else:
        (folder / "config.json").write_text(json.dumps({"model_type": "unheard_of"}))
    (folder / "spoilt").write_text(how)


def scan_killed(root: Path, output: Path, kills: int, models: int) -> dict[str, int]:
    """Scan by the command, which or one of whose workers is killed ``kills`` times as results come in.

    Return how often the scan was, and how often a worker: every second time, which the scan is to outlive.
    """
    command = [sys.executable, "-c", "from attnlens.cli import main; main()", "scan", f"{root}/*", "-o", str(output)]
    rng, done, workers = random.Random(0), 0, 0
    for number in range(kills):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        if number % 2:
            goal = models * (2 * number + 1) // (2 * kills + 4)
            while process.poll() is None and len(list(output.glob("models/[!.]*.json"))) < goal:
                time.sleep(0.005)
            with contextlib.suppress(ProcessLookupError, IndexError):
                os.kill(rng.choice(children(process.pid)), signal.SIGKILL)
                workers += 1
        goal = models * (number + 1) // (kills + 2)
        while process.poll() is None and len(list(output.glob("models/[!.]*.json"))) < goal:
            time.sleep(0.005)
        time.sleep(rng.random() * 0.2)
        done += process.poll() is None
        process.kill()
        process.wait()
    subprocess.run(command, check=True, capture_output=True)
    return {"kills_of_the_scan": done, "kills_of_workers": workers}


def scan_on_cluster(root: Path, output: Path, models: int) -> tuple[Scan, int]:
    """Scan on a Ray cluster of four nodes, two of which are killed as it works."""
    import ray
    from ray.cluster_utils import Cluster

    memory = 80_000_000
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": memory})
    nodes = [cluster.add_node(num_cpus=1, object_store_memory=memory) for _ in range(4)]
    cluster.wait_for_nodes()
    killed = []

    def killing(missing: Iterable[Any]) -> Iterator[Any]:
        for place, job in enumerate(missing):
            if place in (models // 4, models // 2):
                cluster.remove_node(nodes[len(killed)], allow_graceful=False)
                killed.append(place)
            yield job

    try:
        return attnlens.scan(f"{root}/*", output, ray=cluster.address, progress=killing), len(killed)
    finally:
        ray.shutdown()
        cluster.shutdown()


def judge(output: Path, spoilt: dict[str, str], sample: int = 10) -> dict[str, int]:
    """Count what is there against what must be."""
    results = [json.loads(path.read_text()) for path in (output / "models").glob("[!.]*.json")]
    found = [result["model"] for result in results]
    failed = {result["model"] for result in results if result["status"] != "ok"}
    planted = {model for model, how in spoilt.items() if how}
    whole = sorted(set(found) - failed)
    different = 0
    for model in random.Random(1).sample(whole, min(sample, len(whole))):
        result = next(result for result in results if result["model"] == model)
        file = next(
            path
            for path in (output / "models").glob("*.csv")
            if json.loads(path.with_suffix(".json").read_text())["model"] == model
        )
        different += file.read_text() != attnlens.inspect(model).stats.to_csv() or result["status"] != "ok"
    return {
        "models": len(spoilt),
        "read": len(found) - len(failed),
        "failed_as_planted": len(failed & planted),
        "failed_otherwise": len(failed - planted),
        "planted_but_read": len(planted - failed),
        "lost": len(set(spoilt) - set(found)),
        "double": len(found) - len(set(found)),
        "half_written": len(list(output.glob("models/.*"))),
        "compared_with_inspect": min(sample, len(whole)),
        "different_from_inspect": different,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--each", type=int, default=4, help="models of every kind")
    parser.add_argument("--kinds", choices=("all", "decoders"), default="all")
    parser.add_argument("--kills", type=int, default=8, help="kills of the scan")
    parser.add_argument("--without-ray", action="store_true")
    parser.add_argument("--entry", default="scan", help="of trust.json")
    parser.add_argument("--figure", type=Path, help="also write the landscape there")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name) / "models"
        spoilt = build(root, arguments.each, arguments.kinds)
        start = time.perf_counter()
        kills = scan_killed(root, Path(name) / "local", arguments.kills, len(spoilt))
        seconds = {"local": round(time.perf_counter() - start, 1)}
        counts: dict[str, Any] = {**kills, "local": judge(Path(name) / "local", spoilt)}
        if not arguments.without_ray:
            start = time.perf_counter()
            found, nodes = scan_on_cluster(root, Path(name) / "ray", len(spoilt))
            seconds["ray"] = round(time.perf_counter() - start, 1)
            counts |= {"nodes_killed": nodes, "jobs_begun_again": found.lost, "ray": judge(Path(name) / "ray", spoilt)}
        if arguments.figure:
            shutil.copy(Path(name) / "local" / "landscape.png", arguments.figure)
    counts["scan_seconds"] = seconds
    options = f"--kinds {arguments.kinds} --each {arguments.each} --kills {arguments.kills}"
    command = f"python -m benchmarks.trust.scan {options}{' --without-ray' if arguments.without_ray else ''}"
    command += "" if arguments.entry == "scan" else f" --entry {arguments.entry}"
    record(arguments.entry, command, time.perf_counter() - begin, counts)
    print(json.dumps(counts, indent=1))


if __name__ == "__main__":
    main()
