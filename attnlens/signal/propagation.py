"""How alike a network's tokens become by depth at its start: measured on random tokens, beside theory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from attnlens.errors import UsageError
from attnlens.heads import Array
from attnlens.memory import free_memory, in_words
from attnlens.models.architecture import MOST_MODULES
from attnlens.signal.arms import ARMS, build_arm, resolved_options
from attnlens.signal.kernels import cosines, mean_cosine
from attnlens.signal.rewire import RewireReport, with_or_without
from attnlens.statistics.table import Row, StatsTable, Tabular
from attnlens.vocabulary import Vocabulary
from attnlens.words import counted

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor, nn

    from attnlens.figures.panels import Given

COLUMNS = (
    *("arm", "seed", "layer", "cosine", "mean_square", "kernel_error"),
    *("theory_cosine", "theory_mean_square", "theory_error"),
)
"""Of a row: what was measured behind block ``layer`` (0: the input), and what theory expects; NaN where it is silent.

Means over a seed's sequences. ``cosine``: mean cosine of two different tokens of a sequence. ``mean_square`` of the
tokens' entries. ``kernel_error``: ||C - T|| / ||T|| in Frobenius norm, C the cosines of the tokens and T those of
theory; ``theory_error``: its expectation for Gaussian coordinates with cosines T, see `sampling_error`.
"""


@dataclass(frozen=True, repr=False)
class Propagation(Tabular):
    """What `propagate` measured: a table by arm, seed and layer, and what was done to each arm's network."""

    model: str
    embed_dim: int
    depth: int
    tokens: int
    causal: bool
    skips: bool
    norms: bool
    mlp: str
    seeds: int
    sequences: int
    table: StatsTable
    arms: Mapping[str, RewireReport]
    """The report of each arm's first seed."""

    def _table(self) -> StatsTable:
        return self.table

    def _headline(self) -> str:
        what = f"{counted(self.depth, 'block')}, {counted(self.seeds, 'seed')}, {counted(self.tokens, 'token')}"
        return f"Propagation through {self.model}: {', '.join(self.arms)}; {what}"

    def curve(self, arm: str, column: str) -> Array:
        """Return ``[seed, layer]`` of a column; layer 0 is the input. Raises `UsageError` for an arm that is none."""
        arm = Vocabulary("arm", tuple(self.arms))(arm)
        return self.table.select(arm=arm).column(column).reshape(self.seeds, self.depth + 1)

    def described(self) -> str:
        """Say in a sentence what was measured."""
        parts = f"{with_or_without(self.skips)} skips and {with_or_without(self.norms)} norms"
        mlp = {"keep": "MLPs as they are", "tailored": "tailored MLPs", "none": "no MLPs"}[self.mlp]
        which = "causal" if self.causal else "bidirectional"
        return (
            f"{counted(self.depth, 'block')} {parts}, {mlp}; width {self.embed_dim}, "
            f"{self.tokens} random tokens, {which}. "
            f"Mean over {counted(self.seeds, 'seed')} of {counted(self.sequences, 'sequence')}."
        )

    def figure(self, *, ax: Given | None = None, style: str | None = None, width: str | float | None = None) -> Figure:
        """Draw mean cosine of tokens and relative kernel error against depth.

        Panels ``cosine`` and, where an arm has a theory, ``error`` go into ``ax`` where it is given: see
        `Inspection.figure`; ``style`` and ``width`` are those of `attnlens.figure_style`.
        """
        from functools import partial

        from attnlens.figures.drawings import draw_one
        from attnlens.signal.figure import draw_signal

        return draw_one({"signal": partial(draw_signal, self)}, "signal", ax, style, width)

    def to_json(self) -> dict[str, Any]:
        """Return JSON-ready data; a number that is not known is null."""
        head = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in ("table", "arms")}
        arms = {arm: report.to_json() for arm, report in self.arms.items()}
        return {**head, "arms": arms, "rows": self.table.json_rows()}


