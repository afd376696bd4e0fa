"""From a transformers ``config.json`` and the tensors of a file to an `Architecture`."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from operator import itemgetter

from attnlens.checkpoints import Checkpoint
from attnlens.checkpoints.codes import DEQUANTISED
from attnlens.errors import CheckpointError, ModelNotFoundError
from attnlens.layouts.spec import AttentionSpec, NormSpec, Refusal, Slot
from attnlens.models.architecture import Architecture
from attnlens.models.by_tensor_names import find_groups
from attnlens.models.transformers import decoders, encoder_decoder, text, vision
from attnlens.models.transformers.stack import Config, Family, Role, Stack
from attnlens.words import counted

LARGEST_SIZE = 2**31
"""Below it is every number of layers, heads or units of a configuration; products of a few are numbers of arrays."""


@cache
def families() -> dict[str, Family]:
    """Return the known families by ``model_type``."""
    modules = (vision, text, decoders, encoder_decoder)
    return {name: family for module in modules for family in module.FAMILIES for name in family.model_types}


def known_model_types() -> frozenset[str]:
    """Return every ``model_type`` that is read."""
    return frozenset(families())


def told_model_type(config: Config, stored: Checkpoint) -> str | None:
    """Tell the ``model_type`` of a configuration without one (all before 2020) by its sizes and the tensors' names.

    Where several have the same names, the shapes that a configuration calls for tell them apart. None where no family
    has all the names of a layer's projections and norm, or several fit equally well.
    """
    held: dict[str, int] = {}
    for model_type, family in families().items():
        stacks = [(stack, stack.of_config(config)) for stack in family.stacks]
        sized = [stack for stack, own in stacks if stack.is_of(own) and own.get(stack.heads) and own.get(stack.width)]
        held[model_type] = max((_names_held(stack, stored) for stack in sized), default=0)
    best = [model_type for model_type, count in held.items() if count == max(held.values()) > 0]
    fitting = best if _alike(best) else [model_type for model_type in best if _has_shapes(model_type, config, stored)]
    return fitting[0] if fitting and _alike(fitting) else None


def _alike(model_types: list[str]) -> bool:
    return all(families()[other].stacks == families()[model_types[0]].stacks for other in model_types)


def _has_shapes(model_type: str, config: Config, stored: Checkpoint) -> bool:
    """Whether a family's stacks have the shapes that the configuration calls for."""
    try:
        found = describe_transformers({**config, "model_type": model_type}, stored, "")
    except (CheckpointError, ModelNotFoundError):
        return False
    return all(name in stored and list(stored.shape(name)) == shape for name, shape in found.shapes.items())


def _names_held(stack: Stack, stored: Checkpoint) -> int:
    """Count the names of a stack's second layer, or its first, that a file holds; 0 where a needed one is missing."""
    try:
        prefix = find_prefix(stack, stored)
    except CheckpointError:
        return 0
    if prefix is None:
        return 0
    layer = 1 if prefix + stack.q.format(layer=1) in stored else 0
    first = stack.norm if layer or stack.first_norm is None else stack.first_norm
    needed = [*stack.projections().values(), *([first] if first else [])]
    further = [*stack.flags_stored, *([stack.layer_scale] if stack.layer_scale else [])]
    held = [prefix + name.format(layer=layer, before=layer - 1, last=0) in stored for name in (*needed, *further)]
    return sum(held) if all(held[: len(needed)]) else 0


def describe_transformers(config: Config, stored: Checkpoint, where: str) -> Architecture:
    """Describe the model a transformers configuration names, as far as ``stored`` holds its stacks.

    Shapes are those the configuration calls for, so that weights of another size are told apart. Attention the
    family's description does not cover is listed as refused. Raises `ModelNotFoundError` for an unknown ``model_type``
    or a configuration without sizes, `CheckpointError` for quantised weights or when no stack of the family is stored.
    """
    model_type = str(config["model_type"])
    family = families().get(model_type)
    if family is None:
        raise ModelNotFoundError(
            f"{where} has model_type {model_type!r}, which is not known: give the weight file and --num-heads, to read "
            f"it by its tensors' names. Known are {', '.join(sorted(families()))}"
        )
    if config.get("quantization_config") and DEQUANTISED not in stored.computed:
        raise CheckpointError(
            f"{where} says that the weights are quantised: what is stored is not what the network applies. Give the "
            "model it was made from"
        )
    classes = config.get("architectures")
    title = classes[0] if isinstance(classes, list) and classes and isinstance(classes[0], str) else model_type
    sides: dict[str, list[tuple[int, AttentionSpec]]] = {}
    shapes: dict[str, list[int]] = {}
    for stack in family.stacks:
        own = stack.of_config(config)
        prefix = find_prefix(stack, stored) if stack.is_of(own) else None
        if prefix is None:
            continue
        placed = Placed(stack, prefix, _sizes(stack, own, where, stored), stored)
        for layer in range(placed.sizes.depth):
            spec = placed.spec(layer, family.name, f"transformers.{title}")
            sides.setdefault(prefix + stack.path.partition("{")[0], []).append((layer, spec))
            shapes |= placed.shapes(layer)
    # Stacks that share a block, as a decoder's self and cross attention do, follow each other block by block.
    specs = [spec for side in sides.values() for _, spec in sorted(side, key=itemgetter(0))]
    if not specs:
        wanted = family.stacks[0].q.format(layer=0)
        raise CheckpointError(f"the weights are not of a {model_type}, which {where} names: {wanted} is missing")
    known = {name for spec in specs for name in spec.tensors()}
    refused = tuple(
        Refusal(group.path, "attention", "unknown", f"is not covered by the description of {model_type}")
        for group in find_groups(stored)
        if group.q not in known
    )
    order = (*(spec.path for spec in specs), *(refusal.path for refusal in refused))
    return Architecture(model_type, tuple(specs), refused, order, shapes, {})


