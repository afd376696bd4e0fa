"""alpha and beta of every layer of a network in training, by the code `attnlens inspect` measures with."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from attnlens.circuits import Fold, layer_ov, qk_circuit
from attnlens.layouts import AttentionSpec, read_heads
from attnlens.layouts.read_write import LARGEST
from attnlens.statistics.diagonal import fit_alpha_beta

if TYPE_CHECKING:
    from attnlens.training.source import Source

FOLDS: tuple[Fold, ...] = ("raw", "effective")
Structure = dict[str, dict[str, list[float]]]


def measure_structure(specs: Sequence[tuple[int, AttentionSpec]], tensors: Mapping[str, Any]) -> Structure:
    """Return, by fold, a value a layer of ``qk_alpha``, ``qk_beta`` (mean over heads), ``ov_alpha``, ``ov_beta`` (sum).

    A layer without a known preceding norm, or without an output projection, is left out.
    """
    fits: Structure = {fold: {"qk_alpha": [], "qk_beta": [], "ov_alpha": [], "ov_beta": []} for fold in FOLDS}
    for layer, spec in specs:
        weights = read_heads(spec, tensors, layer)
        if weights.W_O is None or "norm_unknown" in weights.leaves_out:
            continue
        for fold in FOLDS:
            qk, ov = fit_alpha_beta(qk_circuit(weights, fold)), fit_alpha_beta(layer_ov(weights, fold))
            for name, value in (
                ("qk_alpha", qk.alpha.mean()),
                ("qk_beta", qk.beta.mean()),
                ("ov_alpha", ov.alpha),
                ("ov_beta", ov.beta),
            ):
                fits[fold][name].append(float(f"{float(value):.6g}"))
    return fits


def structure_of(specs: Sequence[tuple[int, AttentionSpec]], tensors: Mapping[str, Any]) -> Structure | None:
    """Return what `measure_structure` does; None for a run that diverged: NaN, infinite or beyond all size."""
    read = {name for _, spec in specs for name in spec.tensors()}
    measurable = all(bool(np.abs(tensors[name]).max(initial=0) <= LARGEST) for name in read)
    return measure_structure(specs, tensors) if measurable else None


def structure_line(run: str, epoch: float, structure: Structure) -> str:
    """Return a line of ``structure.jsonl``: a run, an epoch (0: before training), and what was measured after it."""
    return json.dumps({"run": run, "epoch": epoch, "structure": structure}) + "\n"


def structure_lines(records: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Return the content of ``structure.jsonl`` for runs by name: a line an evaluation, tuning left out."""
    return "".join(
        structure_line(name, record["epoch"], record["structure"])
        for name, lines in sorted(records.items())
        for record in lines
        if record.get("structure") and not record["tuning"]
    )


def source_structure(source: Source) -> Structure | None:
    """Measure the pre-trained model itself, where there is one."""
    if source.opened is None:
        return None
    return measure_structure(source.opened.architecture.indexed(), source.opened.checkpoint)
