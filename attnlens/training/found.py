"""What `train_compare` returns: tables of runs, arms and contrasts, the report, and where it all is kept."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from attnlens.drawn import Drawn
from attnlens.statistics.preview import shown_rows
from attnlens.statistics.table import StatsTable, Tabular
from attnlens.training.drawings import comparison_drawings
from attnlens.training.results import Summary
from attnlens.training.source import Source
from attnlens.training.stop import Reason
from attnlens.words import counted

if TYPE_CHECKING:
    from attnlens.figures.drawings import Drawing


@dataclass(frozen=True, repr=False)
class TrainComparison(Drawn, Tabular):
    """What `train_compare` found in the runs that have ended, and why it stopped, if it did.

    Its rows are those of ``summary``: one an arm.
    """

    folder: Path
    findings: Summary
    report: str
    """The text of ``report.md``."""
    stopped: Reason
    source: Source = field(repr=False, compare=False)
    """What the arms start from."""

    @property
    def runs(self) -> StatsTable:
        """A row a run: arm, seed, learning rate, whether it finished, its last epoch and score."""
        return self.findings.run_table()

    @property
    def summary(self) -> StatsTable:
        """A row an arm, as in ``summary.csv``: mean score with its interval, and what it is minus the default's."""
        return self.findings.arm_table()

    @property
    def contrasts(self) -> StatsTable:
        """A row a declared contrast: the paired difference, its interval and p-values."""
        return self.findings.contrast_table()

    def _drawings(self) -> dict[str, Drawing]:
        """Return what draws ``curves``, and where they were measured ``structure`` and ``waterfall``."""
        return comparison_drawings(self.findings, self.source)

    def _table(self) -> StatsTable:
        return self.summary

    def _headline(self) -> str:
        config = self.findings.config
        return (
            f"TrainComparison of {', '.join(config.arms)} on {config.dataset}: {len(self.runs)} of "
            f"{counted(self.findings.expected, 'run')} ended, in {self.folder}"
        )

    def _repr_html_(self) -> str:
        """Return what a notebook shows: a row an arm, and the curves of every run."""
        from attnlens.figures.notebook import fragment

        return fragment(
            lambda: self.figure("curves"),
            title=self._headline(),
            note="mean of each arm's runs with its 95% interval; minus_default: the difference, paired by seed",
            head=self.summary.columns,
            rows=shown_rows(self.summary.rows),
            about=("config", self.findings.to_json()["config"]),
        )
