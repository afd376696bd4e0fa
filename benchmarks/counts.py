"""What measuring costs, in counts that do not depend on the machine's speed.

    python -m benchmarks.counts

Writes benchmarks/results/counts.json, which tests/test_regression_counts.py compares with: ten times as much fails.

- head_flops, sum_flops: floating-point operations that fit the QK circuits of four ViT-B heads, and the summed OV of a
  ViT-S layer, counted from the shapes given to numpy (`Operations`);
- head_bytes: peak of allocations (tracemalloc, which numpy reports to) while those heads are fitted;
- python_calls: calls of Python functions while a random ViT-B-shaped file is inspected by one worker, both folds;
- file_bytes, tensor_bytes: bytes read by read calls in that inspection (the hash of the file, mostly), and bytes of the
  tensors it took from the file's memory map;
- help_modules: modules that `attnlens --help` imports.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from types import FrameType
from typing import Any
from unittest.mock import patch

import numpy as np

from attnlens import inspect
from attnlens.atomic import write_text_atomic
from attnlens.checkpoints import base
from attnlens.checkpoints.files import SafetensorsFile
from attnlens.circuits import FactoredProduct, layer_ov
from attnlens.heads import HeadWeights
from attnlens.models.described import describe_architecture
from attnlens.provenance import run_provenance
from attnlens.statistics.diagonal import fit_diagonal

RESULTS = Path(__file__).parent / "results" / "counts.json"
FACTOR = 10
"""How many times as much fails."""
ARCHITECTURE = "vit_base_patch16_224"


def _cubic(leading: float) -> Callable[..., float]:
    """Return the count ``leading * m * n^2`` of a factorisation of matrices ``[..., m, n]``, n the smaller side."""

    def count(matrix: Any, *_: Any, **__: Any) -> float:
        small, large = sorted(matrix.shape[-2:])
        return leading * prod(matrix.shape[:-2]) * small**2 * large

    return count


MATMUL = np.matmul
"""The ufunc itself: `Operations.counting` puts another function in its place."""
LINALG: dict[str, Callable[..., float]] = {
    "cholesky": _cubic(1 / 3),
    "qr": _cubic(2),
    "svd": _cubic(4),
    "svdvals": _cubic(4),
    "eigvals": _cubic(10),
    "eig": _cubic(25),
    "eigvalsh": _cubic(4 / 3),
    "eigh": _cubic(9),
    "inv": _cubic(2),
    "pinv": _cubic(8),
    "matrix_rank": _cubic(4),
}
"""Leading terms (Golub & Van Loan, Matrix Computations, 4th ed.); a singular value decomposition counts 4 m n^2."""


class Operations:
    """Counts floating-point operations of numpy by shape: `numpy.linalg`, products, and element-wise functions."""

    def __init__(self) -> None:
        self.flops = 0.0

    @contextmanager
    def counting(self) -> Iterator[Operations]:
        """Count what is done in the block; arrays that take part must come from `array`, or from numpy functions."""
        with (
            patch.multiple(np.linalg, **{name: self._linalg(name) for name in LINALG}),
            patch.multiple(np, matmul=self._matmul(np.matmul), einsum=self._einsum(np.einsum)),
            patch.multiple(np, **{name: self._copying(name) for name in ("asarray", "ascontiguousarray")}),
        ):
            yield self

    def array(self, values: Any) -> Any:
        """Return a view of ``values`` whose operators (``@`` and ``*``, say) are counted too."""
        counted = np.asanyarray(values).view(_Counted)
        counted.operations = self
        return counted

    def _linalg(self, name: str) -> Callable[..., Any]:
        plain = getattr(np.linalg, name)

        def run(matrix: Any, *args: Any, **kwargs: Any) -> Any:
            self.flops += LINALG[name](matrix)
            return self._wrapped(plain(uncounted(matrix), *args, **kwargs))

        return run

    def _copying(self, name: str) -> Callable[..., Any]:
        plain = getattr(np, name)

        def run(values: Any, *args: Any, **kwargs: Any) -> Any:
            found = plain(values, *args, **kwargs)
            return self.array(found) if isinstance(values, _Counted) else found

        return run

    def _matmul(self, plain: Any) -> Callable[..., Any]:
        def run(left: Any, right: Any) -> Any:
            self.flops += product_flops(left, right)
            return self._wrapped(plain(uncounted(left), uncounted(right)))

        return run

    def _einsum(self, plain: Any) -> Callable[..., Any]:
        def run(subscripts: str, *operands: Any) -> Any:
            letters = subscripts.partition("->")[0].replace("...", "").split(",")
            sizes = {
                letter: size
                for word, operand in zip(letters, operands, strict=True)
                for letter, size in zip(reversed(word), reversed(operand.shape), strict=False)
            }
            batch = max(
                prod(operand.shape[: operand.ndim - len(word)]) for word, operand in zip(letters, operands, strict=True)
            )
            self.flops += 2 * batch * prod(sizes.values())
            return self._wrapped(plain(subscripts, *map(uncounted, operands)))

        return run

    def _wrapped(self, found: Any) -> Any:
        if isinstance(found, tuple):  # named tuples of numpy.linalg lose their names here
            return tuple(self.array(part) for part in found)
        return self.array(found)


class _Counted(np.ndarray):
    """An array that reports its ufuncs to `Operations`."""

    operations: Operations

    def __array_finalize__(self, source: Any) -> None:
        operations = getattr(source, "operations", None)
        if operations is not None:
            self.operations = operations

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        plain = [uncounted(value) for value in inputs]
        if "out" in kwargs:
            kwargs["out"] = tuple(uncounted(value) for value in kwargs["out"])
        found = getattr(ufunc, method)(*plain, **kwargs)
        if ufunc is MATMUL:
            self.operations.flops += product_flops(*plain[:2])
        else:
            self.operations.flops += max(np.size(found), *(np.size(value) for value in plain))
        return self.operations.array(found) if isinstance(found, np.ndarray) else found


def uncounted(values: Any) -> Any:
    """Return a counted array as a plain one, anything else as it is."""
    return values.view(np.ndarray) if isinstance(values, _Counted) else values


def product_flops(left: Any, right: Any) -> float:
    """Return 2 m n k of a matrix product, times the stack's length."""
    columns = right.shape[-1] if right.ndim > 1 else 1
    batch = prod(np.broadcast_shapes(left.shape[:-2], right.shape[:-2]))
    return 2.0 * batch * prod(left.shape[-2:]) * columns


