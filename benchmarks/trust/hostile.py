"""Hostile input: ``python -m benchmarks.trust.hostile --inputs N --seed S`` fills "hostile" in trust.json.

Every case of `handmade`, then N mutations of valid files of fifteen formats, each read under `guard`. A violation is
printed with what was done to the file, and makes the exit code 1.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import pickle
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

_RARE = (
    *("attnlens.checkpoints.converted", "attnlens.checkpoints.adapters", "attnlens.models.renamed"),
    *("attnlens.models.sizes", "attnlens.models.diffusers", "attnlens.models.undress", "ml_dtypes"),
)
"""Modules that are imported where a file calls for them."""
AT_ONCE = 100
"""Mutations that are drawn, and kept, at once."""
SHARES = {
    "safetensors": 5,
    "pth": 6,
    "legacy pickle": 4,
    "npz": 4,
    "packed": 4,
    "timm folder": 2,
    "transformers folder": 4,
    "shard index": 4,
    "params.json": 5,
    "results folder": 6,
    "scan folder": 4,
    "image folder": 3,
    "image tar": 4,
    "decoded cache": 2,
    "text folder": 1,
}
"""Of each format among the mutations: those that are read quickly are tried more often."""


def documents(seed: int, count: int) -> list[Any]:
    """Return JSON values that hypothesis makes."""
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import seed as seeded
    from hypothesis import strategies as st

    text = st.text(st.characters(), max_size=12)
    plain = st.none() | st.booleans() | st.integers() | st.floats() | text
    values = st.recursive(plain, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4))
    found: list[Any] = []

    @seeded(seed)
    @settings(
        max_examples=count, database=None, phases=[Phase.generate], suppress_health_check=[*HealthCheck], deadline=None
    )
    @given(values)
    def collect(value: Any) -> None:
        found.append(value)

    collect()
    return found


class Workshop:
    """A folder to try cases in, with a forbidden folder and the place of the canary; the process works inside it."""

    def __init__(self, readers: Mapping[str, Any]) -> None:
        shared = Path("/dev/shm")  # noqa: S108  # a folder of its own is made there
        self.folder = Path(tempfile.mkdtemp(prefix="attnlens-hostile-", dir=shared if shared.is_dir() else None))
        self.forbidden, self.tries, cache_folder = (self.folder / name for name in ("FORBIDDEN", "tries", "cache"))
        for place in (self.forbidden, self.tries, cache_folder):
            place.mkdir()
        os.environ["XDG_CACHE_HOME"] = str(cache_folder / "home")
        os.chdir(self.folder)
        from benchmarks.trust import seeds
        from benchmarks.trust.guard import Guard

        weights = seeds.safetensors(seeds.transformers_state())
        listing = {"weight_map": {"a": "secret.safetensors"}, **seeds.TRANSFORMERS}
        (self.forbidden / "secret.safetensors").write_bytes(weights)
        (self.forbidden / "secret.json").write_text(json.dumps(listing))
        (self.forbidden / "secret.py").write_text("import os; os.system('touch CANARY')")
        (self.forbidden / "secret.png").write_bytes(seeds.image(3))
        (self.forbidden / "secret.pth").write_bytes(pickle.dumps(_Canary()))
        self.valid = seeds.valid() if readers else []
        self._warm(readers)
        self.guard = Guard(readers, self.tries, self.forbidden, cache_folder)

    def _warm(self, readers: Any) -> None:
        """Read every valid case, so that what a reader imports and keeps is there."""
        from importlib import import_module
        from importlib.metadata import version

        from attnlens import provenance
        from benchmarks.trust.guard import write_files

        for name in _RARE:  # no valid file needs them
            import_module(name)
        provenance.version = cache(version)  # parsing the same metadata for every input would be half of the time
        said, sys.stdout = sys.stdout, open(os.devnull, "w")  # noqa: SIM115, PTH123
        heard, sys.stderr = sys.stderr, sys.stdout
        try:
            for number, case in enumerate(self.valid):
                given, output = self.folder / "warm" / str(number), self.folder / "warm" / f"{number}-output"
                output.mkdir(parents=True)
                write_files(given, case.files)
                readers[case.format][0](given / case.given, output)
        finally:
            sys.stdout, sys.stderr = said, heard
            shutil.rmtree(self.folder / "warm", ignore_errors=True)

    def close(self) -> None:
        """Remove the folder."""
        os.chdir("/")
        shutil.rmtree(self.folder)


class _Canary:
    def __reduce__(self):
        return os.system, ("touch CANARY",)


def counts(outcomes: Sequence[Any]) -> dict[str, Any]:
    """Return what trust.json says of outcomes."""
    from benchmarks.trust.guard import KINDS
    from benchmarks.trust.readers import IMAGES, WEIGHTS

    formats: dict[str, Counter[str]] = {}
    for outcome in outcomes:
        formats.setdefault(outcome.case.format, Counter())[outcome.verdict] += 1
    verdicts = Counter(outcome.verdict for outcome in outcomes)
    share = {
        name: max((o.growth - bound.constant) / max(o.size, 1) for o in outcomes if (o.case.format in _IMAGE) == image)
        for name, bound, image in (("weights", WEIGHTS, False), ("images", IMAGES, True))
        if any((o.case.format in _IMAGE) == image for o in outcomes)
    }
    large = [o for o in outcomes if o.size >= 1 << 20]
    return {
        "inputs": len(outcomes),
        "accepted": verdicts["accepted"],
        "refused": verdicts["refused"],
        **{f"violations_{kind}": verdicts[kind] for kind in KINDS},
        "by_format": {
            name: {"inputs": sum(count.values()), "accepted": count["accepted"], "refused": count["refused"]}
            for name, count in sorted(formats.items())
        },
        "largest_growth_bytes": max(o.growth for o in outcomes),
        "largest_multiple_beyond_the_constant": {name: round(max(value, 0.0), 1) for name, value in share.items()},
        "largest_multiple_of_files_over_1_MiB": round(max((o.growth / o.size for o in large), default=0.0), 1),
        "longest_seconds": max(o.seconds for o in outcomes),
        "bounds": {"weights and JSON": vars(WEIGHTS), "images": vars(IMAGES)},
    }


_IMAGE = ("image folder", "image tar", "decoded cache")


def draw(workshop: Workshop, inputs: int, seed: int) -> list[Any]:
    """Return so many mutations of valid cases."""
    from benchmarks.trust.mutations import Mutator

    mutator = Mutator(seed, documents(seed, 100))
    names = list(SHARES)
    drawn = mutator.random.choices(names, [SHARES[name] for name in names], k=inputs)
    by_format = {name: [case for case in workshop.valid if case.format == name] for name in names}
    return [placed(mutator.mutate(mutator.random.choice(by_format[name])), workshop.forbidden) for name in drawn]


def placed(case: Any, forbidden: Path) -> Any:
    """Return a case whose documents and links name the forbidden folder by its path."""
    from benchmarks.trust.guard import Link

    files = {}
    for name, content in case.files.items():
        if isinstance(content, Link):
            files[name] = Link(content.target.replace("FORBIDDEN", str(forbidden)))
        elif name.endswith((".json", ".jsonl")):
            files[name] = content.replace(b"FORBIDDEN", os.fsencode(forbidden))
        else:
            files[name] = content
    return replace(case, files=files)


def run(inputs: int, seed: int, *, minutes: float = math.inf, only: str = "", watch: bool = False) -> list[Any]:
    """Try the cases written by hand whose name holds ``only``, and so many mutations; return what became of each."""
    from benchmarks.trust.handmade import handmade
    from benchmarks.trust.readers import READERS

    workshop, outcomes, began = Workshop(READERS), [], time.monotonic()
    try:
        first = [placed(case, workshop.forbidden) for case in handmade() if only in f"{case.format} {case.what}"]
        for start in range(0, max(inputs, 1), AT_ONCE):
            cases = [*first, *draw(workshop, min(AT_ONCE, inputs - start), seed + start)]
            random.Random(seed).shuffle(cases)
            first = []
            for outcome in workshop.guard.try_all(cases):
                if time.monotonic() - began > 60 * minutes:
                    return outcomes
                outcomes.append(replace(outcome, case=replace(outcome.case, files={})))  # only lengths are kept
                if watch and outcome.verdict not in ("accepted", "refused"):
                    sys.stderr.write(
                        f"{outcome.verdict}: {outcome.case.format}, {outcome.case.what}: {outcome.detail}\n"
                    )
                if watch and len(outcomes) % 100 == 0:
                    sys.stderr.write(f"{len(outcomes)} inputs in {time.monotonic() - began:.0f} s\n")
    finally:
        workshop.close()
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so long, and count what was tried")
    parser.add_argument("--only", default="", help="of the cases written by hand only those whose name holds this")
    parser.add_argument("--no-record", action="store_true", help="leave trust.json as it is")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    began, home = time.monotonic(), Path.cwd()
    outcomes = run(options.inputs, options.seed, minutes=options.minutes, only=options.only, watch=True)
    os.chdir(home)
    found = counts(outcomes)
    print(json.dumps(found, indent=1))
    if not options.no_record:
        from benchmarks.trust.record import record

        command = f"python -m benchmarks.trust.hostile {' '.join(sys.argv[1:])}".strip()
        record("hostile", command, time.monotonic() - began, found)
    return int(found["accepted"] + found["refused"] < found["inputs"])


if __name__ == "__main__":
    sys.exit(main())
