"""Training a stack of models as one batched model: the engine of every comparison, with a stack of one or of many.

All trained weights of a stack lie in one buffer ``[model, value]``, weight matrices first. The batched network reads
views of it, gradients are gathered into a second buffer of the same layout, and AdamW sees two vectors a model: what
decays and what does not. Clipping is then one norm a row, and a model's numbers never meet another's. What is not
trained (fixed positions, frozen filters, running statistics) lies beside it, one tensor a name. How the networks of a
stack are run is the network's own affair (`networks`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

from attnlens.training.average import Average
from attnlens.training.config import Config
from attnlens.training.data.mixing import unpacked
from attnlens.training.networks.base import PLAIN, Wiring
from attnlens.training.optimizers import DEFAULT, optimizer_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor

State = Mapping[str, "Tensor"]


class Scores(NamedTuple):
    """What an evaluation finds, a value a model."""

    accuracy: list[float]
    """Share of the targets guessed right."""
    loss: list[float]
    """Mean cross-entropy, in nats."""
    balanced: list[float]
    """Mean over the classes that occur of the share of a class guessed right."""


class LossScale:
    """What each model's loss is multiplied by, so that small gradients are no zeros in float16.

    Torch's GradScaler has one factor for all that an optimizer trains, and leaves a step out for all: in a stack one
    model's overflow would meet the others. Here a model has a factor of its own, 2^16 at first. Where a gradient
    overflows, that model's step is one with gradient 0 and its factor is halved; after 2,000 steps without, doubled.
    """

    FIRST, PATIENCE = 2.0**16, 2000

    def __init__(self, models: int, device: torch.device) -> None:
        import torch

        self.state = torch.zeros(2, models, device=device)
        """Factors, and the steps since each was changed."""
        self.reset()

    @property
    def scale(self) -> Tensor:
        """The factors ``[model]``."""
        return self.state[0]

    def reset(self) -> None:
        """Begin anew."""
        self.state[0].fill_(self.FIRST)
        self.state[1].zero_()

    def unscale(self, gradient: Tensor) -> None:
        """Divide gradients ``[model, value]`` by the factors, in place, and choose the next ones; nothing waits."""
        import torch

        gradient.div_(self.scale[:, None])
        sound = gradient.isfinite().all(1)
        gradient.masked_fill_(~sound[:, None], 0.0)
        steps = torch.where(sound, self.state[1] + 1, 0)
        grown = steps >= self.PATIENCE
        self.state[0].mul_(torch.where(sound, torch.where(grown, 2.0, 1.0), 0.5))
        self.state[1].copy_(torch.where(grown, 0, steps))


def own_code(method: Any) -> Any:
    """Return a bound method whose code is its own: torch counts compilations, and gives up at eight, by code."""
    from types import FunctionType, MethodType

    function = method.__func__
    code = function.__code__.replace()
    return MethodType(FunctionType(code, function.__globals__, function.__name__), method.__self__)


class Stack:
    """``models`` networks of the same sizes and wiring on one device, trained side by side.

    `load` puts weights in place and starts the optimizer and the schedule anew: one stack, compiled once, serves any
    number of runs. Nothing in `step` waits for the device. ``mode`` is that of `torch.compile`.
    """

    def __init__(
        self,
        config: Config,
        models: int,
        device: torch.device,
        *,
        wiring: Wiring = PLAIN,
        mode: str = "default",
    ) -> None:
        import torch
        from timm.optim import param_groups_weight_decay

        self.config, self.models, self.device = config, models, device
        template = config.network.build(0, wiring)
        if config.freeze_filters:
            from attnlens.layouts.depthwise import filter_parameters

            for name in filter_parameters(template):
                template.get_parameter(name).requires_grad_(False)
        sizes = {name: parameter.shape for name, parameter in template.named_parameters()}
        # rewired attention's gains a head, shaped to broadcast, are vectors like those timm leaves out of weight decay
        gains = [name for name in sizes if name.endswith((".attn.a", ".attn.b", ".attn.c"))]
        groups = param_groups_weight_decay(template, weight_decay=1.0, no_weight_decay_list=gains)
        names = {id(parameter): name for name, parameter in template.named_parameters()}
        order = [
            [names[id(parameter)] for parameter in group["params"] if parameter.requires_grad]
            for group in sorted(groups, key=lambda group: -group["weight_decay"])
        ]
        self.trained = [name for part in order for name in part]
        width = sum(sizes[name].numel() for name in self.trained)
        self.decayed = sum(sizes[name].numel() for name in order[0])
        self.buffer = torch.zeros(models, width, device=device)
        self.gradient = torch.zeros_like(self.buffer)
        self.fixed = {
            name: value.detach().to(device).expand(models, *value.shape).clone()
            for name, value in template.state_dict().items()
            if name not in self.trained
        }
        self.weights: dict[str, Tensor] = dict(self.fixed)
        start = 0
        for name in self.trained:
            stop = start + sizes[name].numel()
            self.weights[name] = self.buffer[:, start:stop].unflatten(1, sizes[name]).requires_grad_()
            start = stop
        self.forward = config.network.forward(template, wiring, config.moments, models, device)
        self.loss_sum = torch.zeros(models, device=device)
        self.scaler = LossScale(models, device) if config.precision == "float16" else None
        self._losses: Any = self._losses_of
        if config.compiled:
            self._losses = torch.compile(own_code(self._losses), mode=mode, dynamic=False)
        self.average = Average(self.weights, config.recipe.ema) if config.recipe.ema else None
        self.updates = 0

    @property
    def measured(self) -> dict[str, Tensor]:
        """What is evaluated and saved: the weights, or their moving average."""
        return self.weights if self.average is None else self.average.weights

    def load(self, states: Sequence[State], lrs: Sequence[float], steps: int) -> None:
        """Put the weights of every model in place and start the optimizer and its schedule of ``steps`` steps anew."""
        import torch
        from timm.scheduler import CosineLRScheduler

        assert len(states) == len(lrs) == self.models
        with torch.no_grad():
            for name, stacked in self.weights.items():
                stacked.copy_(torch.stack([state[name].view(stacked.shape[1:]) for state in states]))
        recipe = self.config.recipe
        groups = [self._groups(model, lr) for model, lr in enumerate(lrs)]
        self.optimizer = optimizer_of(recipe.optimizer, groups, recipe.lr)
        self.schedule = CosineLRScheduler(
            self.optimizer,
            t_initial=steps,
            lr_min=recipe.min_lr,
            warmup_t=round(recipe.warmup * steps),
            warmup_lr_init=recipe.min_lr,
            warmup_prefix=False,
            t_in_epochs=False,
        )
        self.loss_sum.zero_()
        self.updates = 0
        if self.scaler is not None:
            self.scaler.reset()
        if self.average is not None:
            self.average.update(self.weights, 0)

    def _groups(self, model: int, lr: float) -> list[dict[str, Any]]:
        """Return one model's parameter groups: what decays and what does not, as vectors for AdamW, else by tensor."""
        recipe, split = self.config.recipe, self.decayed
        cuts = [(0, split), (split, self.buffer.shape[1])]
        shapes: list[tuple[int, ...]] = [(stop - start,) for start, stop in cuts]
        if recipe.optimizer != DEFAULT:
            shapes = [tuple(self.weights[name].shape[1:]) for name in self.trained]
            ends = list(itertools.accumulate(math.prod(shape) for shape in shapes))
            cuts = list(zip([0, *ends], ends, strict=False))
        groups: list[dict[str, Any]] = [
            {"params": [], "lr": lr, "weight_decay": decay} for decay in (recipe.weight_decay, 0.0)
        ]
        for (start, stop), shape in zip(cuts, shapes, strict=True):
            values = self.buffer.detach()[model, start:stop].view(shape).requires_grad_()
            values.grad = self.gradient[model, start:stop].view(shape)
            groups[start >= split]["params"].append(values)
        return [group for group in groups if group["params"]]

    def step(self, inputs: Tensor, targets: Tensor, where: Tensor) -> None:
        """Train every model on its batch: ``inputs [set, item, ...]`` uint8, ``where [model]`` its set."""
        import torch

        with self._precision():
            losses = self._losses(self.weights, inputs, targets, where)
        total = losses.sum() if self.scaler is None else (losses * self.scaler.scale).sum()
        gradients = torch.autograd.grad(total, [self.weights[name] for name in self.trained])
        torch.cat([part.flatten(1) for part in gradients], dim=1, out=self.gradient)
        if self.scaler is not None:
            self.scaler.unscale(self.gradient)
        norm = self.gradient.norm(dim=1, keepdim=True)
        self.gradient.mul_((self.config.recipe.clip_norm / (norm + 1e-6)).clamp(max=1.0))
        self.optimizer.step()
        self.updates += 1
        self.schedule.step_update(self.updates)
        if self.average is not None:
            self.average.update(self.weights, self.updates)
        self.loss_sum += losses.detach()

    def _losses_of(self, weights: State, inputs: Tensor, targets: Tensor, where: Tensor) -> Tensor:
        """Return the mean cross-entropy of every model, ``[model]``: with smoothed and with mixed labels as told."""
        from torch.nn.functional import cross_entropy

        recipe = self.config.recipe
        labels, share, keep = unpacked(targets[where], recipe)
        logits = self.forward(weights, inputs, where, training=True, keep=keep).flatten(0, -2)
        how: dict[str, Any] = {"reduction": "none", "label_smoothing": recipe.label_smoothing}
        flat = cross_entropy(logits, labels.flatten().long(), **how)
        if share is not None:  # the other part of a mixed item's label is that of the item at its mirrored place
            flat = flat.lerp(cross_entropy(logits, labels.flip(1).flatten(), **how), 1 - share.flatten().to(flat.dtype))
        return flat.view(self.models, -1).mean(1)

    def _precision(self) -> AbstractContextManager[Any]:
        """Return the context that runs matrix products in the precision of the configuration."""
        import torch

        if self.config.precision == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, getattr(torch, self.config.precision))

    def evaluate(self, inputs: Tensor, targets: Tensor) -> Scores:
        """Return how every model does on the same items; waits for the device."""
        import torch

        hits, loss = (found.cpu() for found in self.tally(inputs, targets))
        counts = torch.bincount(targets.cpu().flatten().long(), minlength=hits.shape[1])
        recalls = (hits.double() / counts)[:, counts > 0]
        return Scores(
            (hits.sum(1).double() / targets.numel()).tolist(),
            (loss.double() / targets.numel()).tolist(),
            recalls.mean(1).tolist(),
        )

    def tally(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Count hits ``[model, class]`` and sum losses ``[model]``; nothing waits."""
        import torch
        from torch.nn.functional import cross_entropy

        classes = self.config.network.outputs
        hits = torch.zeros(self.models, classes, dtype=torch.long, device=self.device)
        loss = torch.zeros_like(self.loss_sum)
        where = torch.zeros(self.models, dtype=torch.long, device=self.device)
        size = max(1, 2 * self.config.recipe.batch_size)
        with torch.inference_mode(), self._precision():
            for start in range(0, len(targets), size):
                answer = targets[start : start + size].flatten().long()
                batch = inputs[None, start : start + size]
                logits = self.forward(self.measured, batch, where, training=False).flatten(1, -2)
                hits.index_add_(1, answer, (logits.argmax(-1) == answer).long())
                expected = answer.expand(self.models, -1).flatten()
                loss += cross_entropy(logits.flatten(0, 1), expected, reduction="none").view(self.models, -1).sum(1)
        return hits, loss

    def take_losses(self, steps: int) -> list[float]:
        """Return every model's mean training loss since the last call; waits for the device."""
        means = (self.loss_sum.double() / max(steps, 1)).tolist()
        self.loss_sum.zero_()
        return means

    def state(self, model: int) -> dict[str, Tensor]:
        """Return a copy of one model's weights and buffers on the CPU, under the names its module has.

        What is trained comes over in one piece.
        """
        if self.average is not None:
            return {name: value[model].cpu().clone() for name, value in self.average.weights.items()}
        row, start = self.buffer.detach()[model].cpu(), 0
        state = {name: value[model].cpu().clone() for name, value in self.fixed.items()}
        for name in self.trained:
            shape = self.weights[name].shape[1:]
            state[name] = row[start : start + shape.numel()].view(shape).clone()
            start += shape.numel()
        return state

    def snapshot(self) -> dict[str, Any]:
        """Return everything a resumed stack needs to go on as if it had never stopped."""
        return {
            "buffer": self.buffer.detach().cpu(),
            "fixed": {name: value.cpu() for name, value in self.fixed.items()},
            "optimizer": self.optimizer.state_dict(),
            "loss_sum": self.loss_sum.cpu(),
            "updates": self.updates,
            **({} if self.scaler is None else {"scale": self.scaler.state.cpu()}),
            **({} if self.average is None else {"average": self.average.snapshot()}),
        }

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Go on from a snapshot, after `load`."""
        import torch

        with torch.no_grad():
            self.buffer.detach().copy_(snapshot["buffer"])
            for name, value in snapshot["fixed"].items():
                self.fixed[name].copy_(value)
        self.optimizer.load_state_dict(snapshot["optimizer"])
        self.loss_sum.copy_(snapshot["loss_sum"])
        self.updates = snapshot["updates"]
        if self.scaler is not None:
            self.scaler.state.copy_(snapshot["scale"])
        if self.average is not None:
            self.average.restore(snapshot["average"])
