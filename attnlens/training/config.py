"""What a comparison is: everything its result depends on, in one frozen object with a hash."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import (
    BeforeValidator,
    Field,
    SerializeAsAny,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from attnlens.errors import UsageError
from attnlens.printable import utf8_data
from attnlens.training.metrics import BALANCED_ACCURACY, Metric
from attnlens.training.networks.base import Moments, Network, Part
from attnlens.training.networks.registry import network_of
from attnlens.training.optimizers import DEFAULT, check_optimizer

Precision = Literal["float32", "bfloat16", "float16"]
Attention = Literal["", "flash", "efficient", "math"]
Augmentation = Literal["none", "shift", "flip-shift", "flip-randaugment"]
AUGMENTATIONS: dict[str, str] = {
    "none": "none",
    "shift": "shifts by up to 1/8 of the size, mean fill",
    "flip-shift": "horizontal flips, shifts by up to 1/8 of the size, mean fill",
    "flip-randaugment": "horizontal flips, rand-m9-mstd0.5-inc1 (bilinear, mean fill)",
}
"""The flavours by name, as reports call them."""

TUNING_SEEDS = 10_000
"""Learning rates are chosen with seeds from here on; a comparison's own seeds lie below, so they never meet."""


_ADDED: dict[str, Any] = {
    "optimizer": DEFAULT,
    **dict.fromkeys(("label_smoothing", "mixup", "cutmix", "drop_path", "ema"), 0.0),
}
"""Fields of a recipe that came after the first comparisons, as `_LATER`."""


