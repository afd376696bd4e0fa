"""Mutation run: small changes planted one at a time in the core, and whether the tests of their module notice.

    pip install --group mutation
    python -m benchmarks.mutation --mutants 50 --jobs 2

Mutants are those of cosmic-ray's operators (arithmetic, comparisons, signs, numbers, booleans, loops). All that can be
made in `PARTS` are counted, a seeded sample of each part is planted in copies of the tree, and the test files of the
part are run one after the other until a test fails, those first that name the mutated module. ``killed``: a test
failed; ``timeout``: the tests did not end, counted as killed; ``survived``: all passed. The score is killed / planted.
`EQUIVALENT` holds the survivors that no test could kill, with the reason; the score without them stands beside the
other. With ``--parts`` the others keep what the file says of them, and with ``--mutants 0`` nothing is planted and the
scores are counted anew.
"""

from __future__ import annotations

import argparse
import compileall
import json
import os
import py_compile
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from queue import Queue
from typing import Any

from attnlens.atomic import write_text_atomic
from attnlens.provenance import run_provenance

ROOT = Path(__file__).resolve().parent.parent
PARTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "circuits": (
        ("attnlens/circuits/*.py",),
        (
            *("tests/test_source_rules.py", "tests/test_circuits_pieces.py", "tests/test_circuits.py"),
            *("tests/test_diagonal.py", "tests/test_balance.py"),
        ),
    ),
    "statistics": (
        ("attnlens/statistics/*.py",),
        (
            *("tests/test_source_rules.py", "tests/test_statistics_pieces.py", "tests/test_verdict_rules.py"),
            *("tests/test_statistics_stored.py", "tests/test_pairs.py", "tests/test_depth.py"),
            "tests/test_diagonal.py",
            *("tests/test_inverse.py", "tests/test_table.py", "tests/test_draws.py", "tests/test_balance.py"),
            *("tests/test_inference.py", "tests/test_trace.py", "tests/test_params.py", "tests/test_results.py"),
        ),
    ),
    "layouts": (
        ("attnlens/layouts/*.py", "attnlens/layouts/*/*.py"),
        (
            "tests/test_source_rules.py",
            *("tests/test_layouts_stored.py", "tests/test_layouts_data.py", "tests/test_layouts_describe.py"),
            *("tests/test_layouts_tracing.py", "tests/test_layouts_passes.py", "tests/test_layouts_read_write.py"),
            *("tests/test_layouts_pieces.py", "tests/test_layouts_rules.py", "tests/test_layouts_roundtrip.py"),
            *("tests/test_layouts_surroundings.py", "tests/test_layouts_forward.py", "tests/test_filters_inspect.py"),
            *("tests/test_shipped_layouts.py", "tests/test_live_networks.py", "tests/test_layouts_census.py"),
        ),
    ),
    "inits": (
        ("attnlens/inits/*.py", "attnlens/inits/*/*.py"),
        (
            *("tests/test_source_rules.py", "tests/test_inits_pieces.py", "tests/test_inits_checks.py"),
            *("tests/test_inits_borders.py", "tests/test_inits_routes.py", "tests/test_inits_limits.py"),
            "tests/test_inits_stored.py",
            *("tests/test_inits_files.py", "tests/test_draws.py", "tests/test_inits_products.py"),
            *("tests/test_inits_names.py", "tests/test_inits_verify.py", "tests/test_inits_mistakes.py"),
            *("tests/test_inits_fitted.py", "tests/test_filters_init.py", "tests/test_inits_gains.py"),
            *("tests/test_inits_reduced.py", "tests/test_inits_transformers.py", "tests/test_inits_default.py"),
        ),
    ),
}
"""Per part the files that are mutated and the test files that belong to them."""
LEFT_OUT = ("--deselect", "tests/test_inits_mistakes.py::test_no_initialiser_raises_a_false_alarm")
"""Minutes a run for what others mostly notice: what it alone would kill counts as survived."""
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
CPU_LIMIT_S, TIMEOUT_S = 600, 1800
"""Tests that took so many seconds of CPU time, or waited so long, are taken to have no end."""
EQUIVALENT = Path(__file__).parent / "equivalent_mutants.json"
"""Survivors that compute the same as the code they change: file, change and the reason."""


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
    """Return a seeded sample in random order: its beginnings are samples too."""
    return random.Random(seed).sample(mutants, min(count, len(mutants)))  # no secret