def propagate(
    model: str | None = None,
    arms: Sequence[str] = ARMS,
    *,
    depth: int | None = None,
    tokens: int | None = None,
    seeds: int = 5,
    sequences: int = 4,
    skips: bool = True,
    norms: bool = True,
    mlp: str | None = None,
    eta: float = 0.2,
    options: Mapping[str, Any] | None = None,
    progress: Callable[[Iterable[Any]], Iterator[Any]] = iter,
) -> Propagation:
    """Return how alike tokens become by depth in arms at their start, a fresh network a seed, on normal tokens.

    ``model``: timm name of a plain ViT, model folder, a language model's name (``gpt-tiny``), or None for the shipped
    ViT's architecture; ``depth`` and ``tokens`` (patches of a ViT, a square; context of a language model) replace its
    own. ``arms``: an attention of `rewire_`, or an initialiser of `attnlens.initialisers` that needs no option, whose
    attention is standard. ``skips``, ``norms``, ``mlp`` and ``eta`` as in `rewire_`, for every arm; ``options`` go to
    the arms that have them. A seed gives network and tokens; everything runs in float64 on the CPU.

    Raises `UsageError` for values that are not accepted, and what `rewire_` raises.
    """
    resolved = resolved_options(arms, options or {})
    if min(seeds, sequences, 1 if depth is None else depth) < 1 or (tokens is not None and tokens < 2):
        raise UsageError("there is nothing to measure: pass at least one seed, one sequence, one block and two tokens")
    _check_room(tokens or 1, depth or 1, sequences)
    rows: list[Row] = []
    reports: dict[str, RewireReport] = {}
    theory: dict[str, list[Array] | None] = {}
    head: dict[str, Any] = {}
    rewiring: dict[str, Any] = {"skips": skips, "norms": norms, "mlp": mlp, "eta": eta}
    for arm, seed in progress([(arm, seed) for arm in resolved for seed in range(seeds)]):
        built = build_arm(model, arm, seed, depth, tokens, {**rewiring, **resolved[arm]})
        report = built.rewired.report
        if arm not in reports:
            reports[arm], theory[arm] = report, built.rewired.predicted()
            head = {"model": built.model, "embed_dim": built.embed_dim, "depth": report.depth, "tokens": report.tokens}
            head |= {"causal": report.causal, "mlp": report.mlp}
        x = random_tokens(seed, sequences, report.tokens, built.embed_dim)
        measured = measure(built.module, x, theory[arm])
        rows += [(arm, seed, layer, *values) for layer, values in enumerate(measured)]
    table = StatsTable(tuple(rows), COLUMNS)
    return Propagation(**head, skips=skips, norms=norms, seeds=seeds, sequences=sequences, table=table, arms=reports)


def _check_room(tokens: int, depth: int, sequences: int) -> None:
    """Raise `UsageError` where the kernels of every block, and scores of every sequence, have no room in memory."""
    if depth > MOST_MODULES:
        raise UsageError(f"depth {depth} is more than is built: pass at most {MOST_MODULES}")
    size, free = 8 * tokens**2 * (depth + 1 + sequences), free_memory()
    if free is not None and size > free:
        raise UsageError(
            f"{counted(tokens, 'token')} in {counted(depth, 'block')} and {counted(sequences, 'sequence')} take "
            f"{in_words(size)}, and {in_words(free)} of memory are free: pass fewer tokens"
        )


def random_tokens(seed: int, sequences: int, tokens: int, embed_dim: int) -> Tensor:
    """Draw standard normal ``[sequence, token, embed_dim]`` in float64, the same for every arm of a seed."""
    start = int(np.random.SeedSequence([seed, tokens, embed_dim]).generate_state(1)[0])
    return torch.randn(
        sequences, tokens, embed_dim, generator=torch.Generator().manual_seed(start), dtype=torch.float64
    )


def representations(module: nn.Module, x: Tensor) -> Iterator[Tensor]:
    """Yield ``[sequence, token, embed_dim]`` before the first block and after each, the input being ``x``."""
    network: Any = module
    with torch.no_grad():
        x = network.norm_pre(x)
        yield x
        for block in network.blocks:
            x = block(x)
            yield x


def measure(module: nn.Module, x: Tensor, theory: Sequence[Array] | None) -> list[tuple[float, ...]]:
    """Return by depth the numbers of `COLUMNS` from ``cosine`` on, for a network in evaluation mode."""
    records: list[tuple[float, ...]] = []
    for layer, y in enumerate(representations(module.eval(), x)):
        C = token_cosines(y).numpy()
        kernel = None if theory is None else theory[layer]
        error = alike = square = expected = math.nan
        if kernel is not None:
            T = cosines(kernel)
            error = float(np.mean([np.linalg.norm(one - T) for one in C]) / np.linalg.norm(T))
            alike, square = mean_cosine(T), float(np.diagonal(kernel).mean())
            expected = sampling_error(T, y.shape[-1])
        measured = float(np.mean([mean_cosine(one) for one in C])), float(y.square().mean())
        records.append((*measured, error, alike, square, expected))
    return records


def token_cosines(x: Tensor) -> Tensor:
    """Return ``[sequence, token, token]``, the cosine of every two tokens of ``x [sequence, token, embed_dim]``."""
    unit = x / x.norm(dim=-1, keepdim=True)
    return unit @ unit.mT


def sampling_error(cosine: Array, embed_dim: int) -> float:
    """Return the relative Frobenius error expected of cosines of tokens with ``embed_dim`` Gaussian coordinates.

        sqrt(sum_ij (1 - T_ij^2)^2 / embed_dim) / ||T||

    The variance of a sample cosine about T_ij is (1 - T_ij^2)^2 / embed_dim to leading order. What theory leaves out at
    finite width comes on top, where layers are not exactly isometric.
    """
    return float(np.linalg.norm(1 - cosine**2) / math.sqrt(embed_dim) / np.linalg.norm(cosine))
