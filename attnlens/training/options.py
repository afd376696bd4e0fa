"""What a comparison is told, and how that becomes a configuration: data, source, sizes, recipe, arms."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from attnlens.errors import UsageError
from attnlens.memory import check_fits
from attnlens.training.arms import (
    FROM_WEIGHTS,
    OF_SOURCE,
    RUNGS,
    WIRINGS,
    default_contrasts,
    initial_state,
    named_arms,
    start_of,
)
from attnlens.training.config import (
    AUGMENTATIONS,
    Augmentation,
    Config,
    Recipe,
    SourceData,
    TextData,
    check_config,
)
from attnlens.training.data.on_device import Dataset
from attnlens.training.data.reading import Say, silent
from attnlens.training.data.sources import load_dataset
from attnlens.training.data.text import PREFIX, load_text
from attnlens.training.hardware import attention_on, compiles_on, precision_on
from attnlens.training.ladder import LADDER
from attnlens.training.networks.base import Network
from attnlens.training.networks.registry import network_named
from attnlens.training.networks.vit import ViT
from attnlens.training.seen import Seen, meet
from attnlens.training.source import Source, on_meta
from attnlens.training.stack_size import fastest_stack
from attnlens.training.store import stored_config

if TYPE_CHECKING:
    import torch


def _images(epochs: int, batch_size: int, target: float, augment: Augmentation, patch_size: int) -> dict[str, Any]:
    recipe = {"epochs": epochs, "batch_size": batch_size, "lr": 1e-3, "target": target, "augment": augment}
    return {**recipe, "patch_size": patch_size, "train_images": None, "test_images": None}


PRESETS: dict[str, dict[str, Any]] = {
    "digits": _images(12, 50, 0.6, "none", 2),
    "cifar10": _images(100, 512, 0.8, "flip-randaugment", 4),
    "cifar100": _images(100, 512, 0.5, "flip-randaugment", 4),
    "images": _images(100, 512, 0.8, "flip-randaugment", 4),
    "large images": _images(100, 512, 0.8, "flip-randaugment", 16),
    "text": {
        "epochs": 20,
        "batch_size": 16,
        "lr": 1e-3,
        "target": 3.0,
        "context": 128,
        "train_images": 1600,
        "test_images": None,
    },
}
"""What a data set is trained with when nothing else is given: by its name, else by `Dataset.preset`.

Of a text ``train_images`` are the windows an epoch draws, and ``target`` is in bits per byte.
"""


RECIPE = (*("weight_decay", "warmup", "optimizer", "label_smoothing"), *("mixup", "cutmix", "drop_path", "ema"))
"""Options that are the recipe's fields of the same names."""
SIZES = ("embed_dim", "depth", "num_heads")
"""Options that are sizes of a network that starts from drawn weights."""


_COUNTS = ("image_size", "context", "train_images", "test_images")
"""Options that data are cut by before a configuration holds them."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What decides the numbers of a comparison, as `attnlens.train_compare` is told it.

    None takes the data set's preset or what the source model gives.
    """

    dataset: str
    data_dir: Path | None
    classes: str | Sequence[str] | None
    model: str | None
    checkpoint: Path | None
    params: Path | None
    arms: Sequence[str] | None
    contrasts: Sequence[tuple[str, str]] | None
    seeds: int
    data_seed: int
    init_seed: int
    epochs: int | None
    batch_size: int | None
    lr: float | None
    weight_decay: float
    augment: Augmentation | None
    patch_size: int | None
    image_size: int | None
    context: int | None
    train_images: int | None
    test_images: int | None
    target: float | None
    eval_every: int | None
    tune_lr: Sequence[float]
    tune_seeds: int
    tune_epochs: int | None
    warmup: float
    optimizer: str
    label_smoothing: float
    mixup: float
    cutmix: float
    drop_path: float
    ema: float
    embed_dim: int | None
    depth: int | None
    num_heads: int | None
    device: str
    freeze_filters: bool
    stack: int | None
    compiled: bool | None
    precision: str

    def __post_init__(self) -> None:
        if not isinstance(self.dataset, str):
            raise UsageError(f"--dataset {self.dataset!r} is no name of a data set: give a name, a file or a folder")
        for name in _COUNTS:
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise UsageError(f"--{_dashed(name)} {value!r} is not accepted: give a whole number of 1 or more")


