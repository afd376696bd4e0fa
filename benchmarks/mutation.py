"""Mutation run: small changes planted one at a time in the core, and whether the tests of their module notice.

    pip install --group mutation
    python -m benchmarks.mutation --mutants 200 --jobs 2

Mutants are those of cosmic-ray's operators (arithmetic, comparisons, signs, numbers, booleans, loops). All that can be
made in `PARTS` are counted, a seeded sample, spread evenly over the parts, is planted in copies of the tree, and the
test files of the part are run until one fails. ``killed``: a test failed; ``timeout``: the tests did not end, counted as
killed; ``survived``: all passed, equivalent mutants among them. The score is killed / planted.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import Queue

from attnlens.atomic import write_text_atomic
from attnlens.provenance import run_provenance

ROOT = Path(__file__).resolve().parent.parent
PARTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "circuits": (("attnlens/circuits.py",), ("tests/test_circuits.py", "tests/test_draws.py", "tests/test_diagonal.py")),
    "statistics": (
        ("attnlens/statistics/*.py",),
        ("tests/test_diagonal.py", "tests/test_inverse.py", "tests/test_draws.py", "tests/test_inference.py"),
    ),
    "layouts": (
        ("attnlens/layouts/*.py", "attnlens/layouts/*/*.py"),
        (
            *("tests/test_layouts_rules.py", "tests/test_layouts_roundtrip.py", "tests/test_filters_inspect.py"),
            *("tests/test_layouts_surroundings.py", "tests/test_layouts_forward.py"),
        ),
    ),
    "inits": (
        ("attnlens/inits/*.py", "attnlens/inits/*/*.py"),
        (
            *("tests/test_draws.py", "tests/test_inits_products.py", "tests/test_inits_names.py"),
            *("tests/test_inits_verify.py", "tests/test_inits_mistakes.py", "tests/test_inits_fitted.py"),
            "tests/test_filters_init.py",
        ),
    ),
}
"""Per part the files that are mutated and the test files that belong to them."""
OPERATORS = tuple(
    f"core/{name}"
    for name in (
        *("ReplaceBinaryOperator_Add_Sub", "ReplaceBinaryOperator_Sub_Add", "ReplaceBinaryOperator_Mul_Div"),
        *("ReplaceBinaryOperator_Div_Mul", "ReplaceBinaryOperator_Pow_Mul", "ReplaceBinaryOperator_FloorDiv_Mul"),
        *("ReplaceComparisonOperator_Lt_GtE", "ReplaceComparisonOperator_Gt_LtE", "ReplaceComparisonOperator_Eq_NotEq"),
        *("ReplaceComparisonOperator_LtE_Gt", "ReplaceComparisonOperator_GtE_Lt", "ReplaceComparisonOperator_NotEq_Eq"),
        *("ReplaceComparisonOperator_Is_IsNot", "ReplaceComparisonOperator_IsNot_Is", "NumberReplacer"),
        *("ReplaceUnaryOperator_Delete_USub", "ReplaceUnaryOperator_Delete_Not", "ReplaceAndWithOr"),
        *("ReplaceOrWithAnd", "ReplaceTrueWithFalse", "ReplaceFalseWithTrue", "ReplaceContinueWithBreak"),
        *("AddNot", "ZeroIterationForLoop"),
    )
)
TIMEOUT_S = 600


@dataclass(frozen=True)
class Mutant:
    """One change, and what became of it."""

    part: str
    file: str
    operator: str
    occurrence: int
    outcome: str = ""
    change: str = ""
    seconds: float = 0.0


def mutants_of(part: str) -> Iterator[Mutant]:
    """Yield every mutant the operators can make of a part."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.plugins import get_operator

    for pattern in PARTS[part][0]:
        for path in sorted(ROOT.glob(pattern)):
            nodes = list(ast_nodes(get_ast(path.read_text())))
            for name in OPERATORS:
                operator = get_operator(name)()
                count = sum(len(list(operator.mutation_positions(node))) for node in nodes)
                for occurrence in range(count):
                    yield Mutant(part, str(path.relative_to(ROOT)), name.removeprefix("core/"), occurrence)


