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
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.trust.guard import KINDS
from benchmarks.trust.tally import Kept, Tally, counts, sources, tally, together

_RARE = (
    *("attnlens.checkpoints.converted", "attnlens.checkpoints.adapters", "attnlens.models.renamed"),
    *(
        "attnlens.models.sizes",
        "attnlens.models.diffusers",
        "attnlens.models.undress",
        "ml_dtypes",
        "encodings.raw_unicode_escape",
    ),
)
"""Modules that are imported where a file calls for them."""
AT_ONCE = 250
"""Inputs of a piece: drawn from a seed of their own, tried and counted together."""


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


def run(
    inputs: int,
    seed: int,
    *,
    keep: Path | None = None,
    shard: tuple[int, int] = (0, 1),
    minutes: float = math.inf,
    only: str = "",
    watch: bool = False,
) -> tuple[Tally, bool]:
    """Try the cases written by hand whose name holds ``only``, and so many that are drawn, piece by piece.

    Pieces that the file ``keep`` holds are not tried again; of ``shard`` (k, n) every n-th piece from the k-th on is
    tried. Returns the counts of all pieces there are, and whether they are all.
    """
    from benchmarks.trust.generators import Generator
    from benchmarks.trust.handmade import handmade
    from benchmarks.trust.readers import READERS

    wanted = {"by hand": 0} | {f"{start}": min(AT_ONCE, inputs - start) for start in range(0, inputs, AT_ONCE)}
    kept, began = Kept(keep, seed), time.monotonic()
    known = kept.pieces()
    mine = [piece for piece in [*wanted][shard[0] :: shard[1]] if piece not in known]
    workshop = Workshop(READERS) if mine else None
    values = documents(seed, 400) if mine else []
    try:
        for number, piece in enumerate(mine, 1):
            assert workshop is not None
            if time.monotonic() - began > 60 * minutes:
                break
            start = time.monotonic()
            if piece == "by hand":
                cases = [case for case in handmade() if only in f"{case.format} {case.what}"]
            else:
                cases = Generator(f"{seed} {piece}", workshop.valid, values).draw(wanted[piece])
            outcomes = []
            for outcome in workshop.guard.try_all([placed(case, workshop.forbidden) for case in cases]):
                outcomes.append(replace(outcome, case=replace(outcome.case, files={})))  # only lengths are kept
                if watch and outcome.verdict in KINDS:
                    case = outcome.case
                    sys.stderr.write(
                        f"{outcome.verdict}: piece {piece}, {case.format}, {case.made}, {case.what}: {outcome.detail}\n"
                    )
            kept.add(piece, tally(outcomes, time.monotonic() - start))
            if watch:
                sys.stderr.write(f"{number} of {len(mine)} pieces in {time.monotonic() - began:.0f} s\n")
    finally:
        if workshop is not None:
            workshop.close()
    found = {piece: one for piece, one in kept.pieces().items() if piece in wanted}
    return together(found.values()), set(found) == set(wanted)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="append counts to this file as they come, and go on from it")
    parser.add_argument("--shard", default="1/1", metavar="K/N", help="try every N-th piece from the K-th on")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so long, and count what was tried")
    parser.add_argument("--only", default="", help="of the cases written by hand only those whose name holds this")
    parser.add_argument("--no-record", action="store_true", help="leave trust.json as it is")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    first, _, number = options.shard.partition("/")
    shard = (int(first) - 1, int(number))
    keep, home = options.keep and options.keep.absolute(), Path.cwd()
    whole, complete = run(
        options.inputs, options.seed, keep=keep, shard=shard, minutes=options.minutes, only=options.only, watch=True
    )
    os.chdir(home)
    found = counts(whole)
    print(json.dumps(found, indent=1))
    if not options.no_record and (complete or options.minutes < math.inf):
        from benchmarks.trust.record import record

        command = f"python -m benchmarks.trust.hostile --inputs {options.inputs} --seed {options.seed}"
        record("hostile", command, whole["seconds"], {**found, "sources_sha256": sources()})
    return int(bool(whole["violations"]))


if __name__ == "__main__":
    sys.exit(main())
