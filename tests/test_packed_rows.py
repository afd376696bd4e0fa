"""The order of the rows of packed projections: told by the weights, by a configuration, or by the user."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import attnlens
from attnlens.cli import main
from attnlens.errors import UnsupportedAttentionError, UsageError
from tests.checkpoint_files import SMALL, TINY, alphas, plain_alphas, saved, state, vit


@pytest.fixture
def plain(tmp_path):
    """Return what files of the two networks alone give."""
    return plain_alphas(tmp_path)


ORDERS = ("qkv,head,dim", "head,qkv,dim", "head,dim,qkv", "4,qvk,head,dim")


def trained(order, heads=8, width=96, depth=3):
    """Return packed projections of that order whose rows of V and columns of O are tied as weight decay ties them."""
    draw = np.random.default_rng(0)
    stored, meant = {}, {}
    for layer in range(depth):
        size = np.exp(draw.normal(scale=0.4, size=width))
        q, k, v = (draw.normal(size=(width, width)) for _ in "qkv")
        v, o = v * size[:, None], draw.normal(size=(width, width)) * size
        meant |= {f"blocks.{layer}.attn.qkv.weight": np.concatenate([q, k, v]), f"blocks.{layer}.attn.proj.weight": o}
        dim = width // heads
        by_head = {role: w.reshape(heads, dim, width) for role, w in (("q", q), ("k", k), ("v", v))}
        rows = {
            "qkv,head,dim": np.stack([by_head[r] for r in "qkv"]),
            "head,qkv,dim": np.stack([by_head[r] for r in "qkv"], 1),
            "head,dim,qkv": np.stack([by_head[r] for r in "qkv"], 2),
            "4,qvk,head,dim": np.stack([by_head[r].reshape(4, heads // 4, dim, width) for r in "qvk"], 1),
        }[order]
        stored |= {
            f"blocks.{layer}.attn.qkv.weight": rows.reshape(3 * width, width),
            f"blocks.{layer}.attn.proj.weight": o,
        }
    return [
        {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in one.items()} for one in (stored, meant)
    ]


@pytest.mark.parametrize("order", ORDERS)
def test_the_weights_tell_another_order_of_rows_and_the_option_reads_it(tmp_path, order):
    stored, meant = trained(order)
    path, expected = saved(tmp_path, stored), alphas(saved(tmp_path, meant, "meant.pth"), num_heads=8)
    if order == "qkv,head,dim":
        (label,) = {spec.label for _, spec in attnlens.inspect(path, num_heads=8).specs}
        assert "rows ordered qkv,head,dim, which the weights bear out (correlation 0.9" in label
        assert alphas(path, num_heads=8) == expected
        return
    with pytest.raises(UsageError, match=f"Add row_order='{order}'"):
        alphas(path, num_heads=8)
    assert alphas(path, num_heads=8, row_order=order) == expected
    params = attnlens.fit_params(path, num_heads=8, row_order=order, fold="raw")
    assert params.sources[0].provenance["row_order"] == order


def test_a_config_beside_the_file_outranks_the_guess_of_an_order(tmp_path):
    stored, meant = trained("4,qvk,head,dim")
    (tmp_path / "folder").mkdir()
    save_file(stored, tmp_path / "folder" / "model.safetensors")
    (tmp_path / "folder" / "config.json").write_text('{"model_type": "codegen"}')
    assert alphas(tmp_path / "folder", num_heads=8) == alphas(saved(tmp_path, meant, "meant.pth"), num_heads=8)


def test_a_config_beside_the_file_that_describes_it_outranks_names_and_contradicts_another_head_count(tmp_path, plain):
    folder = tmp_path / "folder"
    folder.mkdir()
    save_file(state(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"architecture": TINY, "model_args": SMALL}))
    for path in (folder, folder / "model.safetensors"):
        found = attnlens.inspect(path, num_heads=3)
        assert found.provenance["architecture"] == TINY
        assert not any("guessed" in why for why in found.left_out())
        with pytest.raises(UsageError, match=r"by its config.json, stores 3 heads in each layer, not 6: leave out"):
            attnlens.inspect(path, num_heads=6)
    (folder / "config.json").write_text(json.dumps({"architecture": "vit_base_patch16_224", "model_args": SMALL}))
    assert alphas(folder, num_heads=3) == plain[0]
    (said,) = attnlens.inspect(folder, num_heads=3).left_out()
    assert said.endswith("; the config.json beside it does not describe these weights")


def test_the_order_of_rows_is_said_wherever_the_numbers_go(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stored, _ = trained("head,dim,qkv")
    path, words = str(saved(tmp_path, stored)), "rows ordered head,dim,qkv, as asked (correlation 0.9"
    given = {"num_heads": 8, "row_order": "head,dim,qkv", "fold": "raw"}
    params = attnlens.fit_params(path, **given)
    assert any(words in why for why in params.sources[0].left_out)
    assert words in params.to_json()
    assert words in attnlens.report(path, output=tmp_path / "page.html", **given)
    composed = attnlens.compose(path, **given)
    assert all(words in layer["label"] for layer in composed.to_json()["layers"])
    compared = attnlens.compare(path, path, **given)
    assert all(any(words in why for why in said) for said in compared.left_out.values())
    scanned = attnlens.scan(path, tmp_path / "scan", **given, workers=1)
    assert words in (tmp_path / "scan" / "scan.csv").read_text()
    assert attnlens.scan(path, tmp_path / "scan", **given, workers=1).measured == 0
    assert attnlens.scan(path, tmp_path / "scan", **given | {"row_order": "head,qkv,dim"}, workers=1).measured == 1
    assert words in scanned.rows()[0]["labels"]

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["attnlens", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code in (None, 0)

    options = ["--num-heads", "8", "--row-order", "head,dim,qkv", "--fold", "raw"]
    for command in (["inspect", path], ["fit-params", path], ["compose", path], ["compare", path, path]):
        run(*command, *options)
        assert words in capfd.readouterr().err.replace("\n", " ")
    run("scan", path, "-o", "scan", *options)
    assert words in capfd.readouterr().err.replace("\n", " ")


class Packed(torch.nn.Module):
    def __init__(self, tensors):
        super().__init__()
        self.blocks = torch.nn.ModuleList()
        for layer in range(3):
            block = torch.nn.Module()
            block.attn = torch.nn.Module()
            for name in ("qkv", "proj"):
                weight = tensors[f"blocks.{layer}.attn.{name}.weight"].float()
                setattr(block.attn, name, torch.nn.Linear(*weight.T.shape, bias=False))
                getattr(block.attn, name).weight.data = weight
            self.blocks.append(block)


def test_a_live_network_is_read_in_the_order_of_rows_that_is_asked_for():
    (stored, meant), given = trained("head,dim,qkv"), {"num_heads": 8, "fold": "raw"}
    module, expected = Packed(stored), attnlens.inspect(Packed(meant), **given).stats
    with pytest.raises(UsageError, match="Add row_order='head,dim,qkv'"):
        attnlens.inspect(module, **given)
    found = attnlens.inspect(module, row_order="head,dim,qkv", **given)
    assert found.stats.json_rows() == expected.json_rows()
    assert found.provenance["row_order"] == "head,dim,qkv"
    both = attnlens.inspect(Packed(meant), checkpoint=module.state_dict(), row_order="head,dim,qkv", **given)
    assert both.stats.json_rows() == expected.json_rows()


def test_an_order_of_rows_without_a_head_count_is_refused_and_not_ignored():
    with pytest.raises(UsageError, match="row_order goes with num_heads"):
        attnlens.inspect(vit(), row_order="head,dim,qkv")


@pytest.mark.parametrize("order", ["rows", "head,qkv", "head,qkv,dim,dim", "0,qkv,head,dim", "qkv,4,head,dim"])
def test_what_is_no_order_of_rows_is_refused(tmp_path, order):
    with pytest.raises(UsageError, match="is no order of rows"):
        alphas(saved(tmp_path, state()), num_heads=3, row_order=order)


def test_packed_rows_of_unequal_thirds_are_refused_where_names_do_not_tell_why(tmp_path):
    tensors = {"b.attn.qkv.weight": torch.randn(48, 8), "b.attn.proj.weight": torch.randn(8, 32)}
    with pytest.raises(UnsupportedAttentionError, match="keys of another width than values"):
        alphas(saved(tmp_path, tensors), num_heads=4)