def sample(mutants: list[Mutant], count: int, seed: int) -> list[Mutant]:
    """Return a seeded sample, as many of every part."""
    chosen: list[Mutant] = []
    source = random.Random(seed)  # noqa: S311  # a sample, no secret
    for part in PARTS:
        own = [mutant for mutant in mutants if mutant.part == part]
        chosen += source.sample(own, min(count // len(PARTS), len(own)))
    source.shuffle(chosen)
    return chosen


def run(mutant: Mutant, tree: Path) -> Mutant:
    """Plant a mutant in a copy of the tree, run its tests, and take it out again."""
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    path = tree / mutant.file
    before = path.read_text()
    after = mutate_code(before, get_operator(f"core/{mutant.operator}")(), mutant.occurrence)
    assert after is not None
    start = time.monotonic()
    path.write_text(after)
    try:
        outcome = "killed" if _tests_fail(mutant.part, tree) else "survived"
    except subprocess.TimeoutExpired:
        outcome = "timeout"
    finally:
        path.write_text(before)
    pairs = enumerate(zip(before.splitlines(), after.splitlines(), strict=False), 1)
    change = next((f"{line}: {old.strip()} -> {new.strip()}" for line, (old, new) in pairs if old != new), "")
    seconds = round(time.monotonic() - start, 1)
    return Mutant(mutant.part, mutant.file, mutant.operator, mutant.occurrence, outcome, change, seconds)


def _tests_fail(part: str, tree: Path) -> bool:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *PARTS[part][1]]
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, timeout=TIMEOUT_S, check=False)  # noqa: S603
    return done.returncode != 0


def main() -> None:
    """Run the sample and write its score."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutants", type=int, default=200, help="how many to plant")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="plant no more after so many")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/mutation.json")
    given = parser.parse_args()
    everything = [mutant for part in PARTS for mutant in mutants_of(part)]
    chosen = sample(everything, given.mutants, given.seed)
    end = time.monotonic() + 60 * given.minutes
    with tempfile.TemporaryDirectory() as folder:
        trees: Queue[Path] = Queue()
        for job in range(given.jobs):
            tree = Path(folder) / str(job)
            shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".git", "__pycache__", ".*_cache", ".venv"))
            trees.put(tree)

        def check(part: str) -> None:
            tree = trees.get()
            if _tests_fail(part, tree):
                raise SystemExit(f"the tests of {part} fail without any mutant: {' '.join(PARTS[part][1])}")
            trees.put(tree)

        def one(mutant: Mutant) -> Mutant | None:
            if time.monotonic() > end:
                return None
            tree = trees.get()
            try:
                found = run(mutant, tree)
            finally:
                trees.put(tree)
            print(f"{found.outcome:9} {found.file}:{found.change}", file=sys.stderr)
            return found

        with ThreadPoolExecutor(given.jobs) as pool:
            list(pool.map(check, PARTS))
            planted = [found for found in pool.map(one, chosen) if found is not None]
    write_text_atomic(given.output, json.dumps(summary(everything, planted, given.seed), indent=1) + "\n")
    print(f"{score(planted):.1%} of {len(planted)} mutants killed")


def score(planted: list[Mutant]) -> float:
    """Return the share of mutants that the tests notice."""
    return sum(mutant.outcome != "survived" for mutant in planted) / max(len(planted), 1)


def summary(everything: list[Mutant], planted: list[Mutant], seed: int) -> dict[str, object]:
    """Return the JSON of a run."""
    parts = {}
    for part in PARTS:
        own = [mutant for mutant in planted if mutant.part == part]
        parts[part] = {
            "possible": sum(mutant.part == part for mutant in everything),
            "planted": len(own),
            **Counter(mutant.outcome for mutant in own),
            "score": score(own),
        }
    return {
        **run_provenance(),
        "command": " ".join(["python -m benchmarks.mutation", *sys.argv[1:]]),
        "seed": seed,
        "planted": len(planted),
        "score": score(planted),
        "parts": parts,
        "mutants": [asdict(mutant) for mutant in planted],
    }


if __name__ == "__main__":
    main()
