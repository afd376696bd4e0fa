"""Pickles that end well: trees of what training scripts keep, and programs of operations that hold a stack together."""

from __future__ import annotations

import argparse
import collections
import io
import pickle
import pickletools
import random
import struct
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from benchmarks.trust import payloads

_KEYS = ("state_dict", "model", "model_ema", "net", "ema", "params", "\x1b[2J", "", "a.b", "teacher", "epoch", 3, -1, 2**70, 0.5, True)  # fmt: skip  # noqa: E501
_NAMES = ("collections OrderedDict", "argparse Namespace", "numpy ndarray", "torch.nn.modules.linear Linear", "__main__ Model", "builtins set", "builtins getattr", "torch Size", "torch._tensor Tensor", "torch.nn.parameter Parameter", "x\x1b[2J y", "collections defaultdict", "builtins complex", "torch.device x", "functools partial")  # fmt: skip  # noqa: E501
"""Globals that are names here, whatever they would do elsewhere."""


def tree(rng: random.Random, state: dict[str, Any]) -> Any:
    """Return weights among what else is kept: in dictionaries, lists, modules and parameters."""
    import torch

    way = rng.randrange(9)
    if way == 0:
        return state
    if way == 1:
        kept = collections.OrderedDict(state)
        kept._metadata = {"": {"version": rng.choice((1, 10**9, None, "\x1b"))}}  # type: ignore[attr-defined]  # noqa: SLF001
        return kept
    if way == 2:
        return {name: torch.nn.Parameter(value, requires_grad=False) for name, value in state.items()}
    if way == 3:
        return [state, {"lr": 0.1}]
    if way == 4:  # dictionaries in dictionaries, a level a dot
        root: dict[str, Any] = {}
        for name, value in state.items():
            place, *parts = root, *name.split(".")
            for part in parts[:-1][:60]:
                place = place.setdefault(part, {})
                if not isinstance(place, dict):
                    break
            else:
                place[parts[-1]] = value
        return root
    if way == 5:
        whole = torch.nn.Module()
        for number, value in enumerate(state.values()):
            whole.register_buffer(f"b{number}", value)
        return rng.choice((whole, {"model": whole, "args": argparse.Namespace(arch=rng.choice(payloads.NAMES))}))
    extra = {
        "args": argparse.Namespace(model=rng.choice(("vit_tiny_patch16_224", *payloads.NAMES)), p=PurePosixPath("r")),
        "arch": rng.choice(payloads.NAMES),
        "best": np.float64("nan"),
        "seen": collections.Counter("ab"),
        "rng": np.random.default_rng(0).bit_generator.state,
        "none": None,
        "when": (1, 2.5, "x"),
    }
    chosen = {name: extra[name] for name in rng.sample(list(extra), rng.randrange(5))}
    held = {key: state if rng.random() < 0.5 else dict(state) for key in rng.sample(_KEYS, rng.choice((1, 2, 3)))}
    return {**chosen, **held} if rng.random() < 0.5 else {**held, **chosen}


def program(rng: random.Random, whole: bytes) -> bytes:
    """Return a pickle with operations put where they leave what stands on the stack as it is, or numbers exchanged."""
    operations = list(pickletools.genops(whole))
    starts = [position for _, _, position in operations if position]
    out, end = io.BytesIO(), len(whole)
    chosen = set(rng.sample(starts, min(len(starts), rng.choice((0, 1, 3)))))
    exchange = rng.random() < 0.4
    numbers = [p for op, _, p in operations if op.name in ("BININT1", "BININT")]
    swapped = rng.choice(numbers) if numbers and exchange else -1
    for (operation, argument, position), after in zip(operations, [*starts, end], strict=False):
        if position in chosen:
            out.write(_nothing(rng))
        if position == swapped:  # sizes, strides, offsets, counts of elements
            out.write(b"J" + struct.pack("<i", rng.choice((0, 1, 2, int(argument) + 1, 2**31 - 1))))
        else:
            out.write(whole[position : after or end])
        del operation
    return out.getvalue()


def _nothing(rng: random.Random) -> bytes:
    """Return operations that push a value and take it off again."""
    value = _value(rng, 3)
    return rng.choice((value + b"0", b"(" + value + value + b"1", value + b"20" + b"0", b"(" + value + b"l0"))


def _value(rng: random.Random, depth: int) -> bytes:
    """Return operations that leave one value, of any make."""
    leaves = (
        *(b"F0.5\n", b"U\x01a"),
        *(b"N", b"\x88", b"\x89", b"K\x07", b"M\x00\x01", b"J\xff\xff\xff\xff", b"I01\n", b"I-7\n", b"L7L\n"),
        *(b"\x8a\x00", b"\x8a\x01\xff", b"\x8b\x01\x00\x00\x00\x01", b"G" + struct.pack(">d", 1e308), b"S'a'\n"),
        *(b"C\x01\xff", b"B\x01\x00\x00\x00a", b"\x8e" + struct.pack("<Q", 1) + b"a", b"Va\\u0041\n", b"\x8c\x01b"),
        *(b"\x8d" + struct.pack("<Q", 2) + b"ab", b"\x96" + struct.pack("<Q", 1) + b"a", b"]", b"}", b")", b"\x8f"),
        pickle.dumps(rng.choice(payloads.VALUES), 2)[2:-1],
    )  # fmt: skip
    if not depth or rng.random() < 0.4:
        return rng.choice(leaves)
    inner = [_value(rng, depth - 1) for _ in range(2)]
    module, _, name = rng.choice(_NAMES).partition(" ")
    found = f"c{module}\n{name}\n".encode()
    return rng.choice(
        (
            b"(" + inner[0] + inner[1] + b"t",
            inner[0] + b"\x85",
            inner[0] + inner[1] + b"\x86",
            b"}" + inner[0] + inner[1] + b"s",
            b"}(" + inner[0] + inner[1] + b"u",
            b"(" + inner[0] + inner[1] + b"d",
            b"]" + inner[0] + b"a",
            b"](" + inner[0] + inner[1] + b"e",
            b"\x8f(" + inner[0] + b"\x90",
            b"(" + inner[0] + b"\x91",
            found + inner[0] + b"\x85R",
            found + b")\x81" + inner[0] + b"b",
            found + inner[0] + b"\x85}\x92",
            b"(" + found + inner[0] + b"o",
            b"(" + inner[0] + f"i{module}\n{name}\n".encode(),
            b"\x8c" + bytes((len(module),)) + module.encode() + b"\x8c" + bytes((len(name),)) + name.encode() + b"\x93",
            b"(" + payloads.text("storage") + found + payloads.text("0") + payloads.text("cpu") + b"K\x04tQ",
        )
    )
