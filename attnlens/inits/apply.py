"""Running an initialiser over a live network: read, plan, write, read back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from attnlens.errors import AttnlensError, ModelNotFoundError, UnsupportedAttentionError, UsageError
from attnlens.heads import Array, HeadWeights
from attnlens.inits.caveats import layer_notes, whole_layer_reason
from attnlens.inits.folding import UnusableScaleError, folding_notes, gains, silent_roles, unfolded
from attnlens.inits.plan import FilterLayer, FilterPlan, Layer, Network, Plan, Rule, without_silent
from attnlens.inits.random import Streams
from attnlens.inits.registry import find_initialiser
from attnlens.inits.report import FilterReport, InitReport, ProductReport, Skipped, measure, measure_filters
from attnlens.layouts import AttentionSpec, read_heads, write_heads
from attnlens.layouts.depthwise import FilterSpec, read_filters, write_filters
from attnlens.layouts.read_write import Tensors
from attnlens.memory import check_fits
from attnlens.models.architecture import Architecture, modules_counted, suggest
from attnlens.models.live import open_live
from attnlens.models.undress import LiveWeights
from attnlens.statistics.depth import relative_depth

if TYPE_CHECKING:
    import torch
    from torch import nn

T = TypeVar("T")


def init_(
    module: nn.Module,
    init: str = "mimetic",
    *,
    seed: int = 0,
    input_size: int | tuple[int, ...] | None = None,
    **options: Any,
) -> InitReport:
    """Initialise the attention, or the depthwise filters, of a network in place and return what it has now.

    Works on every layer whose layout can be written (a timm network, a model of transformers,
    `torch.nn.MultiheadAttention`, ...), whatever is wrapped around the network; ``input_size`` is what one forward pass
    takes, where the network does not state it. Nothing outside attention and, for initialisers of filters, outside
    depthwise convolutions is touched. ``init`` and ``options``: see `attnlens.inits.initialisers` and docs/inits.md.
    Numbers come from generators of this call's own on the CPU, one per layer and head: the same seed gives the same
    weights on any device, and torch's global state is left alone.

    Raises `UsageError` for a name or option that is not known, `UnsupportedAttentionError` where nothing can be
    initialised, `UnusableScaleError` where an effective product cannot be reached. Layers are written one after the
    other: after an error, build the network again.
    """
    chosen = find_initialiser(init)
    architecture, tensors = open_live(module, input_size=input_size)
    _check_storage(tensors, architecture)
    network = Network(architecture, tensors, Streams(seed), lambda: module)
    rule = chosen.rule(network, options)
    if rule.plan and rule.fold != "raw" and architecture.untraced:
        raise UnusableScaleError(
            f"fold = {rule.fold!r} needs the norms before the layers of {architecture.name}, and no forward pass "
            f"could be followed ({architecture.untraced}): give input_size=, or pass fold='raw'"
        )
    layers = planned_layers(rule, network, chosen.name)
    jobs: list[Callable[[], _Result]] = [partial(_initialise, rule, network, *layer) for layer in layers.attention]
    jobs += [partial(_initialise_filters, rule, network, *layer) for layer in layers.filters]
    results = run_each(jobs, tensors, layers.specs())
    skipped = [*layers.refused, *(item for result in results for item in result.skipped)]
    if not any(result.written for result in results):
        raise UnsupportedAttentionError(
            f"nothing in {architecture.name} was initialised: {skipped[0].name} {skipped[0].reason}"
        )
    notes: dict[str, tuple[int, ...]] = {}
    for (index, _), result in zip((*layers.attention, *layers.filters), results, strict=True):
        for note in result.notes:
            notes[note] = (*notes.get(note, ()), index)
    resolved = {**{k: v for k, v in chosen.options.items() if k in options or _plain(v)}, **options}
    products = tuple(row for result in results for row in result.products)
    filters = tuple(row for result in results for row in result.filters)
    return InitReport(chosen.name, seed, resolved, rule.fold, products, tuple(skipped), notes, filters)


def create_model(
    name: str, init: str = "mimetic", seed: int = 0, *, init_options: dict[str, Any] | None = None, **timm_kwargs: Any
) -> nn.Module:
    """Return a timm model with its attention initialised: `timm.create_model` followed by `init_`.

    The whole network is a function of ``seed``: timm's own draws are made under it as well, and torch's global
    generators are put back as they were. With ``init="default"`` the network is what timm made under that seed, so two
    arms of a comparison share all but their attention. ``timm_kwargs`` go to timm, ``init_options`` to the initialiser.
    """
    chosen = find_initialiser(init)  # a misspelt name should not cost the building of a network
    model = build_model(name, seed, timm_kwargs)
    if chosen.name != "default":
        init_(model, init, seed=seed, **(init_options or {}))
    elif init_options:
        raise UsageError("initialiser 'default' has no options")
    return model


def build_model(name: str, seed: int, timm_kwargs: Mapping[str, Any]) -> nn.Module:
    """Return `timm.create_model` under a seed; raises `ModelNotFoundError` with the nearest names."""
    with seeded(seed):
        import timm

        name = name.removeprefix("timm/")
        base = name.partition(".")[0]
        if ":" not in name and not timm.is_model(base):
            raise ModelNotFoundError(f"timm has no architecture named {base!r}{suggest(base, timm.list_models())}")
        return timm.create_model(name, **timm_kwargs)


def build_checked(name: str, seed: int, timm_kwargs: Mapping[str, Any]) -> nn.Module:
    """Return what `build_model` does, of arguments or a folder's ``config.json`` that somebody else wrote.

    Raises `ModelNotFoundError` for a network that timm cannot build of them, that has more modules than any, or is
    larger than the memory that is free.
    """
    import torch

    told = f"{name} with {dict(timm_kwargs)}"
    try:
        if timm_kwargs or ":" in name:
            with torch.device("meta"), modules_counted(name):
                check_fits(build_model(name, seed, timm_kwargs), told)
        return build_model(name, seed, timm_kwargs)
    except AttnlensError:
        raise
    except Exception as error:  # any constructor of timm's, with any arguments
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ModelNotFoundError(f"timm cannot build {told} ({reason}): fix the arguments") from error


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run a block with torch's global generators seeded, and put them back afterwards."""
    import torch

    Streams(seed)  # checks it
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() and torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=list(devices)):
        torch.manual_seed(seed)
        yield


