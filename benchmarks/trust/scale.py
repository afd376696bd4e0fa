"""A checkpoint of 7 B parameters in bounded memory: `inspect` on random weights in the shape of LLaMA-7B.

    python -m benchmarks.trust.scale              # 4, 8, 16 and 32 layers, one after the other; 5 GB of temporary disk
    python -m benchmarks.trust.scale --layers 4,8

The folder is what transformers writes: config.json, sharded bfloat16 safetensors and their index, with every tensor of
the model. Attention weights and norms are drawn; embeddings and MLPs, which attention does not need, are holes in the
files, so that 13.5 GB of checkpoint take 4.3 GB of disk. Each depth is one whole `attnlens inspect`, figures included,
in a process of its own. Peak memory is that of the process's private memory (RssAnon), read every 20 ms, above what it
holds once everything is imported. Fills the entry "scale" of trust.json, after each depth anew.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.trust.record import RESULTS, record

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "num_hidden_layers": 32,
    "vocab_size": 32000,
    "torch_dtype": "bfloat16",
}
LIMIT_MB = 1500
LAYERS_A_SHARD = 8

WATCHED = """
import sys, threading, time
import attnlens.cli.app, attnlens.cli.inspect, attnlens.inspection, attnlens.figures, attnlens.models.transformers
import rich.console, rich.measure, rich.table
import scipy.sparse.linalg, ml_dtypes, matplotlib.backends.backend_agg
def private():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) / 1024
base, peak, stop = private(), 0.0, threading.Event()
def watch():
    global peak
    while not stop.wait(0.02):
        peak = max(peak, private())
threading.Thread(target=watch, daemon=True).start()
start = time.perf_counter()
from attnlens.cli import main
try:
    main()
finally:
    seconds = time.perf_counter() - start
    stop.set()
    with open(sys.argv[sys.argv.index("--output") + 1] + "/measured", "w") as file:
        print(seconds, base, peak, time.process_time(), file=file)
"""


def layer_tensors(config: dict, layer: int) -> dict[str, tuple[list[int], bool]]:
    """Name the tensors of one layer with their shapes, and whether attention needs them."""
    d, inner = config["hidden_size"], config["intermediate_size"]
    own, shared = (config[name] * config["head_dim"] for name in ("num_attention_heads", "num_key_value_heads"))
    front = f"model.layers.{layer}."
    return {
        front + "input_layernorm.weight": ([d], True),
        front + "mlp.down_proj.weight": ([d, inner], False),
        front + "mlp.gate_proj.weight": ([inner, d], False),
        front + "mlp.up_proj.weight": ([inner, d], False),
        front + "post_attention_layernorm.weight": ([d], True),
        front + "self_attn.k_proj.weight": ([shared, d], True),
        front + "self_attn.o_proj.weight": ([d, own], True),
        front + "self_attn.q_proj.weight": ([own, d], True),
        front + "self_attn.v_proj.weight": ([shared, d], True),
    }


def write_model(folder: Path, config: dict, seed: int = 0, layers_a_shard: int = LAYERS_A_SHARD) -> dict[str, int]:
    """Write a random transformers folder; return its parameters, those of attention, and the bytes of its files."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    d, vocabulary = config["hidden_size"], config["vocab_size"]
    shards: list[dict[str, tuple[list[int], bool]]] = []
    for layer in range(config["num_hidden_layers"]):
        if layer % layers_a_shard == 0:
            shards.append({})
        shards[-1] |= layer_tensors(config, layer)
    shards[0] = {"model.embed_tokens.weight": ([vocabulary, d], False), **shards[0]}
    shards[-1] |= {"model.norm.weight": ([d], True), "lm_head.weight": ([vocabulary, d], False)}
    places, rng = {}, np.random.default_rng(seed)
    for number, tensors in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_shard(folder / name, tensors, rng)
        places |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    every = [(name, math.prod(shape)) for tensors in shards for name, (shape, _) in tensors.items()]
    return {
        "parameters": sum(count for _, count in every),
        "attention_parameters": sum(count for name, count in every if "self_attn" in name),
        "bytes": sum(path.stat().st_size for path in folder.glob("*.safetensors")),
    }


