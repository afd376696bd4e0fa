"""State that is read back, whole and hostile inside: parameter files, folders of scans and comparisons, caches.

Every digest is right and every value is of the kind the schema asks for; what it says is odd.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
from copy import deepcopy
from typing import Any

import numpy as np

from attnlens.state import DIGEST, sealed
from benchmarks.trust import payloads, seeds

_TEXTS = [name for name in payloads.NAMES if name] + [
    "default",
    "mimetic",
    "raw",
    "effective",
    "qk",
    "ov",
    "finished",
    "diverged",
    "=1+1",
    "@x",
    "-1",
    "+1",
    "a,b\n",
    '"',
    "\t",
    "\u00a0",
    "\ufeff",
]
_FLOATS = (0.0, -0.0, 1e308, -1e308, 5e-324, 1e-320, 1.0, -1.0, 1e6, 0.1 + 0.2, 1e16, 2.0**53)
_INTS = (0, 1, 2, 3, -1, 100, 10**6, 2**31 - 1, 2**31, 2**53 + 1)
_ENUMERATED = ("status", "schema", "schema_version", "config", "config_sha256", "fold", "circuit", "csv_sha256", "model", "stamp", "checkpoint", "head", "per", "level")  # fmt: skip  # noqa: E501
"""Fields whose other values end at the schema: they are left alone in nine cases of ten."""


def otherwise(rng: random.Random, data: Any, changes: int, kind: type = object) -> Any:
    """Return a document with so many of its values (of one type, where given) exchanged for others like them."""
    data = deepcopy(data)
    places: list[tuple[Any, Any]] = []
    waiting: list[Any] = [data]
    while waiting:
        holder = waiting.pop()
        for key, value in list(holder.items() if isinstance(holder, dict) else enumerate(holder)):
            if key in _ENUMERATED and rng.random() < 0.9:
                continue
            if isinstance(value, kind):
                places.append((holder, key))
            if isinstance(value, dict | list):
                waiting.append(value)
    for holder, key in rng.sample(places, min(changes, len(places))):
        if isinstance(holder, dict) or key < len(holder):
            holder[key] = _other(rng, holder[key])
    return data


def _other(rng: random.Random, value: Any) -> Any:
    """Return another value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice((*_INTS, value + 1, value))
    if isinstance(value, float):
        return rng.choice((*_FLOATS, -value, value * 1e3, rng.random(), rng.random()))
    if isinstance(value, str):
        return rng.choice(_TEXTS)
    if isinstance(value, list) and value:
        kept = list(value)
        way = rng.randrange(5)
        if way == 0:
            return kept[::-1]
        if way == 1:
            return [*kept, deepcopy(rng.choice(kept))]
        if way == 2 and len(kept) > 1:
            del kept[rng.randrange(len(kept))]
        elif way == 3:
            return [deepcopy(rng.choice(kept)) for _ in range(rng.choice((1, 2, 300)))]
        return kept
    if isinstance(value, dict) and value:
        names = rng.sample(list(value), len(value))
        found = {name: value[name] for name in names}
        if rng.random() < 0.3:
            found[rng.choice(_TEXTS)] = deepcopy(found[names[0]])
        return found
    return value


def params(rng: random.Random) -> dict[str, bytes]:
    """Return a parameter file of one of the versions that are read."""
    data = json.loads(seeds.params())
    if rng.random() < 0.3:
        data = {name: value for name, value in data.items() if name not in ("gains", "gain_levels")}
        data |= {"schema_version": 3}
    changed = otherwise(rng, data, rng.choice((1, 1, 2, 4)), rng.choice((float, str, object)))
    return {"params.json": json.dumps(changed).encode()}