@dataclass(frozen=True)
class PlannedLayers:
    """The layers a rule plans, each with its index among those of its kind, and the refused ones of these kinds."""

    attention: tuple[tuple[int, AttentionSpec], ...]
    filters: tuple[tuple[int, FilterSpec], ...]
    refused: tuple[Skipped, ...]

    def specs(self) -> list[AttentionSpec | FilterSpec]:
        """Return every layer's spec."""
        return [*(spec for _, spec in self.attention), *(spec for _, spec in self.filters)]


def planned_layers(rule: Rule, network: Network, init: str) -> PlannedLayers:
    """Return the layers a rule plans; raises `UnsupportedAttentionError` where the network has none of their kind."""
    architecture = network.architecture
    attention = architecture.indexed() if rule.plan else ()
    filters = tuple(enumerate(architecture.filters)) if rule.filters else ()
    order = [*architecture.order, *(r.path for r in architecture.refused_filters)]
    refusals = [*(architecture.refused if rule.plan else ()), *(architecture.refused_filters if rule.filters else ())]
    refused = tuple(Skipped(order.index(r.path), r.path, "", r.reason) for r in refusals)
    if not attention and not filters and not refused:
        kinds = " or ".join(
            word for word, plans in (("attention", rule.plan), ("depthwise convolution", rule.filters)) if plans
        )
        raise UnsupportedAttentionError(
            f"initialiser {init!r} is for {kinds}, and {architecture.name} has none that is known"
        )
    return PlannedLayers(attention, filters, refused)


class _Result(NamedTuple):
    written: bool
    skipped: list[Skipped]
    notes: tuple[str, ...] = ()
    products: tuple[ProductReport, ...] = ()
    filters: tuple[FilterReport, ...] = ()


def _initialise_filters(rule: Rule, network: Network, index: int, spec: FilterSpec) -> _Result:
    """Plan a layer of depthwise filters, write it, and measure what the network holds then."""
    assert rule.filters is not None
    layer = make_filter_layer(network, index, spec)
    plan = rule.filters(layer)
    if plan.filters is None:
        return _Result(False, [Skipped(index, spec.path, "filters", plan.skipped)])
    write_filters(spec, plan.filters, network.tensors, planned_bias(spec, plan))  # type: ignore[arg-type]
    now = read_filters(spec, network.tensors)
    notes = tuple(f"filters: {note}" for note in (*plan.notes, *([spec.label] if spec.label else [])))
    return _Result(True, [], notes, filters=(measure_filters(layer, now, plan),))


