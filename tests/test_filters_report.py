"""`report` and `compare` of depthwise filters: every layer with its numbers and verdict, pictures, distances."""

import base64
import json
import re

import numpy as np
import pytest

import attnlens
from attnlens.errors import UnsupportedAttentionError
from attnlens.filters.comparison import SHARES
from attnlens.inits import init_
from attnlens.reports import report
from attnlens.reports.filters import COLUMNS
from attnlens.templates import aligned, shown
from tests.filter_models import both, convmixer, vit

PICTURES = ("filter_covariance", "filter_spectra", "filter_profile")


def started(seed=0, **options):
    model = convmixer(dim=200)
    init_(model, "conv-covariance", seed=seed, **options)
    return model


def cells(page):
    """Every row of the table of filters: statistic by name."""
    table = page[page.index('id="filter-table"') :]
    body = table[table.index("<tbody>") : table.index("</tbody>")]
    return [dict(re.findall(r'data-name="(\w+)"[^>]*>([^<]*)<', row)) for row in body.split("<tr>")[1:]]


def test_every_layer_stands_in_the_page_with_its_numbers_and_verdict():
    model = started()
    rows = list(attnlens.inspect(model).filters.stats.records())
    found = cells(report(model))
    assert len(found) == len(rows) == 4
    for cell, row in zip(found, rows, strict=True):
        assert cell["verdict"] == row["verdict"] == "closed form"
        assert {name: float(cell[name]) for name in COLUMNS} == {name: float(shown(row[name])) for name in COLUMNS}
    for name in COLUMNS:
        assert [cell[name].strip() for cell in found] == [text.strip() for text in aligned(row[name] for row in rows)]


def test_a_width_that_was_not_found_is_told_in_the_page():
    found = cells(report(started(relative_s=1.0)))
    assert any(cell["relative_s"].endswith("(upper end)") for cell in found)


def test_covariances_spectra_and_profiles_are_pictures_inside_the_page():
    page = report(started())
    for name in PICTURES:
        (content,) = re.findall(rf'id="picture-{name}"><img [^>]*src="data:image/png;base64,([^"]+)"', page)
        assert base64.b64decode(content)[:8] == b"\x89PNG\r\n\x1a\n"
    assert "img-src data:" in page


def test_filters_alone_have_no_section_of_heads_and_attention_alone_none_of_filters():
    page = report(convmixer())
    assert 'id="heads"' not in page
    assert 'href="#heads"' not in page
    assert 'id="filters"' in page
    page = report(vit())
    assert 'id="heads"' in page
    assert 'id="filters"' not in page
    page = report(both())
    assert 'id="heads"' in page
    assert len(cells(page)) == 2


def test_a_filter_model_beside_another_has_distances_in_the_page():
    one, other = started(), started(1, blur=0.6, slope=0.1, contrast=0.0)
    page = report(one, compare=[other])
    (distance,) = attnlens.compare(one, other).filter_distances
    table = page[page.index('id="filter-distances"') :]
    assert f">{shown(distance['shares'])}<" in table
    assert "filter_comparison" not in attnlens.compare(vit(), vit(1)).distances


def test_the_distance_is_the_root_mean_square_over_depth_of_the_shares_apart():
    one, other = started(), started(1, blur=0.6, slope=0.1, contrast=0.0)
    comparison = attnlens.compare(one, other)
    (found,) = comparison.filter_distances
    assert comparison.distances == ()
    tables = [attnlens.inspect(model).filters.stats for model in (one, other)]
    t, grid = np.linspace(0, 1, 4), np.linspace(0, 1, 2001)
    apart = sum(
        (np.interp(grid, t, tables[0].column(share)) - np.interp(grid, t, tables[1].column(share))) ** 2
        for share in SHARES
    )
    ranks = [np.interp(grid, t, table.column("effective_rank") / 25) for table in tables]
    assert found["shares"] == pytest.approx(np.sqrt(np.trapezoid(apart, grid)), rel=1e-3)
    assert found["effective_rank"] == pytest.approx(np.sqrt(np.trapezoid((ranks[0] - ranks[1]) ** 2, grid)), rel=1e-3)
    (same,) = attnlens.compare(one, one).filter_distances
    assert (same["shares"], same["effective_rank"]) == (0, 0)
    assert found["shares"] > 0.3


def test_kernels_and_depths_may_differ_and_what_is_of_one_kind_is_compared():
    comparison = attnlens.compare(started(), convmixer(depth=7, kernel_size=3), both(), vit())
    assert len(comparison.filter_distances) == 3
    assert len(comparison.distances) == 2  # QK and OV of the two that have attention
    assert set(comparison.figures()) == {"comparison", "filter_comparison"}
    assert set(attnlens.compare(vit(), vit(1)).figures()) == {"comparison"}
    with pytest.raises(UnsupportedAttentionError, match=r"no two .* one kind \(ConvMixer: depthwise filters, vit"):
        attnlens.compare(convmixer(), vit())


def test_the_command_prints_and_draws_the_comparison_of_filters(run, tmp_path):
    from safetensors.torch import save_file

    for name, model in (("one", started()), ("other", convmixer(1, in_chans=3))):
        save_file(model.state_dict(), tmp_path / f"{name}.safetensors")
    done = run("compare", "one.safetensors", "other.safetensors", "--figures", "figures")
    assert done.code == 0, done.err
    assert "Distance between depthwise" in done.out
    assert "Distance between effective structures" not in done.out
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["filter_comparison.png"]
    done = run("compare", "one.safetensors", "other.safetensors", "--figures", "figures", "--json")
    assert [row["second"] for row in json.loads(done.out)["filter_distances"]] == ["other"]
    done = run("report", "one.safetensors", "-o", "page.html")
    assert done.code == 0, done.err
    assert len(cells((tmp_path / "page.html").read_text())) == 5  # four layers, and the stem of one input channel