def scan(rng: random.Random) -> dict[str, bytes]:
    """Return the folder of a scan whose result is believed and says something else than was measured."""
    files = dict(seeds.scan_folder())
    name = next(name for name in files if name.endswith(".json"))
    table = name.replace(".json", ".csv")
    data = json.loads(files[name])
    if rng.random() < 0.15:
        kept = {
            key: value
            for key, value in data.items()
            if key
            in ("name", "model", "checkpoint", "stamp", "fold", "schema", "schema_version", "num_heads", "row_order")
        }
        data = {**kept, "status": "failed", "error": rng.choice(_TEXTS)}
    else:
        places = rng.choice(
            (
                ["table"],
                ["table", "provenance"],
                ["provenance"],
                ["labels", "heads", "head_dim", "depth", "layers", "seconds", "refused"],
            )
        )
        kind = float if places == ["table"] or rng.random() < 0.5 else object
        part = otherwise(rng, {key: data[key] for key in places if key in data}, rng.choice((1, 2, 5)), kind)
        data |= part
        data["labels"] = rng.sample(_TEXTS, rng.randrange(4))
        if rng.random() < 0.5:
            files[table] = files[table].replace(b"0.", rng.choice((b"9.", b"-0.", b"1e308", b"=1+")))
        if table in files:
            data["csv_sha256"] = hashlib.sha256(files[table]).hexdigest()
    data.pop(DIGEST, None)
    files[name] = json.dumps(sealed(data)).encode()
    return files


def results(rng: random.Random) -> dict[str, bytes]:
    """Return a comparison's folder with other runs than were trained, written by the tool's own functions."""
    from attnlens.training.results import results_lines, summarise
    from benchmarks.trust.readers import CONFIG

    runs: dict[str, list[dict[str, Any]]] = {}
    for arm in CONFIG.arms:
        for seed in range(rng.choice((1, 2, 2, 3))):
            lines = [seeds.record(arm, seed, epoch) for epoch in range(rng.choice((1, 3, 3)))]
            odd = otherwise(rng, lines, rng.choice((0, 1, 2, 5)))
            runs[f"{arm}-{seed}"] = [{**line, "arm": arm, "seed": seed} for line in odd] if rng.random() < 0.9 else odd
    files = dict(seeds.results())
    files = {name: text for name, text in files.items() if not name.startswith("runs/")}
    for name, lines in runs.items():
        files[f"runs/{name}.json"] = seeds.state_file({"config": CONFIG.sha256(), "records": lines})
    try:
        lines, summary = results_lines(CONFIG, runs), summarise(CONFIG, runs).to_json()
    except Exception:  # noqa: BLE001  # of records that no run wrote: those of the valid folder stay
        return files
    files["results.jsonl"] = lines.encode()
    summary = otherwise(rng, summary, rng.choice((0, 1, 3)))
    right = isinstance(summary, dict) and rng.random() < 0.8
    files["summary.json"] = (
        seeds.summary_file(summary, files["results.jsonl"]) if right else json.dumps(summary).encode()
    )
    return files


def decoded(rng: random.Random) -> bytes:
    """Return a decoded data set with its hash, of other labels, names, sizes and notes."""
    from attnlens.training.data.cache import Decoded, write_decoded

    train, test = rng.choice(((6, 2), (1, 1), (0, 1), (60, 3)))
    side, channels = rng.choice((1, 4, 9)), rng.choice((1, 3, 4))
    draw = np.random.default_rng(rng.getrandbits(32))
    pixels = draw.integers(0, 256, (train + test, channels, side, side), dtype=np.uint8)
    classes = tuple(rng.sample([text.replace("\0", "") or "x" for text in _TEXTS], rng.choice((1, 2, 5))))
    top = len(classes) + (rng.random() < 0.2)
    labels = draw.integers(-(rng.random() < 0.1), top, train + test)
    told = {rng.choice(_TEXTS): rng.choice((0, 3, 10**30))}
    buffer = io.BytesIO()
    write_decoded(
        buffer,
        Decoded(pixels[:train], labels[:train], pixels[train:], labels[train:], classes, told, rng.choice(_TEXTS)),
    )
    return buffer.getvalue()
