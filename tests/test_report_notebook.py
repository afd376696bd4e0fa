"""What a notebook shows: the numbers of the table, escaped, with a figure and nothing from outside."""

import base64
import io
from html.parser import HTMLParser

import pytest
from PIL import Image

import attnlens
from tests.test_inspect import small_vit


class Cells(HTMLParser):
    """The text of every table cell, row by row, and the sources of images."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.images, self._open = [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "img":
            self.images.append(dict(attributes)["src"])
        self._open = tag in ("td", "th")

    def handle_endtag(self, _tag):
        self._open = False

    def handle_data(self, data):
        if self._open:
            self.rows[-1][-1] += data


def picture(cells):
    (source,) = cells.images
    head, _, data = source.partition(",")
    assert head == "data:image/png;base64"
    return Image.open(io.BytesIO(base64.b64decode(data)))


def test_an_inspection_shows_its_table_and_profiles():
    inspection = attnlens.inspect()
    cells = Cells(inspection._repr_html_())
    head, *rows = cells.rows
    assert len(rows) == len(inspection.layers)
    total = inspection.stats.select(layer=2, head="all", fold="effective").column("beta")[0]
    assert float(rows[2][head.index("OV sum β effective")]) == pytest.approx(total, rel=5e-4)
    mean = inspection.stats.select(layer=2, circuit="qk", fold="raw").column("alpha").mean()
    assert float(rows[2][head.index("QK α raw")]) == pytest.approx(mean, rel=5e-4)
    assert picture(cells).width > 500


def test_parameters_show_fit_verdict_and_request():
    params = attnlens.fit_params()
    cells = Cells(params._repr_html_())
    head, *rows = cells.rows
    assert len(rows) == 6
    (entry,) = params.select("ov", "all", 4)
    assert rows[4][head.index("OV verdict")] == entry.verdict
    low, high = map(float, rows[4][head.index("OV β interval")].split(" to "))
    assert (low, high) == pytest.approx((entry.beta_low, entry.beta_high), rel=5e-4)
    assert picture(cells).width > 300


def test_names_are_escaped(tmp_path):
    import json

    from safetensors.torch import save_model

    from tests.test_inspect import SMALL

    folder = tmp_path / "<script>x"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architecture": "vit_tiny_patch16_224", "model_args": SMALL}))
    save_model(small_vit(), folder / "model.safetensors")
    for shown in (attnlens.inspect(folder), attnlens.fit_params(folder)):
        text = shown._repr_html_()
        assert "<script>" not in text
        assert "&lt;script&gt;x" in text