def run(mutant: Mutant, tree: Path) -> Mutant:
    """Plant a mutant in a copy of the tree, run its tests, and take it out again."""
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    path = tree / mutant.file
    before = path.read_text()
    after = mutate_code(before, get_operator(f"core/{mutant.operator}")(), mutant.occurrence)
    assert after is not None
    start = time.monotonic()
    pairs = enumerate(zip(before.splitlines(), after.splitlines(), strict=False), 1)
    line, old, new = next((line, old, new) for line, (old, new) in pairs if old != new)
    path.write_text(after)
    try:
        outcome = "killed" if _tests_fail(_nearest_first(mutant), tree) else "survived"
    except TimeoutError:
        outcome = "timeout"
    finally:
        path.write_text(before)
    change = f"{line}: {old.strip()} -> {new.strip()}"
    seconds = round(time.monotonic() - start, 1)
    return Mutant(mutant.part, mutant.file, mutant.operator, mutant.occurrence, outcome, change, seconds)


def _nearest_first(mutant: Mutant) -> list[str]:
    """Return the test files of a mutant's part, those first that name its module."""
    module = mutant.file.removesuffix(".py").replace("/", ".")
    return sorted(PARTS[mutant.part][1], key=lambda file: module not in (ROOT / file).read_text())


def _tests_fail(files: Sequence[str], tree: Path) -> bool:
    """Run test files on a copy of the tree, in a fork of this process, which has imported torch already."""
    process = get_context("fork").Process(target=_pytest, args=(files, tree))
    process.start()
    process.join(TIMEOUT_S)
    if process.is_alive():
        process.kill()
        process.join()
        raise TimeoutError
    if process.exitcode == -signal.SIGXCPU:
        raise TimeoutError
    return process.exitcode != 0


class _Ended:
    """Ends the process with what the tests said: pytest's own way out raises for what it left open itself."""

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        os._exit(int(exitstatus))