def make_filter_layer(network: Network, index: int, spec: FilterSpec) -> FilterLayer:
    """Read a layer of depthwise filters as it is now."""
    depth = relative_depth(index, len(network.architecture.filters))
    return FilterLayer(index, spec, depth, read_filters(spec, network.tensors), network.streams)


def planned_bias(spec: FilterSpec, plan: FilterPlan) -> Array | None:
    """Return the bias a plan requests, zero where it says nothing; None where the layer has none."""
    if not spec.bias:
        return None
    return np.zeros(spec.filters) if plan.bias is None else plan.bias


def _initialise(rule: Rule, network: Network, index: int, spec: AttentionSpec) -> _Result:
    """Plan a layer, write it, and measure what the network holds then."""
    reason = whole_layer_reason(spec)
    if reason:
        return _Result(False, [Skipped(index, spec.path, "", reason)])
    assert rule.plan is not None
    layer = make_layer(network, index, spec)
    plan = without_silent(rule.plan(layer), silent_roles(spec, network.tensors))
    skipped = [Skipped(index, spec.path, circuit, reason) for circuit, reason in plan.skipped]
    roles = plan.weights()
    if not roles:
        return _Result(False, skipped, plan.notes)
    by = gains(layer.weights, rule.fold)
    write_heads(spec, planned_heads(layer, plan, rule), network.tensors)  # type: ignore[arg-type]
    now = read_heads(spec, network.tensors, index)
    notes = (*plan.notes, *folding_notes(by, roles), *layer_notes(spec, roles))
    return _Result(True, skipped, notes, products=tuple(measure(layer, now, plan, rule.fold)))


def make_layer(network: Network, index: int, spec: AttentionSpec) -> Layer:
    """Read a layer as it is now."""
    device = device_of(network.tensors, spec)
    weights = read_heads(spec, network.tensors, index)
    return Layer(index, spec, weights, network.streams, device, batched=device.type != "cpu")


def planned_heads(layer: Layer, plan: Plan, rule: Rule) -> HeadWeights:
    """Return the weights a plan requests of the network: raw, with the biases that go with them."""
    by = gains(layer.weights, rule.fold)
    new = unfolded(plan.weights(), by)
    names = {"q": ("W_Q", "b_Q"), "k": ("W_K", "b_K"), "v": ("W_V", "b_V"), "o": ("W_O", "b_O")}
    changes: dict[str, Any] = {}
    for role, (weight, bias) in names.items():
        slot = layer.spec.slots().get(role)
        stored = getattr(layer.weights, bias)
        changes[bias] = None  # None leaves the stored bias as it is
        if role in new:
            changes[weight] = new[role]
            if stored is not None and slot is not None and slot.bias:
                changes[bias] = _new_bias(plan.biases.get(role), stored, by.get(role), role)
    return layer.weights.replace(**changes)


def _new_bias(planned: Array | None, stored: Array, gain: Any, role: str) -> Array:
    if planned is None:
        return np.zeros_like(stored)
    return planned * gain.inverse() if role == "o" and gain is not None else planned


def run_each(jobs: Sequence[Callable[[], T]], tensors: Tensors, specs: Sequence[AttentionSpec | FilterSpec]) -> list[T]:
    """Run a job for each layer: side by side on a CPU, with one thread of linear algebra each; in turn on a GPU."""
    import torch

    before = torch.get_num_threads()
    if any(device_of(tensors, spec).type != "cpu" for spec in specs):
        return [job() for job in jobs]
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(before) as pool:
            return list(pool.map(lambda job: job(), jobs))
    finally:
        torch.set_num_threads(before)


def device_of(tensors: Tensors, spec: AttentionSpec | FilterSpec) -> torch.device:
    """Return the device a layer's weights are on; arrays of a file are on the CPU."""
    import torch

    stored = tensors[spec.tensors()[0]]
    return stored.device if isinstance(stored, torch.Tensor) else torch.device("cpu")


def _check_storage(tensors: LiveWeights, architecture: Architecture) -> None:
    """Refuse weights that cannot be written in place: computed, sharded, on the meta device, or stored in integers."""
    slots = [slot for spec in architecture.specs for slot in spec.slots().values()]
    names = [name for slot in slots for name in slot.named(slot.tensor)]
    for name in (*names, *(spec.tensor for spec in architecture.filters)):
        reason = tensors.why_not_written(name)
        if reason:
            raise UsageError(f"{name} {reason}")


def _plain(value: Any) -> bool:
    return isinstance(value, str | bool | int) or (isinstance(value, float) and math.isfinite(value))
