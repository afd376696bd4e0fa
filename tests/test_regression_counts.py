"""Measuring costs no ten times what it did: operations, allocations, calls, bytes read and imports, never seconds."""

import json
import subprocess
import sys

import numpy as np
import pytest

from attnlens.checkpoints import base
from attnlens.checkpoints.files import SafetensorsFile
from attnlens.circuits import FactoredProduct, WholeProduct
from attnlens.cli.app import COMMANDS
from attnlens.models import opened
from attnlens.models.open import EMBEDDED, open_model
from benchmarks import counts

EXPECTED = json.loads(counts.RESULTS.read_text())["counts"]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="bytes read are counted by Linux alone")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("counts") / "vit_base.safetensors"
    counts.write_checkpoint(path)
    return path


@pytest.fixture(scope="module")
def found(checkpoint):
    heads = {name: getattr(counts, name)() for name in ("head_flops", "sum_flops", "head_bytes")}
    return heads | counts.inspection_counts(checkpoint)


def test_no_count_is_ten_times_what_it_was(found):
    assert found.keys() == EXPECTED.keys() - {"help_modules"}
    assert counts.exceeded(found, EXPECTED) == {}


def test_no_count_has_fallen_to_a_tenth_as_one_that_counts_nothing_would(found):
    assert {name: value for name, value in found.items() if value * counts.FACTOR <= EXPECTED[name]} == {}


def test_help_imports_neither_torch_nor_timm_nor_ten_times_the_modules():
    modules = counts.help_modules()
    roots = {name.partition(".")[0] for name in modules}
    assert not roots & {"torch", "timm", "transformers", "matplotlib", "scipy", "sklearn", "huggingface_hub"}
    assert counts.exceeded({"help_modules": len(modules)}, EXPECTED) == {}


def dense(product):
    return np.matmul(product.A, np.swapaxes(product.B, -1, -2))


def test_operations_of_known_size_are_counted():
    operations = counts.Operations()
    with operations.counting():
        A, B = operations.array(np.ones((3, 5, 7))), operations.array(np.ones((3, 7, 2)))
        operations.array(np.asarray(A)) @ B
        np.matmul(A, B)
        assert operations.flops == 2 * (2 * 3 * 5 * 7 * 2)
        np.einsum("...ij,...jk->...ik", A, B)
        assert operations.flops == 3 * (2 * 3 * 5 * 7 * 2)
        np.asarray(A[0]) * 2.0
        assert operations.flops == 3 * (2 * 3 * 5 * 7 * 2) + 5 * 7
        np.linalg.svd(A, compute_uv=False)
        assert operations.flops == 3 * (2 * 3 * 5 * 7 * 2) + 5 * 7 + 4 * 3 * 7 * 5 * 5
    operations.array(A) @ B
    assert np.matmul is counts.MATMUL


def test_a_dense_spectrum_is_caught(monkeypatch):
    def spectrum(product):
        return np.linalg.svd(dense(product), compute_uv=False)[..., : product.rank_bound]

    monkeypatch.setattr(FactoredProduct, "singular_values", spectrum)
    planted = {"head_flops": counts.head_flops(), "head_bytes": counts.head_bytes()}
    assert counts.exceeded(planted, EXPECTED).keys() == {"head_flops", "head_bytes"}


def test_dense_eigenvalues_are_caught(monkeypatch):
    monkeypatch.setattr(FactoredProduct, "eigenvalues", lambda product: np.linalg.eigvals(dense(product)))
    assert "head_flops" in counts.exceeded({"head_flops": counts.head_flops()}, EXPECTED)


def test_eigenvectors_of_every_sum_are_caught(monkeypatch):
    monkeypatch.setattr(WholeProduct, "spectral_norm", lambda product: abs(np.linalg.eig(product.A)[0][0]))
    assert "sum_flops" in counts.exceeded({"sum_flops": counts.sum_flops()}, EXPECTED)


