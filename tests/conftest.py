"""Shared fixtures: random heads of prime sizes, the command line in process, the real weights if at hand."""

import os
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from tests import shapes_checked  # noqa: F401  # before any module of the core is imported

# isort: split
from attnlens import cli
from attnlens.heads import HeadWeights
from tests.hub_server import Hub, serve

ROOT = Path(__file__).parent.parent
SLOW = """
    benchmark_speed bounded catalogue docs extending families_forward faults figure_styles filters_inspect
    filters_params filters_report filters_trained fitting hostile hub inference inits_borders inits_files inits_fitted
    inits_gains inits_mistakes inits_reduced inits_routes inits_stored inits_transformers inits_verify inverse
    layouts_census layouts_forward layouts_roundtrip live_networks notebook outputs packaging printable_figures
    regression_counts report report_browser scan scan_ray shipped_layouts signal_rewiring sizes state terminal threads
    trace tracking tracking_page training_checkpoints training_config_file training_datasets training_display
    training_families training_folders training_hardware training_ladder training_live training_meta training_recipe
    training_runs vocabulary weight_sizes
"""
"""Files that `make test-fast` leaves out: together nine tenths of the time, in which networks are built and trained,
commands run as processes, and statistics simulated."""


def pytest_collection_modifyitems(items):
    """Mark every test of a slow file."""
    slow = {f"test_{name}" for name in SLOW.split()}
    for item in items:
        if item.path.stem in slow:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory):
    """Keep architecture descriptions of the test run out of the user's cache."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def dinov2_file() -> Path:
    """Return the DINOv2-family ViT-S in shared/data, or skip."""
    return _real("vit_small_patch14_dinov2.safetensors")


@pytest.fixture(scope="session")
def lite0_file() -> Path:
    """Return the depthwise filters of EfficientNet-Lite0 in shared/data, or skip."""
    return _real("efficientnet_lite0_depthwise.safetensors")


def _real(name: str) -> Path:
    folder = Path(os.environ.get("ATTNLENS_TEST_DATA", ROOT.parent / "shared" / "data"))
    path = folder / name
    if not path.is_file():
        pytest.skip(f"real weights are not at hand: {path.name} is neither in ../shared/data nor in ATTNLENS_TEST_DATA")
    return path


def _close_session():
    """Drop the connections huggingface_hub keeps: the function's name changed with version 1."""
    import huggingface_hub

    if hasattr(huggingface_hub, "close_session"):
        huggingface_hub.close_session()
    else:
        huggingface_hub.utils.reset_sessions()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Serve a hub on 127.0.0.1, with empty caches; this process is pointed at it, subprocesses by `hub_environment`."""
    from huggingface_hub import constants

    served = Hub()
    server = serve(served)
    monkeypatch.setattr(constants, "ENDPOINT", served.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", served.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("attnlens.checkpoints.transport.RETRY_WAITS", (0.01, 0.01, 0.01))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield served
    _close_session()
    server.shutdown()
    server.server_close()


@pytest.fixture
def hub_environment(hub, tmp_path):
    """Return the environment in which a subprocess uses `hub` and the caches of this test."""
    own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
    return {**{name: value for name, value in os.environ.items() if not name.startswith("HF_")}, **own}


class Done(NamedTuple):
    """What a command in process left behind."""

    code: int
    out: str
    err: str


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Run a command in process, in an empty folder; return its exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["attnlens", *map(str, arguments)])
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        return Done(code, *capsys.readouterr())

    return call


def random_heads(seed=0, *, heads=6, kv_heads=3, embed_dim=13, head_dim=5, value_dim=7, out_dim=13, layer=2):
    """Return random heads of distinct prime sizes, so that no axis swap or transpose can hide."""
    rng = np.random.default_rng(seed)
    return HeadWeights(
        layer=layer,
        name="blocks.2.attn",
        W_Q=rng.normal(size=(heads, embed_dim, head_dim)),
        W_K=rng.normal(size=(kv_heads, embed_dim, head_dim)),
        W_V=rng.normal(size=(kv_heads, embed_dim, value_dim)),
        W_O=rng.normal(size=(heads, value_dim, out_dim)),
        b_Q=rng.normal(size=(heads, head_dim)),
        b_K=rng.normal(size=(kv_heads, head_dim)),
        b_V=rng.normal(size=(kv_heads, value_dim)),
        b_O=rng.normal(size=out_dim),
        norm_gain=rng.normal(size=embed_dim),
        norm_centres=True,
        layer_scale=rng.normal(size=out_dim),
        scale=head_dim**-0.5,
    )