def _pytest(files: Sequence[str], tree: Path) -> None:
    import pytest

    resource.setrlimit(resource.RLIMIT_CPU, (CPU_LIMIT_S, resource.RLIM_INFINITY))  # SIGXCPU ends the process
    for name in [name for name in sys.modules if name.split(".")[0] in ("attnlens", "benchmarks", "tests")]:
        del sys.modules[name]
    os.chdir(tree)
    sys.path.insert(0, str(tree))
    os.environ["PYTHONPATH"] = str(tree)  # of commands the tests start
    log = os.open(_log(tree), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    options = ("-q", "-x", "-p", "no:cacheprovider", "--assert=plain", *LEFT_OUT)
    os._exit(int(pytest.main([*options, *files], plugins=[_Ended()])))


def _log(tree: Path) -> Path:
    return tree.with_suffix(".log")


def _compile(tree: Path) -> None:
    """Leave bytecode that is valid by a module's text: a mutant may come within the second of the one before."""
    for folder in ("attnlens", "benchmarks", "tests"):
        compileall.compile_dir(tree / folder, quiet=2, invalidation_mode=py_compile.PycInvalidationMode.CHECKED_HASH)


def _import_heavy() -> None:
    """Import what tests need and mutants do not change, once."""
    import scipy.stats  # noqa: F401
    import timm  # noqa: F401


def main() -> None:
    """Run the samples and write their scores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--mutants", type=int, default=50, help="how many to plant in each part")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="plant no more of a part after so many")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/mutation.json")
    given = parser.parse_args()
    sys.dont_write_bytecode = True  # of mutants
    if given.mutants:
        _import_heavy()
    changed = _git("status", "--porcelain", "attnlens", "tests").splitlines()
    at = {"commit": _git("rev-parse", "HEAD"), "changed_since": changed}
    results = json.loads(given.output.read_text()) if given.output.exists() else {"parts": {}}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(given.jobs) as pool:
        trees: Queue[Path] = Queue()
        first = Path(folder) / "0"
        shutil.copytree(ROOT, first, ignore=shutil.ignore_patterns(".git", "__pycache__", ".*_cache", ".venv"))
        _compile(first)
        trees.put(first)
        for job in range(1, given.jobs):
            trees.put(Path(shutil.copytree(first, Path(folder) / str(job))))
        for part in given.parts if given.mutants else ():
            possible = list(mutants_of(part))
            end = time.monotonic() + 60 * given.minutes
            planted = list(pool.map(partial(_one, trees, end), sample(possible, given.mutants, given.seed)))
            tree = trees.get()
            # A survivor shows that the tests pass as they are; where there is none they are run once without a mutant.
            survivors = [each for each in planted if each and each.outcome == "survived"]
            if not survivors and _tests_fail(PARTS[part][1], tree):
                told = _log(tree).read_text().splitlines()[-20:]
                raise SystemExit("\n".join([*told, f"the tests of {part} fail without any mutant"]))
            trees.put(tree)
            results["parts"][part] = _part([each for each in planted if each], len(possible), given.seed, at)
            write_text_atomic(given.output, json.dumps(_scored(results["parts"]), indent=1) + "\n")
    results = _scored(results["parts"])
    write_text_atomic(given.output, json.dumps(results, indent=1) + "\n")
    for part in (results, *results["parts"].values()):
        name, equivalent = part.get("part", "all"), part["equivalent"]
        print(f"{name}: {part['killed']} of {part['planted']} killed, {equivalent} of the others equivalent")


def _one(trees: Queue[Path], end: float, mutant: Mutant) -> Mutant | None:
    if time.monotonic() > end:
        return None
    tree = trees.get()
    try:
        found = run(mutant, tree)
    finally:
        trees.put(tree)
    print(f"{found.outcome:9} {found.file}:{found.change}", file=sys.stderr, flush=True)
    return found


def _part(planted: list[Mutant], possible: int, seed: int, tree: dict[str, Any]) -> dict[str, Any]:
    return {
        "command": " ".join(["python -m benchmarks.mutation", *sys.argv[1:]]),
        **tree,
        **run_provenance(),
        "cosmic_ray": version("cosmic-ray"),
        "seed": seed,
        "possible": possible,
        "mutants": [asdict(mutant) for mutant in planted],
    }


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def _scored(parts: dict[str, Any]) -> dict[str, Any]:
    """Return the result with the counts and scores of every part and of all, equivalent survivors named."""
    table = json.loads(EQUIVALENT.read_text())
    reasons = {(one["file"], one["change"]): one["reason"] for one in table}
    for part in parts.values():
        for mutant in part["mutants"]:
            reason = reasons.get((mutant["file"], mutant["change"].partition(": ")[2]))
            mutant.pop("equivalent", None)
            if reason and mutant["outcome"] == "survived":
                mutant["equivalent"] = reason
    scored = {name: {"part": name, **_counts(part["mutants"]), **_rest(part)} for name, part in parts.items()}
    return {**_counts([mutant for part in parts.values() for mutant in part["mutants"]]), "parts": scored}


def _rest(part: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in part.items() if name not in _counts([])}


def _counts(mutants: list[dict[str, Any]]) -> dict[str, Any]:
    outcomes = Counter(mutant["outcome"] for mutant in mutants)
    equivalent = sum("equivalent" in mutant for mutant in mutants)
    killed = outcomes["killed"] + outcomes["timeout"]
    return {
        "planted": len(mutants),
        "killed": killed,
        "of_these_by_timeout": outcomes["timeout"],
        "survived": outcomes["survived"],
        "equivalent": equivalent,
        "score": round(killed / max(len(mutants), 1), 4),
        "score_without_equivalent": round(killed / max(len(mutants) - equivalent, 1), 4),
    }


if __name__ == "__main__":
    main()
