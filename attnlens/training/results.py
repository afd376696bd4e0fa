"""From records to a summary: scores by arm and seed, checked pairing, every statistic, tables and JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from attnlens.errors import AttnlensError
from attnlens.statistics.table import StatsTable, Value
from attnlens.training.arms import BASELINE, PRETRAINED
from attnlens.training.config import Config
from attnlens.training.metrics import Metric
from attnlens.training.statistics import (
    SCREENING_BELOW,
    Contrast,
    EpochsTo,
    GapClosed,
    Mean,
    contrasts,
    epochs_to,
    gap_closed,
)
from attnlens.training.store import Record

Curve = list[tuple[float, float]]


def columns(metric: Metric) -> tuple[str, ...]:
    """Return the columns of ``summary.csv``: accuracies are shares of 1."""
    return (
        *("arm", "n", metric.field, "sd", "low", "high", "lr"),
        *("minus_default", "minus_default_low", "minus_default_high", "t_holm", "sign_flip_p"),
        *("gap_closed", "gap_closed_low", "gap_closed_high", "epochs_to", "reached", "diverged"),
    )


class PairingError(AttnlensError):
    """Two arms of a seed did not see the same stream of data: their difference means nothing."""


@dataclass(frozen=True)
class Summary:
    """Everything a comparison found, in the order of its arms."""

    config: Config
    expected: int
    finished: dict[str, dict[int, float]]
    """Final value of the metric by arm and seed."""
    diverged: tuple[tuple[str, int, int], ...]
    """(arm, seed, epoch) of runs whose loss stopped being a number."""
    curves: dict[str, dict[int, Curve]]
    structure: dict[str, dict[int, list[tuple[int, dict[str, Any]]]]]
    lrs: dict[str, float]
    means: dict[str, Mean]
    contrasts: tuple[Contrast, ...]
    gaps: tuple[GapClosed, ...]
    epochs: tuple[EpochsTo, ...]
    streams: dict[int, int]
    """By seed, the number of runs whose hashes of order and augmentation were found equal in every epoch."""
    stacks: tuple[int, ...]
    """Sizes of the stacks that were trained, smallest first."""
    train_seconds: float
    devices: tuple[str, ...]
    versions: dict[str, str]
    commands: tuple[str, ...]

    @property
    def complete(self) -> bool:
        """Whether every run has ended."""
        return sum(map(len, self.finished.values())) + len(self.diverged) == self.expected

    @property
    def screening(self) -> bool:
        """Whether any contrast rests on fewer than six seeds."""
        return min((c.difference.n for c in self.contrasts), default=0) < SCREENING_BELOW

    def to_json(self) -> dict[str, Any]:
        """Return JSON-ready data; what is not a number is null."""
        data = {
            "schema": "attnlens.train-compare",
            "schema_version": 2,
            "metric": self.config.metric.field,
            "lower_is_better": self.config.metric.lower_is_better,
            "config": json.loads(self.config.model_dump_json()),
            "config_sha256": self.config.sha256(),
            "complete": self.complete,
            "screening": self.screening,
            "arms": {
                arm: {
                    self.config.metric.field: asdict(mean),
                    "by_seed": self.finished.get(arm, {}),
                    "lr": self.lrs.get(arm),
                    "epochs_to": {"target": epochs.target, "median": epochs.median, "by_seed": epochs.by_seed},
                }
                for (arm, mean), epochs in zip(self.means.items(), self.epochs, strict=True)
            },
            "contrasts": [asdict(contrast) for contrast in self.contrasts],
            "gap_closed": [asdict(gap) for gap in self.gaps],
            "diverged": [{"arm": arm, "seed": seed, "epoch": epoch} for arm, seed, epoch in self.diverged],
            "paired_runs_by_seed": self.streams,
            "models_in_stack": list(self.stacks),
            "train_seconds": self.train_seconds,
            "devices": list(self.devices),
            "versions": self.versions,
            "commands": list(self.commands),
        }
        return finite(data)

    def arm_table(self) -> StatsTable:
        """Return a row an arm: its mean, its contrast with the default, gap closed and epochs to the target."""
        against = {c.arm: c for c in self.contrasts if c.other == BASELINE}
        gaps = {gap.arm: gap for gap in self.gaps}
        rows = []
        for (arm, mean), epochs in zip(self.means.items(), self.epochs, strict=True):
            row: list[Any] = [arm, mean.n, mean.mean, mean.sd, mean.low, mean.high, self.lrs.get(arm)]
            contrast, gap = against.get(arm), gaps.get(arm)
            if contrast is None:
                row += [None] * 5
            else:
                difference = contrast.difference
                row += [difference.mean, difference.low, difference.high, contrast.t_holm, contrast.sign_flip_p]
            row += [gap.share, gap.low, gap.high] if gap is not None else [None] * 3
            row += [epochs.median, epochs.reached, sum(name == arm for name, _, _ in self.diverged)]
            rows.append(row)
        return _table(columns(self.config.metric), rows)

    def contrast_table(self) -> StatsTable:
        """Return a row a declared contrast: arm minus other arm, over the seeds both finished."""
        names = ("arm", "other", "n", "difference", "low", "high", "t_p", "t_holm", "sign_flip_p", "sign_flip_holm")
        rows = []
        for one in self.contrasts:
            pairs = one.difference
            values = [one.t_p, one.t_holm, one.sign_flip_p, one.sign_flip_holm]
            rows.append([one.arm, one.other, pairs.n, pairs.mean, pairs.low, pairs.high, *values])
        return _table(names, rows)

    def run_table(self) -> StatsTable:
        """Return a row a run that has ended: its last epoch and score; a run that diverged has none."""
        epochs = self.config.recipe.epochs
        rows = [
            [arm, seed, self.lrs[arm], "finished", epochs, score]
            for arm, scores in self.finished.items()
            for seed, score in scores.items()
        ]
        rows += [[arm, seed, self.lrs[arm], "diverged", epoch, None] for arm, seed, epoch in self.diverged]
        order = list(self.finished)
        rows.sort(key=lambda row: (order.index(str(row[0])), row[1]))
        return _table(("arm", "seed", "lr", "status", "epoch", self.config.metric.field), rows)

    def to_csv(self) -> str:
        """Return `arm_table` as CSV."""
        return self.arm_table().to_csv()


def summarise(config: Config, records: Mapping[str, Sequence[Record]]) -> Summary:
    """Summarise the runs of a comparison, by name. Raises `PairingError` where two arms' streams differ."""
    runs = [list(lines) for lines in records.values() if lines and not lines[0]["tuning"]]
    finished: dict[str, dict[int, float]] = {arm: {} for arm in config.arms}
    curves: dict[str, dict[int, Curve]] = {arm: {} for arm in config.arms}
    structure: dict[str, dict[int, list[tuple[int, dict[str, Any]]]]] = {arm: {} for arm in config.arms}
    diverged, lrs = [], {}
    for lines in runs:
        arm, seed, last = lines[0]["arm"], lines[0]["seed"], lines[-1]
        measured = [line for line in lines if line["status"] != "diverged"]
        curves[arm][seed] = [(line["epoch"], line[config.metric.field]) for line in measured]
        structure[arm][seed] = [(line["epoch"], line["structure"]) for line in measured]
        lrs[arm] = lines[0]["lr"]
        if last["status"] == "finished":
            finished[arm][seed] = last[config.metric.field]
        elif last["status"] == "diverged":
            diverged.append((arm, seed, last["epoch"]))
    gaps = [arm for arm in config.arms if arm not in (BASELINE, PRETRAINED)]
    with_gap = {BASELINE, PRETRAINED} <= set(config.arms)
    provenance = [lines[-1]["provenance"] for lines in runs]
    return Summary(
        config=config,
        expected=len(config.arms) * config.seeds,
        finished=finished,
        diverged=tuple(sorted(diverged)),
        curves=curves,
        structure=structure,
        lrs=lrs,
        means={arm: Mean.of(list(values.values())) for arm, values in finished.items()},
        contrasts=tuple(contrasts(finished, config.contrasts)),
        gaps=tuple(
            gap_closed(finished, arm, baseline=BASELINE, pretrained=PRETRAINED, metric=config.metric)
            for arm in gaps
            if with_gap
        ),
        epochs=tuple(
            epochs_to(arm, config.target, {seed: curves[arm][seed] for seed in finished[arm]}, config.metric)
            for arm in config.arms
        ),
        streams=check_pairing(runs),
        stacks=tuple(sorted({lines[-1]["models_in_stack"] for lines in runs})),
        train_seconds=sum(lines[-1]["train_seconds"] / lines[-1]["models_in_stack"] for lines in runs),
        devices=tuple(dict.fromkeys(p["device"] for p in provenance)),
        versions=provenance[-1]["versions"] if provenance else {},
        commands=tuple(dict.fromkeys(p["command"] for p in provenance)),
    )


