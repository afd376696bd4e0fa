"""What `train_compare` returns: tables of runs, arms and contrasts, the report, and where it all is kept."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from attnlens.statistics.preview import shown_rows
from attnlens.statistics.table import StatsTable, Tabular
from attnlens.training.results import Summary
from attnlens.training.stop import Reason
from attnlens.words import counted


@dataclass(frozen=True, repr=False)
class TrainComparison(Tabular):
    """What `train_compare` found in the runs that have ended, and why it stopped, if it did.

    Its rows are those of ``summary``: one an arm.
    """

    folder: Path
    findings: Summary
    report: str
    """The text of ``report.md``."""
    stopped: Reason

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
        from attnlens.training.figures import draw_curves

        return fragment(
            lambda: draw_curves(self.findings),
            title=self._headline(),
            note="mean of each arm's runs with its 95% interval; minus_default: the difference, paired by seed",
            head=self.summary.columns,
            rows=shown_rows(self.summary.rows),
            about=("config", self.findings.to_json()["config"]),
        )
