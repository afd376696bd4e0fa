"""What a comparison is: everything its result depends on, in one frozen object with a hash."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from attnlens.errors import UsageError

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


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Shape(_Part):
    """Sizes of the plain ViT that every arm trains."""

    image_size: int = Field(ge=1)
    patch_size: int = Field(ge=1)
    channels: int = Field(ge=1)
    classes: int = Field(ge=2)
    embed_dim: int = Field(ge=4)
    depth: int = Field(ge=1)
    num_heads: int = Field(ge=1)
    mlp_ratio: float = Field(gt=0)

    @property
    def tokens(self) -> int:
        """Number of patches."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def training_flops(self) -> float:
        """Return the floating-point operations of one training image, forward and backward, matrix products only.

        ``depth T (3 (8 + 4 r) d^2 + 14 T d)``: linear layers three times, attention 3.5 times its forward pass, as a
        fused backward pass forms the scores again; r is the MLP's ratio, T the number of tokens.
        """
        d, linear = self.embed_dim, 3 * (8 + 4 * self.mlp_ratio)
        return self.depth * self.tokens * (linear * d**2 + 14 * self.tokens * d)

    @property
    def training_bytes(self) -> float:
        """Return the bytes of memory traffic of one training image in bfloat16, derived and not measured.

        106 reads or writes of a token's d channels in each layer: what lies behind the byte bound of 24,000 images/s
        at 3.0 TB/s for width 192, depth 12 and 256 tokens, when nothing but element-wise chains is fused.
        """
        return 106 * 2 * self.depth * self.tokens * self.embed_dim


class Recipe(_Part):
    """How every arm is trained: AdamW, linear warm-up, cosine to ``min_lr``, gradient norm clipped per model."""

    epochs: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    lr: float = Field(gt=0)
    min_lr: float = Field(default=1e-6, ge=0)
    warmup: float = Field(default=0.1, ge=0, lt=1, description="share of the steps")
    weight_decay: float = Field(default=0.05, ge=0)
    clip_norm: float = Field(default=1.0, gt=0)
    augment: Augmentation = "none"


class Config(_Part):
    """Everything a comparison's numbers depend on. What only moves work about (workers, budget, folder) is not here."""

    dataset: str
    data_sha256: str
    train_images: int = Field(ge=1)
    test_images: int = Field(ge=1)
    mean: list[float]
    std: list[float]
    source: dict[str, Any] = Field(description="the pre-trained model: name, hash")
    params_sha256: str = Field(description="of the requests that the fitted arm draws with")
    shape: Shape
    recipe: Recipe
    arms: list[str] = Field(min_length=1)
    contrasts: list[tuple[str, str]]
    seeds: int = Field(ge=1, lt=TUNING_SEEDS)
    data_seed: int = Field(ge=0)
    init_seed: int = Field(ge=0)
    target: float = Field(gt=0, lt=1, description="the accuracy X of epochs-to-X")
    eval_every: int = Field(ge=1)
    lr_grid: list[float] = Field(description="empty: every arm trains with the recipe's lr")
    tune_seeds: int = Field(ge=1)
    device: Literal["cpu", "cuda"]
    precision: Literal["float32", "bfloat16"]
    compiled: bool
    stack: int = Field(ge=1, description="models trained in one batched model")

    def sha256(self) -> str:
        """Return the hash of the whole configuration."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()

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
        """Whether accuracy and structure are measured after this many epochs; 0 and the last always are."""
        return epoch % self.eval_every == 0 or epoch == self.recipe.epochs

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return self.train_images // self.recipe.batch_size


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
    """Refuse sizes that do not go together. Raises `UsageError`."""
    shape, recipe = config.shape, config.recipe
    if shape.image_size % shape.patch_size:
        raise UsageError(
            f"--patch-size {shape.patch_size} does not divide the images of {config.dataset}, "
            f"{shape.image_size} pixels wide"
        )
    if shape.embed_dim % shape.num_heads or shape.embed_dim % 4:
        raise UsageError(
            f"width {shape.embed_dim} with {shape.num_heads} heads: sin-cos positions need a multiple of 4, "
            "and heads must divide it. Name another --model"
        )
    if recipe.batch_size > config.train_images:
        raise UsageError(
            f"--batch-size {recipe.batch_size} is more than the {config.train_images} training images: pass at most "
            "that many"
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
    found: dict[str, Any] = {}
    for key, value in data.items():
        found.update(_flat(value, f"{prefix}{key}."))
    return found
