"""Each tool's way to do each task: from float32 W_Q and W_K in memory to numbers; widening to float64 is part of it.

Tasks: ``spectra`` (Frobenius norm, mean diagonal and singular values of each head's W_QK = W_Q @ W_K.T; WeightWatcher
gives no diagonal), ``eigenvalues`` (those of each head's W_QK) and ``whole`` (singular values of the stored query
matrix, all heads side by side).
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np

from benchmarks.suite.cases import Weights

Found = dict[str, Any]
Run = Callable[[Weights, Weights], Found]
REFERENCE = "numpy, dense"


@dataclass(frozen=True)
class Tool:
    """What a tool does for each task it can do."""

    tasks: Mapping[str, Run]
    needs: str | None = None
    """Module of an optional dependency."""
    single: tuple[str, ...] = ()
    """Tasks in which products are rounded to float32 on the way."""

    @property
    def missing(self) -> bool:
        """Whether the dependency is not installed."""
        return self.needs is not None and find_spec(self.needs) is None


def side_by_side(W: Weights) -> Weights:
    """Return the heads' matrices as the one stored matrix, ``[embed_dim, head * head_dim]``."""
    return np.concatenate(list(W), axis=1)


def largest(values: Any, count: int) -> Any:
    """Return the values of largest modulus: the others are zeros of a product of rank ``count``, but for rounding."""
    return values[np.argsort(-np.abs(values))[:count]]


def gathered(rows: Iterable[tuple[Any, Any, Any]]) -> Found:
    """Stack each head's norm, mean diagonal and singular values."""
    names = ("norm", "mean_diagonal", "singular")
    return {name: np.stack(values) for name, values in zip(names, zip(*rows, strict=True), strict=True)}


def factored_product(W_Q: Weights, W_K: Weights) -> Any:
    from attnlens.circuits import FactoredProduct

    return FactoredProduct(W_Q.astype(np.float64), W_K.astype(np.float64))


def attnlens_spectra(W_Q: Weights, W_K: Weights) -> Found:
    M = factored_product(W_Q, W_K)
    norm = np.sqrt(M.squared_norm())
    return {"norm": norm, "mean_diagonal": M.diagonal().mean(-1), "singular": M.singular_values()}


def attnlens_eigenvalues(W_Q: Weights, W_K: Weights) -> Found:
    return {"eigenvalues": factored_product(W_Q, W_K).eigenvalues()}


def attnlens_whole(W_Q: Weights, W_K: Weights) -> Found:  # noqa: ARG001
    from attnlens.circuits import WholeProduct

    W = side_by_side(W_Q).astype(np.float64)
    return {"singular": WholeProduct.of(W, W.shape[1]).singular_values()[None]}


def numpy_heads(W_Q: Weights, W_K: Weights) -> Iterable[Any]:
    """Yield each head's W_QK, one at a time: a stack of them would cost a dense way more memory than it needs."""
    return (A.astype(np.float64) @ B.astype(np.float64).T for A, B in zip(W_Q, W_K, strict=True))


def numpy_spectra(W_Q: Weights, W_K: Weights) -> Found:
    k = W_Q.shape[2]
    return gathered(
        (np.linalg.norm(M), np.diagonal(M).mean(), np.linalg.svd(M, compute_uv=False)[:k])
        for M in numpy_heads(W_Q, W_K)
    )


def numpy_eigenvalues(W_Q: Weights, W_K: Weights) -> Found:
    k = W_Q.shape[2]
    return {"eigenvalues": np.stack([largest(np.linalg.eigvals(M), k) for M in numpy_heads(W_Q, W_K)])}


def numpy_whole(W_Q: Weights, W_K: Weights) -> Found:  # noqa: ARG001
    return {"singular": np.linalg.svd(side_by_side(W_Q).astype(np.float64), compute_uv=False)[None]}


def torch_heads(W_Q: Weights, W_K: Weights) -> Iterable[Any]:
    import torch

    return (torch.from_numpy(A).double() @ torch.from_numpy(B).double().T for A, B in zip(W_Q, W_K, strict=True))


def torch_spectra(W_Q: Weights, W_K: Weights) -> Found:
    import torch

    k = W_Q.shape[2]
    return gathered(
        (M.norm().item(), M.diagonal().mean().item(), torch.linalg.svdvals(M)[:k].numpy())
        for M in torch_heads(W_Q, W_K)
    )