@contextmanager
def accepted() -> Iterator[None]:
    """Say in a line which option a configuration cannot hold. Raises `UsageError`."""
    try:
        yield
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = str(first["loc"][0])
        option = "tune-lr" if name == "lr_grid" else _dashed(name)
        wanted = str(first["msg"]).replace("Input should", "it should", 1)
        raise UsageError(f"--{option} {first['input']!r} is not accepted: {wanted[0].lower()}{wanted[1:]}") from error


def stored_options(options: Options, config: Config) -> dict[str, Any]:
    """Return what ``--config`` reads: the options as given, and in the place of those left out what was chosen."""
    given = {field.name: getattr(options, field.name) for field in fields(options)}
    network = json.loads(config.network.model_dump_json())
    chosen = {
        **{name: getattr(config.recipe, name) for name in ("epochs", "batch_size", "lr")},
        **({"augment": config.recipe.augment} if config.text is None else {}),
        **{name: network[name] for name in ("patch_size", "context") if name in network},
        **{name: getattr(config, name) for name in ("arms", "contrasts", "target", "eval_every")},
    }
    told = {name: value for name, value in {**given, **chosen}.items() if value is not None}
    return {name: str(value) if isinstance(value, Path) else value for name, value in told.items()}


def load_data(options: Options, cache: Path | None, say: Say = silent) -> Dataset:
    """Load what ``--dataset`` names. Raises `DatasetError`, `UsageError`."""
    if options.dataset.startswith(PREFIX):
        return load_text(options.dataset, data_dir=options.data_dir)
    return load_dataset(options.dataset, data_dir=options.data_dir, image_size=options.image_size, cache=cache, say=say)


@accepted()
def find_source(options: Options, data: Dataset) -> Source:
    """Open the pre-trained model, or look up a network that has none, and check that it reads the data.

    Raises `UsageError` and what `Source.of` raises.
    """
    name = options.model
    if name is None and options.checkpoint is None:
        name = data.default_model
    sizes = {size: value for size in SIZES if (value := getattr(options, size)) is not None}
    if sizes and data.kind == ViT.reads:
        given = next((f"--{what} {value}" for what, value in _sized(options).items() if value is not None), None)
        if given is not None:
            raise UsageError(f"--{_dashed(next(iter(sizes)))} and {given}: sizes are those of the model. Leave one out")
        return Source.drawn(sizes, options.params)
    network = network_named(name)
    if network is None and data.kind != ViT.reads:
        raise UsageError(
            f"--dataset {options.dataset} {data.holds}: name a language model, as in --model {data.default_model}"
        )
    source = Source.of(name, options.checkpoint, options.params)
    if sizes and options.checkpoint is not None:
        raise UsageError(
            f"--{_dashed(next(iter(sizes)))} and --checkpoint: sizes are those of the weights. Leave one out"
        )
    if foreign := next((size for size in sizes if size not in source.sizes), None):
        raise UsageError(f"--{_dashed(foreign)}: the sizes of {name} have no such name. Leave it out")
    source = replace(source, sizes={**source.sizes, **sizes})
    if source.opened is None and LADDER in (options.arms or ()):
        raise UsageError(
            f"--arms ladder starts from a pre-trained source, and {source.name} has no weights: give --checkpoint FILE "
            "as `attnlens train-compare --save-weights` writes it"
        )
    if source.network.reads != data.kind:
        raise UsageError(f"--model {name} reads {source.network.needs}")
    return source


def _sized(options: Options) -> dict[str, Any]:
    """Return the options that name a model, which has sizes of its own."""
    return {"model": options.model, "checkpoint": options.checkpoint}


def _dashed(name: str) -> str:
    return name.replace("_", "-")


@accepted()
def resolve(
    options: Options, data: Dataset, source: Source, device: torch.device, output: Path, *, resume: bool
) -> tuple[Config, Dataset]:
    """Resolve every choice; return the configuration, and the data cut to it. Raises `UsageError`."""
    for name, topic in data.foreign.items():
        if getattr(options, name) is not None:
            option = name.replace("_", "-")
            raise UsageError(f"--{option} is about {topic}, and {data.name} {data.holds}: leave it out")
    if options.classes is not None:
        data = data.only(options.classes)
    preset = PRESETS.get(options.dataset) or PRESETS[data.preset]
    given = {name: getattr(options, name) for name in preset}
    chosen = preset | {name: value for name, value in given.items() if value is not None}
    network = source.network(**{**source.sizes, **data.sizes(chosen)})
    data = data.kept(chosen)
    config = _config(options, data, network, chosen, source, device)
    check_config(config)
    check_fits(on_meta(network, network.describe()), network.describe())
    _check_arms(config, source)
    config = config.model_copy(update={"params_sha256": source.params_sha256(network.build(0), config.arms)})
    wirings = {arm: start_of(arm, source).wiring for arm in config.arms}
    config = config.model_copy(update={"attention": attention_on(config, wirings.values(), device)})
    if options.stack is None and device.type == "cuda":
        stored = (stored_config(output) or {}).get("stack") if resume else None
        config = config.model_copy(update={"stack": stored or fastest_stack(config, wirings, data, device)})
    return config, data