def write_shard(path: Path, tensors: dict[str, tuple[list[int], bool]], rng: np.random.Generator) -> None:
    """Write one safetensors file; a tensor that is not needed stays a hole."""
    header, end = {}, 0
    for name, (shape, _) in tensors.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, (shape, needed) in tensors.items():
            if needed:
                file.seek(8 + len(text) + header[name]["data_offsets"][0])
                for values in drawn(shape, rng):
                    file.write(values)
        file.truncate(8 + len(text) + end)


def drawn(shape: list[int], rng: np.random.Generator) -> Iterator[bytes]:
    """Yield bfloat16 values in pieces: gains around one, weights of standard deviation 0.02."""
    mean, spread = (1.0, 0.1) if len(shape) == 1 else (0.0, 0.02)
    left = math.prod(shape)
    while left:
        count = min(left, 1 << 22)
        values = rng.standard_normal(count, dtype=np.float32) * np.float32(spread) + np.float32(mean)
        yield (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
        left -= count


def measure(folder: Path, output: Path, *arguments: str) -> dict[str, float]:
    """Run `attnlens inspect` on a folder in a process of its own; return seconds and megabytes."""
    output.mkdir(parents=True)
    command = [sys.executable, "-c", WATCHED, "inspect", str(folder), "--output", str(output), *arguments]
    subprocess.run(command, check=True, capture_output=True)
    seconds, base, peak, cpu = map(float, (output / "measured").read_text().split())
    return {"seconds": seconds, "cpu_seconds": cpu, "imports_mb": base, "peak_above_imports_mb": peak - base}


def linearity(depths: list[int], seconds: list[float]) -> dict[str, float]:
    """Fit seconds = a + b * depth by least squares; return a, b and the largest relative residual."""
    if len(depths) < 3:
        return {}
    slope, start = np.polyfit(depths, seconds, 1)
    residual = np.abs(np.polyval([slope, start], depths) / seconds - 1).max()
    return {"seconds_a_layer": float(slope), "seconds_at_start": float(start), "largest_residual": float(residual)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", default="4,8,16,32", help="depths to measure")
    parser.add_argument("--folder", help="where the checkpoints are written; default: a temporary folder")
    arguments = parser.parse_args()
    begin = time.perf_counter()
    command = f"python -m benchmarks.trust.scale --layers {arguments.layers}"
    depths = [int(depth) for depth in arguments.layers.split(",")]
    found = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        for depth in depths:
            sizes = write_model(Path(name) / "model", {**CONFIG, "num_hidden_layers": depth})
            load = os.getloadavg()[0]
            run = measure(Path(name) / "model", Path(name) / f"out{depth}")
            found.append({"layers": depth, **sizes, "load_before": load, **run})
            print(json.dumps(found[-1]), flush=True)
            shutil.rmtree(Path(name) / "model")
            known = {run["layers"]: run for run in (*earlier(), *found)}
            runs = [known[depth] for depth in sorted(known)]
            record("scale", command, time.perf_counter() - begin, counts(runs))


def earlier() -> list[dict[str, float]]:
    """Return the depths measured before, which stand until they are measured again."""
    if not RESULTS.exists():
        return []
    return json.loads(RESULTS.read_text()).get("scale", {}).get("runs", [])


def counts(found: list[dict[str, float]]) -> dict[str, object]:
    """Return the entry for the depths measured so far."""
    worst = max(run["peak_above_imports_mb"] for run in found)
    return {
        "shape": CONFIG,
        "runs": found,
        **linearity([run["layers"] for run in found], [run["cpu_seconds"] for run in found]),
        "peak_above_imports_mb": worst,
        "limit_mb": LIMIT_MB,
        "within_limit": worst < LIMIT_MB,
    }


if __name__ == "__main__":
    main()