def check_pairing(runs: Sequence[Sequence[Record]]) -> dict[int, int]:
    """Compare the hashes of all runs of a seed, epoch by epoch, and count the runs. Raises `PairingError`."""
    seen: dict[int, list[tuple[str, list[str]]]] = {}
    for lines in runs:
        hashes = [value for line in lines for value in line["streams"]]
        seen.setdefault(lines[0]["seed"], []).append((lines[0]["arm"], hashes))
    for seed, arms in seen.items():
        longest_arm, longest = max(arms, key=lambda item: len(item[1]))
        for arm, hashes in arms:
            if hashes != longest[: len(hashes)]:
                raise PairingError(
                    f"seed {seed}: {arm} and {longest_arm} were trained on different streams of data; delete the "
                    "runs/ of that seed and train them again with --resume"
                )
    return {seed: len(arms) for seed, arms in sorted(seen.items())}


def results_lines(config: Config, records: Mapping[str, Sequence[Record]]) -> str:
    """Return the content of ``results.jsonl``: a line an evaluation, each with everything it depends on."""
    common = {
        "config_sha256": config.sha256(),
        "dataset": config.dataset,
        "data_sha256": config.data_sha256,
        "recipe": json.loads(config.recipe.model_dump_json()),
    }
    lines = [
        json.dumps({**common, "run": name, **record}) for name, lines in sorted(records.items()) for record in lines
    ]
    return "".join(f"{line}\n" for line in lines)


def _table(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> StatsTable:
    """Return a table in which what is not known, or has no bound, is NaN."""

    def cell(value: Any) -> Value:
        return math.nan if value is None or _odd(value) else value

    return StatsTable(tuple(tuple(map(cell, row)) for row in rows), tuple(names))


def _odd(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def finite(data: Any) -> Any:
    """Return JSON-ready data in which what is not a number is null."""
    if isinstance(data, dict):
        return {str(key): finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [finite(value) for value in data]
    return None if _odd(data) else data