def _config(
    options: Options,
    data: Dataset,
    network: Network,
    chosen: Mapping[str, Any],
    source: Source,
    device: torch.device,
) -> Config:
    augment = chosen.get("augment", "none")
    if augment not in AUGMENTATIONS:
        raise UsageError(f"--augment {augment} is not known: choose from {', '.join(AUGMENTATIONS)}")
    arms = named_arms(options.arms, type(network)) if options.arms is not None else source.default_arms()
    told = RUNGS if not network.prefix or source.opened is None else [rung.arm for rung in network.ladder[1:]]
    keeps = {rung.arm: f"keeps of {source.name}: {rung.keeps}" for rung in network.ladder if rung.arm in told}
    starts = {arm: keeps.get(arm) or start_of(arm, source).describe() for arm in arms}
    if not network.prefix:  # its arms need no words that the first comparisons did not have
        starts = {arm: start for arm, start in starts.items() if arm in WIRINGS or arm in keeps}
    facts, counts, (mean, std) = data.text_facts(), data.counts(chosen), data.moments()
    cuda = device.type == "cuda"
    return Config(
        dataset=data.name,
        data_sha256=data.sha256(),
        train_items=counts[0],
        test_items=counts[1],
        mean=mean,
        std=std,
        source=source.record(),
        params_sha256="",
        network=network,
        recipe=Recipe(
            epochs=chosen["epochs"],
            batch_size=chosen["batch_size"],
            lr=chosen["lr"],
            augment=augment,
            **{name: getattr(options, name) for name in RECIPE},
        ),
        arms=arms,
        contrasts=list(options.contrasts if options.contrasts is not None else default_contrasts(arms, source)),
        seeds=options.seeds,
        data_seed=options.data_seed,
        init_seed=options.init_seed,
        target=chosen["target"],
        eval_every=options.eval_every or eval_every(chosen["epochs"], *counts),
        lr_grid=sorted(set(options.tune_lr)),
        tune_seeds=options.tune_seeds,
        tune_epochs=options.tune_epochs,
        device="cuda" if cuda else "cpu",
        precision=precision_on(device, options.precision),
        compiled=compiles_on(device, options.compiled),
        stack=options.stack or 1,
        text=TextData(**facts) if facts else None,
        freeze_filters=options.freeze_filters,
        starts=starts,
        source_data=_source_data(source, data, arms),
        classes=None if options.classes is None else data.class_names(),
        commonest=data.commonest(),
        left_out=data.unused(),
    )


def _source_data(source: Source, data: Dataset, arms: Sequence[str]) -> SourceData | None:
    if source.opened is None or not set(FROM_WEIGHTS) & set(arms):
        return None
    met = meet(source.name, source.seen, Seen.of(data))
    return None if met is None else SourceData(**met._asdict())


def eval_every(epochs: int, train_items: int, test_items: int) -> int:
    """Return the epochs between measurements: some twenty in all, and no more than a tenth of the training's cost.

    A forward pass costs a third of a training step.
    """
    return max(1, epochs // 20, math.ceil(10 * test_items / (3 * train_items)))


def _check_arms(config: Config, source: Source) -> None:
    """Let what cannot start fail now, not in an hour. Raises what building and initialising raise."""
    if config.freeze_filters:
        from attnlens.layouts.depthwise import filter_parameters

        if not filter_parameters(config.network.build(0)):
            raise UsageError("--freeze-filters: the network has no depthwise filters. Name another --model")
    if config.recipe.drop_path and set(WIRINGS) & set(config.arms):
        raise UsageError("--drop-path drops residual branches, and an arm's network is rewired: leave one of them out")
    risky = (*OF_SOURCE, *WIRINGS)
    for arm in config.arms:
        if arm in risky or source.opened is None:
            initial_state(arm, 0, config.network, source)
