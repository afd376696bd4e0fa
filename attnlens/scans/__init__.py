"""Inspecting hundreds of models: patterns -> jobs -> a result file each -> table and landscape.

`plan` turns patterns into jobs, `worker` measures one through `inspect`, `local` and `cluster` are the two places
it runs at, `run` hands jobs out and tries again where a worker is lost, `store` keeps one result a model so that a
scan that was stopped goes on, `tables` makes the tables.
"""

from attnlens.scans.run import Scan, scan

__all__ = ["Scan", "scan"]
