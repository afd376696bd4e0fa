"""Weights that do not fit a named architecture as they are: converted, below a prefix, renamed, or of another size."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from attnlens.checkpoints import Checkpoint
from attnlens.checkpoints.networks import ChosenNetwork
from attnlens.errors import CheckpointError, ModelNotFoundError, UsageError
from attnlens.models.architecture import Architecture
from attnlens.models.bounded import check_cheap, check_conversion
from attnlens.models.described import describe_architecture
from attnlens.models.opened import OpenedModel
from attnlens.models.renamed import as_timm_names
from attnlens.models.sizes import in_words, shown_arguments

_NUMBER = re.compile(r"\.\d+(?=\.)")


def fitting(opened: OpenedModel) -> OpenedModel:
    """Return the model with weights that fit: as they are, or in one of `_forms`. Refuse others by name.

    Of several networks in a file the default is tried first, then the others, then all together. Raises
    `CheckpointError` naming the first tensors that are missing or of another shape.
    """
    told: list[str] = []
    problems: list[str] = []
    for candidate in _candidates(opened):
        found = _misfits(candidate)
        problems = problems or found
        fits = candidate if not found else next((form for form in _forms(candidate, told) if not _misfits(form)), None)
        if fits is not None:
            title = candidate.checkpoint.title
            return replace(fits, name=f"{fits.name} [{title}]") if title else fits
    more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
    raise CheckpointError(
        f"the weights are not of {opened.architecture.name}: {'; '.join(problems[:3])}{more}. "
        + "".join(f"{line}. " for line in dict.fromkeys(told))
        + f"The file holds {', '.join(list(opened.checkpoint)[:3])}, ... "
        "Name the architecture they were made for as MODEL"
    )


def _candidates(opened: OpenedModel) -> Iterator[OpenedModel]:
    """Yield the model with each network of its file, and each without numbers of chunks in front of those of blocks."""
    from attnlens.models.renamed import without_chunks

    weights = opened.checkpoint
    several = [*weights.others(), weights.whole()] if isinstance(weights, ChosenNetwork) else []
    for one in (weights, *several):
        yield replace(opened, checkpoint=one)
        whole = without_chunks(one) if opened.timm_args is not None else None
        if whole is not None:
            yield replace(opened, checkpoint=whole)


def _forms(opened: OpenedModel, told: list[str]) -> Iterator[OpenedModel]:
    """Yield what weights that do not fit may be: converted by timm, below a prefix, renamed, or of another size.

    What a conversion says where it fails is added to ``told``.
    """
    from attnlens.checkpoints.converted import below_prefix, convert

    if opened.timm_args is not None:
        try:
            check_cheap(opened.architecture.name, opened.timm_args)
            converted = convert(opened.architecture.name, opened.timm_args, opened.checkpoint, check_conversion)
        except (CheckpointError, ModelNotFoundError) as error:
            told.append(str(error))
        else:
            yield replace(opened, checkpoint=converted)
    below = below_prefix(opened.checkpoint, opened.architecture.shapes)
    if below is not None:
        yield replace(opened, checkpoint=below)
    if opened.timm_args is None:
        return
    renamed = as_timm_names(opened.checkpoint)
    if renamed is not None:
        yield replace(opened, checkpoint=renamed)
    first: dict[str, list[int]] = {name: [] for name in list(opened.architecture.shapes)[:1]}
    for weights in (opened.checkpoint, below_prefix(opened.checkpoint, first), renamed):
        if weights is not None:
            try:
                yield from _resized(opened, weights)
            except UsageError as error:
                told.append(str(error))


def _resized(opened: OpenedModel, weights: Checkpoint) -> Iterator[OpenedModel]:
    """Yield the model at the sizes that the shapes of the weights show."""
    name, given = opened.architecture.name, opened.timm_args or {}
    arguments = shown_arguments(name, given, {key: weights.shape(key) for key in weights})
    if arguments is not None:
        architecture = replace(describe_architecture(name, arguments), weights=opened.architecture.weights)
        source = {**opened.source, **in_words(arguments, given)}
        yield replace(opened, architecture=architecture, checkpoint=weights, source=source, timm_args=arguments)


def _misfits(opened: OpenedModel) -> list[str]:
    """Name tensors that are missing or of another shape, and those of layers a timm architecture would leave out."""
    architecture, checkpoint, problems = opened.architecture, opened.checkpoint, []
    for name, wanted in architecture.shapes.items():
        if name not in checkpoint:
            problems.append(f"{name} is missing")
        elif list(checkpoint.shape(name)) != wanted:
            problems.append(f"{name} is {checkpoint.shape(name)}, not {tuple(wanted)}")
    if opened.timm_args is not None:
        problems += [f"{name} is of a layer it does not have" for name in _beyond(architecture, checkpoint)]
    return problems


def _beyond(architecture: Architecture, checkpoint: Checkpoint) -> list[str]:
    """Name query projections of the file's that differ from one of the architecture's in a layer's number alone."""
    own = {name: spec.path for spec in architecture.specs for name in spec.q.named(spec.q.tensor)}
    kinds = {_NUMBER.sub(".#", name) for name in own}
    beside = tuple(f"{path}." for path in architecture.order)
    return [
        name
        for name in checkpoint
        if name not in own and _NUMBER.sub(".#", name) in kinds and not name.startswith(beside)
    ]