@dataclass(frozen=True)
class Sizes:
    """What the configuration says of a stack."""

    config: Config
    depth: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    source_depth: int


def _sizes(stack: Stack, config: Config, where: str, stored: Checkpoint) -> Sizes:
    """Read depth, width and heads from the configuration; there are no more layers than tensors."""

    def number(name: str, default: int | None = None) -> int:
        value = config.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < LARGEST_SIZE:
            raise ModelNotFoundError(
                f"{name} in {where} is {value!r:.30} where a number from 1 to {LARGEST_SIZE - 1} is needed: "
                "fix the file"
            )
        return value

    def first(names: str | tuple[str, ...]) -> int:
        several = (names,) if isinstance(names, str) else names
        return number(next((name for name in several if name in config), several[0]))

    heads, width = number(stack.heads), number(stack.width)
    kv_heads = number(stack.kv_heads, heads)
    depth = first(stack.depth) if stack.depth else 1
    source_depth = first(stack.source_depth) if stack.source_depth else 0
    if heads % kv_heads:
        raise ModelNotFoundError(
            f"{counted(heads, 'head')} in {where} cannot share {counted(kv_heads, 'key head')} evenly: fix the file"
        )
    if heads % stack.parts or kv_heads % stack.parts:
        raise ModelNotFoundError(
            f"{counted(heads, 'head')} in {where} cannot make {stack.parts} equal parts: fix the file"
        )
    if depth > len(stored):
        tensors = counted(len(stored), "tensor is", "tensors are")
        raise CheckpointError(f"{where} speaks of {counted(depth, 'layer')}, and {tensors} stored")
    head_dim = number(stack.head_dim, width // heads)
    return Sizes(config, depth, width, heads, kv_heads, head_dim, source_depth)


def find_prefix(stack: Stack, stored: Checkpoint) -> str | None:
    """Find what stands in front of the stack's names; None where the file does not hold it.

    A tower of a composed model must stand below its ``within``; a tower alone may be stored without it.
    """
    name = stack.q.format(layer=0)
    prefixes = [key.removesuffix(name) for key in stored if key == name or key.endswith(f".{name}")]
    prefixes = [prefix for prefix in prefixes if "{" not in prefix]  # a layout's own sign for a head's number
    inside = [prefix for prefix in prefixes if prefix.endswith(stack.within)]
    if inside or stack.section:
        prefixes = inside
    if len(prefixes) > 1:
        places = " and ".join(repr(prefix) for prefix in sorted(prefixes))
        raise CheckpointError(f"{name} is stored below {places}: save the one model that is meant alone")
    return prefixes[0] if prefixes else None


@dataclass(frozen=True)
class Placed:
    """A stack in a file: its names start with ``prefix``."""

    stack: Stack
    prefix: str
    sizes: Sizes
    stored: Checkpoint
    held: dict[str, bool] = field(default_factory=dict)

    def name(self, template: str, layer: int) -> str:
        """Return a tensor's name in full."""
        return self.prefix + template.format(layer=layer, before=layer - 1, last=self.sizes.source_depth - 1)

    def holds(self, template: str) -> bool:
        """Whether any layer has such a tensor; then every layer must."""
        if template not in self.held:
            names = (self.name(template, layer) for layer in range(self.sizes.depth))
            self.held[template] = any(name in self.stored for name in names)
        return self.held[template]

    def spec(self, layer: int, family: str, module_class: str) -> AttentionSpec:
        """Describe one layer."""
        scaled = self.stack.layer_scale is not None and self.holds(self.stack.layer_scale)
        return AttentionSpec(
            path=self.name(self.stack.path, layer),
            module_class=module_class,
            family=family,
            q=self.slot("q", layer),
            k=self.slot("k", layer),
            v=self.slot("v", layer),
            o=self.slot("o", layer),
            scale=self.stack.scale(self.sizes.config, layer, self.sizes.head_dim),
            norms=self.norms(layer),
            layer_scale=self.name(self.stack.layer_scale, layer) if self.stack.layer_scale and scaled else None,
            leaves_out=self.flags(),
        )

    def slot(self, role: Role, layer: int) -> Slot:
        """Describe one projection of a layer."""
        stack, sizes = self.stack, self.sizes
        template = stack.projections()[role]
        heads = sizes.kv_heads if role in "kv" else sizes.heads
        packed = stack.q == stack.k == stack.v and role != "o"
        offset, stride, group, group_stride = self.place(role) if packed else (0, sizes.head_dim, None, 0)
        return Slot(
            tensor=self.name(template, layer),
            heads=heads,
            width=sizes.head_dim,
            head_stride=stride,
            group=group,
            group_stride=group_stride,
            offset=offset,
            axis=int((role == "o") != stack.stored_in_out),
            bias=self.name(_bias(template), layer) if self.holds(_bias(template)) else None,
            bias_offset=offset,
        )

    def place(self, role: Role) -> tuple[int, int, int | None, int]:
        """Return offset and stride of a role's heads in the packed rows; heads to a group and from group to group."""
        dim, parts = self.sizes.head_dim, self.stack.parts
        if self.stack.head_first:
            queries = self.sizes.heads // self.sizes.kv_heads
            one = dim * (queries + 2)
            return (0, dim, queries, one) if role == "q" else (dim * (queries + "kv".index(role)), one, None, 0)
        counts = {"q": self.sizes.heads // parts, "k": self.sizes.kv_heads // parts, "v": self.sizes.kv_heads // parts}
        before = self.stack.roles.partition(role)[0]
        offset = dim * sum(counts[other] for other in before)
        return (offset, dim, counts[role], dim * sum(counts.values())) if parts > 1 else (offset, dim, None, 0)

    def norms(self, layer: int) -> tuple[NormSpec, ...]:
        """Describe the norms whose output a layer's projections read."""
        stack = self.stack
        template = stack.norm if layer or stack.first_norm is None else stack.first_norm
        own = self.norm(template, layer, "q" if stack.kv_norm else stack.norm_roles)
        return (*own, *self.norm(stack.kv_norm, layer, "kv")) if stack.kv_norm else own

    def norm(self, template: str, layer: int, roles: str) -> tuple[NormSpec, ...]:
        """Describe one of them; none where the template is empty."""
        if not template:
            return ()
        stack, name = self.stack, self.name(template, layer)
        older = name.removesuffix("weight") + "gamma"  # as TensorFlow named it, and BERT's own files still do
        if name not in self.stored and older in self.stored:
            name = older
        if layer == 0 and name in self.stored and self.stored.shape(name) != (self.sizes.width,):
            return ()  # ELECTRA: a projection stands between the embeddings' norm and the first layer
        return (NormSpec(kind=stack.norm_kind, roles=roles, weight=name, gain_offset=stack.gain_offset),)

    def flags(self) -> tuple[str, ...]:
        """Say what the layers apply beside their products."""
        stack, config = self.stack, self.sizes.config
        found = [*stack.flags]
        found += [flag for name, flag in stack.flags_set.items() if config.get(name)]
        found += [flag for name, flag in stack.flags_unset.items() if not config.get(name)]
        found += [flag for template, flag in stack.flags_stored.items() if self.holds(template)]
        if self.holds(_bias(stack.q)) or self.holds(_bias(stack.k)):
            found.append("qk_bias")
        return tuple(dict.fromkeys(found))

    def shapes(self, layer: int) -> dict[str, list[int]]:
        """Return the shape the configuration gives to every tensor of a layer."""
        spec, sizes = self.spec(layer, "", ""), self.sizes
        found: dict[str, list[int]] = {}
        for role, slot in spec.slots().items():
            inner = sum(one.heads * one.width for one in spec.slots().values() if one.tensor == slot.tensor)
            found[slot.tensor] = [sizes.width, inner] if slot.axis else [inner, sizes.width]
            if slot.bias:
                found[slot.bias] = [sizes.width if role == "o" else inner]
        vectors = [norm.weight for norm in spec.norms if norm.weight] + [spec.layer_scale or ""]
        return found | {name: [sizes.width] for name in vectors if name}


def _bias(template: str) -> str:
    return template.removesuffix("weight") + "bias"