def factors(heads: int = 4, embed_dim: int = 768, head_dim: int = 64) -> tuple[Any, Any]:
    """Return random query and key matrices, ``[head, embed_dim, head_dim]``."""
    shape = (heads, embed_dim, head_dim)
    return tuple(np.random.default_rng(seed).standard_normal(shape) / embed_dim**0.5 for seed in (0, 1))  # type: ignore[return-value]


def fit_heads(A: Any, B: Any) -> None:
    """Fit a stack of circuits as `inspect` does."""
    product = FactoredProduct(A, B)
    fit_diagonal(product, product.singular_values())


def head_flops() -> int:
    operations = Operations()
    with operations.counting():
        fit_heads(*map(operations.array, factors()))
    return round(operations.flops)


def sum_flops() -> int:
    values, outputs = factors(6, 384, 64)
    operations = Operations()
    with operations.counting():
        W_V, W_O = operations.array(values), operations.array(np.swapaxes(outputs, 1, 2))
        fit_diagonal(layer_ov(HeadWeights(layer=0, name="sum", W_Q=W_V, W_K=W_V, W_V=W_V, W_O=W_O)), None)
    return round(operations.flops)


def head_bytes() -> int:
    A, B = factors()
    fit_heads(A[:, :8, :2], B[:, :8, :2])  # what is allocated once stays out of the count
    tracemalloc.start()
    try:
        fit_heads(A, B)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def write_checkpoint(path: Path) -> None:
    """Write random float16 attention weights of a ViT-B."""
    from safetensors.numpy import save_file

    rng = np.random.default_rng(0)
    shapes = describe_architecture(ARCHITECTURE).shapes
    save_file({name: rng.random(shape, np.float32).astype(np.float16) - 0.5 for name, shape in shapes.items()}, path)


@contextmanager
def tensors_taken() -> Iterator[list[int]]:
    """Collect the bytes of each tensor that is taken from a safetensors file."""
    taken: list[int] = []
    plain = SafetensorsFile.__getitem__

    def reading(file: SafetensorsFile, name: str) -> Any:
        found = plain(file, name)
        taken.append(found.nbytes)
        return found

    with patch.object(SafetensorsFile, "__getitem__", reading):
        yield taken


def read_so_far() -> int:
    """Return the bytes this process has asked the operating system to read (Linux)."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(lines[0].partition(":")[2])


@contextmanager
def calls_counted() -> Iterator[list[int]]:
    """Count calls of Python functions in this thread and in those begun in the block, waiting in threads apart."""
    calls = [0]

    def watch(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and not frame.f_code.co_filename.endswith(("threading.py", "_base.py", "thread.py")):
            calls[0] += 1

    threading.setprofile(watch)
    sys.setprofile(watch)
    try:
        yield calls
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


def inspection_counts(path: Path) -> dict[str, int]:
    """Return the counts of one inspection of a ViT-B file, after one that loads what is loaded once."""
    with patch("attnlens.threads.WORKERS", 1):
        inspect(ARCHITECTURE, path, layers=[0])
        base.HASHES.clear()  # what a fresh process does not know
        before = read_so_far()
        with tensors_taken() as taken, calls_counted() as calls:
            inspect(ARCHITECTURE, path)
    return {"python_calls": calls[0], "file_bytes": read_so_far() - before, "tensor_bytes": sum(taken)}


HELP = """
import json, sys
before = set(sys.modules)
from attnlens.cli import main
sys.argv = ["attnlens", "--help"]
try:
    main()
except SystemExit:
    pass
print(json.dumps(sorted(set(sys.modules) - before)))
"""


def help_modules() -> list[str]:
    """Return the modules that `attnlens --help` imports."""
    done = subprocess.run([sys.executable, "-c", HELP], check=True, capture_output=True, text=True)
    return list(json.loads(done.stdout.splitlines()[-1]))


def counts() -> dict[str, int]:
    """Return every count."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vit_base.safetensors"
        write_checkpoint(path)
        found = {"head_flops": head_flops(), "sum_flops": sum_flops(), "head_bytes": head_bytes()}
        return {**found, **inspection_counts(path), "help_modules": len(help_modules())}


def exceeded(found: dict[str, int], expected: dict[str, int]) -> dict[str, float]:
    """Return the counts that are at least `FACTOR` times what is expected, as multiples of it."""
    times = {name: value / expected[name] for name, value in found.items()}
    return {name: value for name, value in times.items() if value >= FACTOR}


def main() -> None:
    result = {"command": "python -m benchmarks.counts", **run_provenance(), "counts": counts()}
    write_text_atomic(RESULTS, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