class Recipe(Part):
    """How every arm is trained: linear warm-up, cosine to ``min_lr``, gradient norm clipped per model."""

    epochs: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    lr: float = Field(gt=0)
    min_lr: float = Field(default=1e-6, ge=0)
    warmup: float = Field(default=0.1, ge=0, lt=1, description="share of the steps")
    weight_decay: float = Field(default=0.05, ge=0)
    clip_norm: float = Field(default=1.0, gt=0)
    augment: Augmentation = "none"
    optimizer: str = Field(default=DEFAULT, description="timm's name")
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    mixup: float = Field(default=0.0, ge=0, description="alpha of the Beta distribution; 0: none")
    cutmix: float = Field(default=0.0, ge=0, description="alpha of the Beta distribution; 0: none")
    drop_path: float = Field(default=0.0, ge=0, lt=1, description="of the last layer, rising from 0 at the first")
    ema: float = Field(default=0.0, ge=0, lt=1, description="decay of the weights' average, which is measured; 0: none")

    @property
    def packs(self) -> bool:
        """Whether targets are more than labels: `attnlens.training.data.mixing`."""
        return bool(self.mixup or self.cutmix or self.drop_path)

    @model_serializer(mode="wrap")
    def _as_stored(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        data: dict[str, Any] = handler(self)
        return {name: value for name, value in data.items() if name not in _ADDED or value != _ADDED[name]}

    def regularisers(self) -> str:
        """Say in words what acts beside weight decay; empty for nothing."""
        words = {
            f"label smoothing {self.label_smoothing:g}": self.label_smoothing,
            f"Mixup with alpha {self.mixup:g}": self.mixup,
            f"CutMix with alpha {self.cutmix:g}": self.cutmix,
            f"stochastic depth up to {self.drop_path:g}": self.drop_path,
            f"measured: the weights' moving average with decay {self.ema:g}": self.ema,
        }
        return ", ".join(text for text, on in words.items() if on)


class TextData(Part):
    """What a text is besides its windows: ``train_items`` windows an epoch and ``test_items`` of the test split."""

    files: int = Field(ge=1)
    train_bytes: int = Field(ge=1)
    test_bytes: int = Field(ge=1)
    split: str


class SourceData(Part):
    """What is known of a source and the data set, where an arm holds weights of the source."""

    shared: bool | None = Field(description="whether it was trained on these images or this text; None: not known")
    words: str


_LATER: dict[str, Any] = {
    "text": None,
    "freeze_filters": False,
    "starts": {},
    "source_data": None,
    "classes": None,
    "commonest": None,
    "attention": "",
    "left_out": {},
    "tune_epochs": None,
}
"""Fields that came after the first comparisons: at these values they are left out, so that hashes stay as they were."""
OPTIONS = "options"
"""What ``config.json`` holds beside a configuration: the options that lead to it, which ``--config`` reads."""
STORED = {"train_items": "train_images", "test_items": "test_images", "network": "shape"}
"""What ``config.json`` calls fields, a text's too: the hash of every comparison there is was taken over these names."""


class Config(Part):
    """Everything a comparison's numbers depend on. What only moves work about (workers, budget, folder) is not here."""

    dataset: str
    data_sha256: str
    train_items: int = Field(ge=1, description="of an epoch: images or windows")
    test_items: int = Field(ge=1)
    mean: list[float]
    std: list[float]
    source: dict[str, Any] = Field(description="the pre-trained model: name, hash")
    params_sha256: str = Field(description="of the requests that the fitted arm draws with")
    network: Annotated[SerializeAsAny[Network], BeforeValidator(network_of)]
    recipe: Recipe
    arms: list[str] = Field(min_length=1)
    contrasts: list[tuple[str, str]]
    seeds: int = Field(ge=1, lt=TUNING_SEEDS)
    data_seed: int = Field(ge=0)
    init_seed: int = Field(ge=0)
    target: float = Field(gt=0, description="the X of epochs-to-X: an accuracy, or bits per byte")
    eval_every: int = Field(ge=1)
    lr_grid: list[float] = Field(description="empty: every arm trains with the recipe's lr")
    tune_seeds: int = Field(ge=1)
    device: Literal["cpu", "cuda"]
    precision: Precision = Field(description="of matrix products; weights, norms and losses are float32")
    compiled: bool
    stack: int = Field(ge=1, description="models trained in one batched model")
    text: TextData | None = None
    freeze_filters: bool = Field(default=False, description="depthwise filters stay as they start, in every arm")
    starts: dict[str, str] = Field(default={}, description="what each arm starts from, where the source is no ViT")
    tune_epochs: int | None = Field(default=None, ge=1, description="of a run that tunes; None: as many as the others")
    source_data: SourceData | None = Field(default=None, description="None: nothing suggests that they meet")
    classes: list[str] | None = Field(default=None, description="what --classes kept of the data set; None: all")
    left_out: dict[str, int] = Field(default={}, description="images of the data set that are not used, by reason")
    attention: Attention = Field(default="", description="kernels of fused attention; empty where scores are formed")
    commonest: float | None = Field(
        default=None, description="share of the test images in the commonest class, where classes are uneven"
    )

    @model_validator(mode="before")
    @classmethod
    def _from_stored(cls, data: Any) -> Any:
        names = {stored: name for name, stored in STORED.items()}
        if not isinstance(data, dict):
            return data
        return {names.get(name, name): utf8_data(value) for name, value in data.items() if name != OPTIONS}

    @model_serializer(mode="wrap")
    def _as_stored(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        data: dict[str, Any] = handler(self)
        kept = {name: value for name, value in data.items() if name not in _LATER or value != _LATER[name]}
        return {STORED.get(name, name): value for name, value in kept.items()}

    def sha256(self) -> str:
        """Return the hash of the whole configuration."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()

    def for_tuning(self) -> Config:
        """Return what runs that choose learning rates are trained by."""
        if self.tune_epochs is None:
            return self
        return self.model_copy(update={"recipe": self.recipe.model_copy(update={"epochs": self.tune_epochs})})

    def differences(self, stored: dict[str, Any]) -> list[str]:
        """Say in words which fields differ from those of a stored configuration."""
        mine = _flat(json.loads(self.model_dump_json()))
        theirs = _flat(stored)
        names = sorted({*mine, *theirs})
        return [
            f"{name} is {mine.get(name)!r}, was {theirs.get(name)!r}"
            for name in names
            if mine.get(name) != theirs.get(name)
        ]

    def evaluated(self, epoch: int) -> bool:
        """Whether score and structure are measured after this many epochs; 0 and the last always are."""
        return epoch % self.eval_every == 0 or epoch == self.recipe.epochs

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return self.train_items // self.recipe.batch_size

    @property
    def metric(self) -> Metric:
        """What runs are compared by: where classes are uneven, all of them count alike."""
        return self.network.metric if self.commonest is None else BALANCED_ACCURACY

    @property
    def items(self) -> str:
        """What a batch is made of, in words."""
        return self.network.items

    @property
    def moments(self) -> Moments:
        """What images are normalised with."""
        return Moments(self.mean, self.std)

    @property
    def passes(self) -> float:
        """How many times the training data is seen."""
        items = self.steps * self.recipe.batch_size * self.recipe.epochs
        if self.text is None:
            return items / self.train_items
        return items * self.network.targets_per_item / self.text.train_bytes


class Run(NamedTuple):
    """One model to train: an arm, the number of its seed pair, and a learning rate; ``tuning`` runs choose the last."""

    arm: str
    seed: int
    lr: float
    tuning: bool = False

    @property
    def name(self) -> str:
        """Return a file name."""
        return f"tune-{self.arm}-{self.lr:g}-{self.seed}" if self.tuning else f"{self.arm}-{self.seed}"


def check_config(config: Config) -> None:
    """Refuse what does not go together. Raises `UsageError`."""
    config.network.check(config.dataset)
    recipe = config.recipe
    check_optimizer(recipe.optimizer)
    for name in ("mixup", "cutmix", "drop_path"):
        if getattr(recipe, name) and config.text is not None:
            raise UsageError(f"--{name.replace('_', '-')} is about images, and {config.dataset} is text: leave it out")
    if recipe.drop_path and not config.network.drop_rates(recipe.drop_path):
        raise UsageError(f"--drop-path is for the plain ViT, and this is {config.network.describe()}: leave it out")
    if config.tune_epochs is not None and not config.lr_grid:
        raise UsageError(f"--tune-epochs {config.tune_epochs} is about --tune-lr: name rates to try, or leave it out")
    if config.metric.share and config.target >= 1:
        raise UsageError(f"--target {config.target:g} is no accuracy: pass a share between 0 and 1")
    if recipe.batch_size > config.train_items:
        raise UsageError(
            f"--batch-size {recipe.batch_size} is more than the {config.train_items} training {config.items}: pass at "
            "most that many"
        )
    for pair in config.contrasts:
        for arm in pair:
            if arm not in config.arms:
                raise UsageError(f"--contrasts names {arm}, which is not trained: choose from {', '.join(config.arms)}")
        if pair[0] == pair[1]:
            raise UsageError(f"--contrasts {pair[0]}:{pair[1]} compares an arm with itself")


def _flat(data: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(data, dict) or not data:
        return {prefix.removesuffix("."): data}
    flat: dict[str, Any] = {}
    for key, value in data.items():
        flat.update(_flat(value, f"{prefix}{key}."))
    return flat
