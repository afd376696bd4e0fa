"""Every architecture of the installed timm on the meta device: what is read, what is refused, and the census of it."""

import json
import os
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from attnlens.layouts import AttentionSpec, Refusal
from attnlens.layouts.describe import attention_modules
from attnlens.layouts.flags import FLAGS
from attnlens.layouts.spec import OPT_IN
from tests.layout_forms import skipped_where_timm_is_older

SHARED = Path(__file__).parent.parent.parent / "shared"
UNCOUNTED_OUTPUT = {"timm.models.cpubone.ConvAttention", "timm.models.lowformer.ConvAttention"}
"""Classes whose output width the census leaves open, as some of them project while they upsample."""
LETTERS_WITH_KIND = {"C5": "channel", "C6": "linear"}


def reference_file() -> Path:
    """Return where the census should be: ATTNLENS_TEST_REFERENCE, beside ATTNLENS_TEST_DATA, or in ../shared."""
    if "ATTNLENS_TEST_REFERENCE" in os.environ:
        return Path(os.environ["ATTNLENS_TEST_REFERENCE"])
    data = os.environ.get("ATTNLENS_TEST_DATA")
    return (Path(data).parent if data else SHARED) / "reference" / "timm_attention_census.json"


@cache
def census() -> dict:
    path = reference_file()
    return json.loads(path.read_text()) if path.is_file() else {"timm": "", "models": {}}


def architectures() -> list[str]:
    """Name all that the census and this timm share, and one more of each file of timm; all of timm without a census."""
    known, names = census()["models"], timm.list_models()
    others = {timm.models.model_entrypoint(name).__module__: name for name in reversed(names) if name not in known}
    return sorted([name for name in names if name in known] + list(others.values())) if known else names


@pytest.fixture(scope="module", params=architectures())
def described(request) -> tuple[str, list[AttentionSpec | Refusal], dict[str, tuple[int, ...]]]:
    """Return an architecture's name, its attention modules and the shapes of its state dict, from the meta device."""
    with skipped_where_timm_is_older(), torch.device("meta"):
        model = timm.create_model(request.param)
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    return request.param, list(attention_modules(model)), shapes


def seen(found: AttentionSpec | Refusal, shapes: dict) -> tuple:
    """Return what the census says of a module: class, letter and, where it is read, heads and widths."""
    if isinstance(found, Refusal):
        return (found.module_class, found.family)
    groups = found.v if "differential" in found.leaves_out else found.k  # the census counts value heads there
    out = shapes[found.o.tensor][0] if found.o else found.q.heads * found.v.width
    width = shapes[found.q.named(found.q.tensor)[0]][1]
    heads = (found.q.heads, groups.heads, found.q.width, found.v.width)
    return (found.module_class, found.family, *heads, width, None if found.module_class in UNCOUNTED_OUTPUT else out)


def counted(name: str, refused: set[tuple[str, str]]) -> Counter:
    """Return the census of an architecture in the same form."""
    total: Counter = Counter()
    for kind in census()["models"].get(name, {"attention": []})["attention"]:
        about = (kind["module"], kind["cls"])
        widths = ("heads", "kv_heads", "head_dim", "value_dim", "in_q", "out")
        total[about if about in refused else (*about, *(kind[width] for width in widths))] += kind["count"]
    return total


def hold_inside(spec: AttentionSpec, shapes: dict) -> None:
    """Assert that every tensor a layout names is stored and large enough, and that its roles fit each other."""
    for slot in spec.slots().values():
        last = (slot.heads - 1) * slot.head_stride + (slot.width - 1) * slot.unit_stride
        for tensor in slot.named(slot.tensor):
            assert set(shapes[tensor][2:]) <= {1}, f"{tensor} is no matrix"
            assert slot.offset + last < shapes[tensor][slot.axis], tensor
        own_rows = spec.o is not slot
        for vector in slot.named(slot.bias) if slot.bias else ():
            assert not own_rows or slot.bias_offset + last < shapes[vector][0], vector
        for norm in slot.named(slot.batch_norm) if slot.batch_norm else ():
            size = shapes[f"{norm}.weight"][0]
            assert slot.batch_norm_offset + last < size if own_rows else size == shapes[slot.tensor][0], norm
    assert spec.q.width == spec.k.width
    assert spec.q.heads % spec.k.heads == spec.q.heads % spec.v.heads == 0
    if spec.o is not None:
        assert spec.o.width == spec.v.width
        assert spec.o.heads in (spec.q.heads, spec.v.heads)


@pytest.mark.slow
def test_every_attention_module_is_read_labelled_or_refused(described):
    _, found, shapes = described
    for item in found:
        if isinstance(item, Refusal):
            assert item.reason
            continue
        assert set(item.tensors()) <= set(shapes)
        hold_inside(item, shapes)
        assert np.isfinite(item.scale)
        assert item.scale > 0
        assert set(item.leaves_out) <= set(FLAGS)
        assert item.kind == LETTERS_WITH_KIND.get(item.family, "token")
        assert (item.opt_in_refusal() is not None) == (item.kind in OPT_IN)
        assert "guessed" not in item.label


@pytest.mark.slow
def test_counts_heads_and_widths_agree_with_the_census(described):
    name, found, shapes = described
    same = census()["timm"] == timm.__version__
    if not census()["models"]:
        pytest.skip(f"no census at {reference_file()}: set ATTNLENS_TEST_REFERENCE to the file")
    if not same and name not in census()["models"]:
        pytest.skip(f"the census is of timm {census()['timm']} and does not know {name}")
    refused = {(item.module_class, item.family) for item in found if isinstance(item, Refusal)}
    read, expected = Counter(seen(item, shapes) for item in found), counted(name, refused)
    if not same:  # classes move between versions, layers do not
        read, expected = (Counter(key[2:] for key in total.elements()) for total in (read, expected))
    assert read == expected