def test_a_file_hashed_again_for_every_layer_is_caught(checkpoint, monkeypatch):
    plain = opened.read_heads

    def hashing(spec, file, layer):
        base.HASHES.clear()
        file.provenance()
        return plain(spec, file, layer)

    monkeypatch.setattr(opened, "read_heads", hashing)
    assert "file_bytes" in counts.exceeded(counts.inspection_counts(checkpoint), EXPECTED)


def test_a_layer_read_again_for_every_head_is_caught(checkpoint, monkeypatch):
    plain = opened.read_heads

    def again(spec, file, layer):
        weights = plain(spec, file, layer)
        for _ in range(weights.num_heads):
            plain(spec, file, layer)
        return weights

    monkeypatch.setattr(opened, "read_heads", again)
    assert "tensor_bytes" in counts.exceeded(counts.inspection_counts(checkpoint), EXPECTED)


def test_a_walk_over_rows_is_caught(checkpoint, monkeypatch):
    plain = SafetensorsFile.__getitem__

    def same(row):
        return row

    def by_row(file, name):
        return np.stack([same(row) for row in plain(file, name)])

    monkeypatch.setattr(SafetensorsFile, "__getitem__", by_row)
    assert "python_calls" in counts.exceeded(counts.inspection_counts(checkpoint), EXPECTED)


WATCHED = """
import hashlib, json, sys
from collections import Counter
from attnlens.cli.app import COMMANDS
from attnlens.models import opened
from attnlens.models.open import EMBEDDED, open_model
reads, hashed = Counter(), []
read, digest = opened.read_heads, hashlib.file_digest
def reading(spec, tensors, layer=0):
    reads[layer] += 1
    return read(spec, tensors, layer)
def hashing(file, *rest):
    hashed.append(str(file.name))
    return digest(file, *rest)
opened.read_heads, hashlib.file_digest = reading, hashing
from attnlens.cli import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
files = sum(name.endswith(".safetensors") for name in hashed)
found = {"reads": sorted(set(reads.values())), "layers": len(reads), "hashes": files}
print(json.dumps({**found, "modules": [*sys.modules]}))
"""
HEAVY = {"torch", "timm", "transformers", "sklearn", "pandas", "huggingface_hub", "scipy", "jinja2", "sympy"}
SLOW_PARTS = {"scipy.optimize", "scipy.sparse", "scipy.stats", "scipy.integrate"}


def watched(folder, *words):
    """Run a command in a process of its own; return its reads of each layer, hashes of weights, and modules."""
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, *words], cwd=folder, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("words", "reads", "modules"),
    [
        (("inspect",), 1, set()),
        (("inspect", "--fold", "all"), 1, set()),
        (("fit-params",), 1, {"scipy"}),
        (("report",), 2, {"scipy", "jinja2"}),
        (("compose",), 2, set()),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_command_reads_each_layer_no_more_than_once_for_each_thing_it_measures(tmp_path, words, reads, modules):
    open_model(None, None)  # describes the shipped ViT, where no description is shipped
    found = watched(tmp_path, *words)
    assert (max(found["reads"]), found["layers"], found["hashes"]) == (reads, 6, 1)
    roots = {name.partition(".")[0] for name in found["modules"]}
    assert roots & HEAVY == modules
    assert SLOW_PARTS.isdisjoint(found["modules"])
    assert ("matplotlib" in roots) == (words != ("report",))  # its figures are drawn where it is read


def test_a_command_of_two_models_reads_each_once(tmp_path):
    folder = str(EMBEDDED)
    found = watched(tmp_path, "compare", folder, folder)
    assert (found["reads"], found["hashes"]) == ([2], 1)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_imports_nothing_that_it_works_with(command):
    code = counts.HELP.replace('"attnlens", "--help"', f'"attnlens", {command!r}, "--help"')
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    roots = {name.partition(".")[0] for name in json.loads(done.stdout.splitlines()[-1])}
    assert roots.isdisjoint(HEAVY | {"numpy", "matplotlib", "pydantic", "rich"})