def torch_eigenvalues(W_Q: Weights, W_K: Weights) -> Found:
    import torch

    k = W_Q.shape[2]
    return {"eigenvalues": np.stack([largest(torch.linalg.eigvals(M).numpy(), k) for M in torch_heads(W_Q, W_K)])}


def factored_matrix(W_Q: Weights, W_K: Weights, dtype: str) -> Any:
    import torch
    from transformer_lens.FactoredMatrix import FactoredMatrix

    width = getattr(torch, dtype)
    return FactoredMatrix(torch.from_numpy(W_Q).to(width), torch.from_numpy(W_K).to(width).mT)


def factored_spectra(dtype: str) -> Run:
    def run(W_Q: Weights, W_K: Weights) -> Found:
        M = factored_matrix(W_Q, W_K, dtype)
        mean = M.BA.diagonal(dim1=-2, dim2=-1).sum(-1) / M.ldim  # tr(AB) = tr(BA): the class has no diagonal
        return {"norm": M.norm().numpy(), "mean_diagonal": mean.numpy(), "singular": M.S.numpy()}

    return run


def factored_eigenvalues(dtype: str) -> Run:
    return lambda W_Q, W_K: {"eigenvalues": factored_matrix(W_Q, W_K, dtype).eigenvalues.numpy()}


def watcher(W: Any) -> Any:
    """Return WeightWatcher on a network of one Linear without bias that holds W."""
    import torch

    with contextlib.redirect_stderr(io.StringIO()):  # it says at import which SVD it uses
        from weightwatcher import WeightWatcher
    linear = torch.nn.Linear(W.shape[1], W.shape[0], bias=False, device="meta")
    linear.weight = torch.nn.Parameter(W, requires_grad=False)
    return WeightWatcher(model=torch.nn.Sequential(linear), log_level=logging.ERROR)


FIRST_LINEAR = 1
"""WeightWatcher's number for it: the Sequential around it is 0."""


def watched_spectrum(W: Any) -> Any:
    """Return singular values, largest first, from the eigenvalues of W^T W that WeightWatcher gives."""
    return np.sqrt(watcher(W).get_ESD(layer=FIRST_LINEAR))[::-1]


def watched_spectra(W_Q: Weights, W_K: Weights) -> Found:
    import torch

    products = (torch.from_numpy(A) @ torch.from_numpy(B).T for A, B in zip(W_Q, W_K, strict=True))
    spectra = np.stack([watched_spectrum(M) for M in products])
    return {"norm": np.sqrt((spectra**2).sum(-1)), "singular": spectra[:, : W_Q.shape[2]]}


def watched_whole(W_Q: Weights, W_K: Weights) -> Found:  # noqa: ARG001
    import torch

    return {"singular": watched_spectrum(torch.from_numpy(side_by_side(W_Q)))[None]}


def analysed_whole(W_Q: Weights, W_K: Weights) -> Found:  # noqa: ARG001
    import torch

    found = watcher(torch.from_numpy(side_by_side(W_Q))).analyze(plot=False)
    return {"singular": found["sv_max"].to_numpy()[:, None]}


def factored_tool(dtype: str, single: tuple[str, ...] = ()) -> Tool:
    tasks = {"spectra": factored_spectra(dtype), "eigenvalues": factored_eigenvalues(dtype)}
    return Tool(tasks, "transformer_lens", single)


WATCHER = "weightwatcher"
TOOLS: dict[str, Tool] = {
    "attnlens": Tool(
        {"spectra": attnlens_spectra, "eigenvalues": attnlens_eigenvalues, "whole": attnlens_whole},
    ),
    "FactoredMatrix, float64": factored_tool("float64"),
    "FactoredMatrix, float32": factored_tool("float32", ("spectra", "eigenvalues")),
    REFERENCE: Tool({"spectra": numpy_spectra, "eigenvalues": numpy_eigenvalues, "whole": numpy_whole}),
    "torch, dense": Tool({"spectra": torch_spectra, "eigenvalues": torch_eigenvalues}),
    "WeightWatcher get_ESD": Tool({"spectra": watched_spectra, "whole": watched_whole}, WATCHER, ("spectra",)),
    "WeightWatcher analyze": Tool({"whole": analysed_whole}, WATCHER),
}
