"""`fitted` from a real pre-trained ViT re-fits to the source, and parameter files carry over."""

import re

import numpy as np
import pytest
import timm
import torch

from attnlens.errors import UsageError
from attnlens.fit.fit_params import fit_params
from attnlens.inits import create_model, init_
from tests.test_inits_names import SMALL, vit

ARCH = "vit_small_patch14_dinov2"


@pytest.fixture(scope="module", params=["raw", "effective"])
def source(request, dinov2_file):
    return fit_params(ARCH, checkpoint=dinov2_file, fold=request.param)


@pytest.fixture(scope="module")
def fresh():
    """The architecture of the source with weights timm draws, LayerScale 1e-5 and all."""
    torch.manual_seed(0)
    return timm.create_model(ARCH, img_size=56)


def entries(params, circuit, head):
    return {(e.layer, e.head): e for e in params.select(circuit, head)}


@pytest.fixture(scope="module")
def refit(source, fresh):
    """The fit of a network that was initialised with the source's."""
    init_(fresh, "fitted", params=source, seed=0)
    return fit_params(fresh, fold=source.fold)


def inside(wanted, found, name):
    return [
        getattr(w, f"{name}_low") <= getattr(e, name) <= getattr(w, f"{name}_high")
        for w, e in zip(wanted, found, strict=True)
    ]


@pytest.mark.weights
def test_every_qk_head_and_every_layers_ov_refit_within_the_sources_intervals(source, refit):
    for circuit, head, count in (("qk", "each", 72), ("ov", "all", 12)):
        wanted, found = entries(source, circuit, head), entries(refit, circuit, head)
        assert list(found) == list(wanted)
        assert len(found) == count
        assert all(entry.reachable for entry in wanted.values())
        for name in ("alpha", "beta"):
            assert all(inside(wanted.values(), found.values(), name)), (circuit, name)


@pytest.mark.weights
def test_heads_exchanged_would_not_refit(source, refit):
    """The test above can fail: the intervals tell one head from the next."""
    wanted, found = entries(source, "qk", "each"), entries(refit, "qk", "each")
    shifted = [wanted[layer, (head + 1) % 6] for layer, head in found]
    assert np.mean(inside(shifted, found.values(), "alpha")) < 0.6


@pytest.mark.weights
def test_ov_head_by_head_is_the_other_option(source, refit, fresh):  # refit first: it reads the same network
    """Of 72 draws a few betas may lie farther from the source than both 95% intervals allow: each has a spread."""
    init_(fresh, "fitted", params=source, ov="head")
    again = fit_params(fresh, fold=source.fold)
    wanted, found = entries(source, "ov", "each"), entries(again, "ov", "each")
    assert len(found) == 72
    assert all(inside(wanted.values(), found.values(), "alpha"))
    spread = [
        np.hypot(*((each.beta_high - each.beta_low) / 2 for each in pair))
        for pair in zip(wanted.values(), found.values(), strict=True)
    ]
    apart = [abs(w.beta - found[head].beta) for head, w in wanted.items()]
    assert np.mean(np.array(apart) <= spread) >= source.level
    assert not all(inside(wanted.values(), entries(refit, "ov", "each").values(), "alpha"))


def test_requests_are_realised_at_another_head_width():
    source, target = vit(1, embed_dim=96, num_heads=3), vit(2, embed_dim=96, num_heads=12)
    init_(source, "mimetic")
    params = fit_params(source, fold="raw")
    report = init_(target, "fitted", params=params)
    rows = [row for row in report.products if row.circuit == "qk"]
    assert len(rows) == 36
    assert np.mean([row.requested_alpha for row in rows]) == pytest.approx(0.7, abs=0.02)
    assert np.mean([row.requested_beta for row in rows]) == pytest.approx(0.7, abs=0.02)
    for row in rows:  # other rank, other realised parameters
        assert row.alpha == pytest.approx(row.expected_alpha, rel=0.06)
        assert row.expected_beta < 0.7 * 0.4


def test_a_file_a_model_and_parameters_give_the_same_network(tmp_path):
    source = vit(3)
    init_(source, "mimetic")
    params = fit_params(source)
    path = params.save(tmp_path / "params.json")
    made = [
        create_model("vit_tiny_patch16_224", init="fitted", init_options={"params": given}, **SMALL)
        for given in (params, path, str(path), source)
    ]
    first = made[0].state_dict()
    for other in made[1:]:
        assert all(torch.equal(tensor, first[name]) for name, tensor in other.state_dict().items())


def test_parameters_of_centred_products_are_refused():
    source = vit(3)
    params = fit_params(source, fold="raw").model_copy(update={"fold": "centred"})
    with pytest.raises(UsageError, match=re.escape("fold='raw' or 'effective'")):
        init_(vit(), "fitted", params=params)
