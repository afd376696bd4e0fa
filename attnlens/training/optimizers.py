"""timm's optimizers by name for a stack of models: each model's numbers are those it would have alone.

AdamW treats every weight by itself, so that one fused optimizer trains vectors of all models. Others look at a tensor's
norm, mean or shape (lamb, lars, adafactor, muon, the cautious ones), or at all gradients together: they get the tensors
of one model, in their own shapes, and an optimizer for each model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from attnlens.errors import UsageError

if TYPE_CHECKING:
    from torch.optim import Optimizer

DEFAULT = "adamw"
_NEEDS = {
    "fused": "apex",
    "bnb": "bitsandbytes",
    "adahessian": "second derivatives, which are not computed",
    "kron": "random numbers of its own, which no checkpoint holds",
    "ckron": "random numbers of its own, which no checkpoint holds",
}
"""What optimizers whose names begin so need, and why they are refused."""


def known_optimizers() -> list[str]:
    """Return the names of timm's optimizers that a comparison trains with."""
    from timm.optim import list_optimizers

    return [name for name in list_optimizers() if not name.startswith(tuple(_NEEDS))]


def check_optimizer(name: str) -> None:
    """Refuse a name that is none of timm's, and those that need more than there is. Raises `UsageError`."""
    reason = next((needs for start, needs in _NEEDS.items() if name.startswith(start)), None)
    if reason is not None:
        raise UsageError(
            f"--optimizer {name} needs {reason}: choose another of timm's, such as {DEFAULT}, lamb or muon"
        )
    known = known_optimizers()
    if name not in known:
        raise UsageError(f"--optimizer {name} is none of timm's: choose from {', '.join(known)}")


class Several:
    """An optimizer a model, behind the interface of one."""

    def __init__(self, members: Sequence[Optimizer]) -> None:
        self.members = list(members)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Those of all members, one after another."""
        return [group for member in self.members for group in member.param_groups]

    def step(self) -> None:
        """Take a step with each."""
        for member in self.members:
            member.step()

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps; whole under ``state``, as groups gather numbers too."""
        return {"state": [member.state_dict() for member in self.members]}

    def load_state_dict(self, data: Mapping[str, Any]) -> None:
        """Go on from what a checkpoint kept."""
        for member, own in zip(self.members, data["state"], strict=True):
            member.load_state_dict(own)


def optimizer_of(name: str, models: Sequence[list[dict[str, Any]]], lr: float) -> Any:
    """Return the optimizer of a stack: ``models`` holds the parameter groups of each model, each with its rate."""
    from timm.optim import create_optimizer_v2

    if name == DEFAULT:
        return create_optimizer_v2([group for groups in models for group in groups], name, lr=lr, fused=True)
    # some compare the rate of a step with the one they were made with
    return Several([create_optimizer_v2(groups, name, lr=groups[0]["lr"]) for groups in models])
