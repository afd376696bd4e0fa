"""What a result file of a scan may hold, checked before it is believed."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from attnlens.printable import one_line
from attnlens.scans.tables import Result
from attnlens.scans.worker import group_of

_Count = Annotated[int, Field(ge=0, lt=1 << 31, strict=True)]
_Word = Annotated[str, Field(pattern=r"^[\w.+-]{1,200}$")]
_Span = Annotated[str, Field(pattern=r"^\d{1,9}(-\d{1,9})?$")]
_Fold = Literal["raw", "effective", "centred", "balanced"]
_Number = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=-1e100, le=1e100)] | None
_Depth = Annotated[float, Field(ge=0, le=1, strict=True)]
_Row = tuple[_Count, _Depth, Literal["qk", "ov"], _Fold, _Number, _Number, _Number, _Number, _Number]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True)


class _Identity(_Part):
    schema_: Annotated[Literal["attnlens.scan"], Field(alias="schema")]
    schema_version: int
    name: str
    model: str
    checkpoint: str | None
    stamp: str | None
    fold: str
    num_heads: int | None = None
    row_order: str | None = None


class _Failed(_Identity):
    status: Literal["failed"]
    error: str


class _Measured(_Identity):
    status: Literal["ok"]
    architecture: _Word
    group: _Word
    depth: Annotated[int, Field(ge=1, lt=1 << 31)]
    layers: _Count
    heads: _Span
    head_dim: _Span
    folds: Annotated[list[_Fold], Field(min_length=1)]
    leaves_out: Annotated[str, Field(pattern=r"^[\w ]*$")]
    labels: list[str] = Field(default_factory=list)
    refused: _Count
    seconds: Annotated[float, Field(ge=0)]
    provenance: dict[str, Any]
    table: Annotated[list[list[Any]], Field(min_length=1)]
    csv_sha256: str


_Result = TypeAdapter(Annotated[_Failed | _Measured, Field(discriminator="status")])
_Rows = TypeAdapter(list[_Row])


def check_result(data: Any) -> Result:
    """Return what `worker.measure` found, as it is. Raises `ValueError` for anything else."""
    found = _Result.validate_python(data)
    if isinstance(found, _Failed):
        return {**data, "error": one_line(found.error)}
    data = {**data, "labels": [one_line(label) for label in found.labels]}
    rows = _Rows.validate_python(found.table)
    if len({(layer, circuit, fold) for layer, _, circuit, fold, *_ in rows}) < len(rows):
        raise ValueError("table: a layer has two rows of one circuit and fold")
    if {row[3] for row in rows} != set(found.folds) or any(row[0] >= found.depth for row in rows):
        raise ValueError("table: its rows are of other folds or layers than the model has")
    return {**data, "group": group_of(found.architecture)}
