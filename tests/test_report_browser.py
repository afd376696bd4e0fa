"""The report in a real browser: no error, what is shown, what a click, a key, a phone and paper change."""

import base64
import io
import json
import shutil

import numpy as np
import pytest
from PIL import Image

import attnlens
from attnlens import reports
from attnlens.inspection import save_inspection
from tests.test_inspect import SMALL, small_vit
from tests.test_report import HOSTILE, results_folder

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")

pytestmark = pytest.mark.skipif(
    not (BROWSER and DRIVER), reason="Chromium and its driver are not installed: `make test-browser` installs them"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: make test-browser")
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    profile = tmp_path_factory.mktemp("profile")
    arguments = ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "window-size=1400,1000")
    for argument in (*arguments, f"user-data-dir={profile}"):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.set_page_load_timeout(60)
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Write stats.json and the report of the shipped model, and return both."""
    folder = tmp_path_factory.mktemp("report")
    stats = json.loads(save_inspection(attnlens.inspect(), folder, "attnlens inspect")["stats.json"].read_text())
    train = results_folder(folder / "results")
    (folder / "report.html").write_text(reports.report(compare=[small_vit()], train=train))
    return folder / "report.html", stats


def open_page(browser, url):
    """Open a report afresh, and wait until its script has run: the driver may return before that."""
    from selenium.webdriver.support.ui import WebDriverWait

    browser.get("about:blank")
    browser.get_log("browser")
    browser.get(url)
    title = "document.getElementById('detail-title')?.textContent"
    ready = f"return {title} !== undefined && {title} !== 'Choose a head'"
    WebDriverWait(browser, 30).until(lambda driver: driver.execute_script(ready))


@pytest.fixture
def page(browser, report):
    """Open the report anew, from a file:// address."""
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": []})
    open_page(browser, report[0].as_uri())
    return browser


def css(page, selector):
    return page.find_elements("css selector", selector)


def visible_rows(page):
    """Return the place of every row that is shown, and its numbers in full, in the order shown."""
    return page.execute_script(
        "return [...document.querySelectorAll('#table tbody tr')].filter((row) => row.offsetParent)"
        ".map((row) => ({layer: row.dataset.layer, head: row.dataset.head, fold: row.dataset.fold,"
        " cells: Object.fromEntries([...row.querySelectorAll('[data-name]')].map((cell) =>"
        " [cell.dataset.name, [cell.dataset.sort, cell.textContent]]))}))"
    )


def select(page, name, value):
    from selenium.webdriver.support.ui import Select

    Select(page.find_element("id", name)).select_by_visible_text(value)


def header(page, text):
    return next(th for th in css(page, "#table thead th") if th.text.startswith(text))


def test_it_loads_from_a_file_without_a_message_or_a_request(page):
    assert page.execute_script("return document.querySelectorAll('.plot svg').length") > 20
    assert page.get_log("browser") == []
    requests = page.execute_script("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert [name for name in requests if not name.startswith("data:")] == []


def test_every_number_of_the_table_equals_stats_json(page, report):
    select(page, "fold", "every fold")
    stats = {(str(r["layer"]), str(r["head"]), r["fold"], r["circuit"]): r for r in report[1]["stats"]}
    rows = visible_rows(page)
    compared = 0
    for row in rows:
        for name, (full, text) in row["cells"].items():
            circuit, _, statistic = name.partition(".")
            record = stats.get((row["layer"], row["head"], row["fold"], circuit))
            if statistic == "verdict":
                continue
            if record is None:
                assert full == text == ""
                continue
            assert float(full) == record[statistic]
            assert float(text) == pytest.approx(record[statistic], rel=5e-4)
            compared += 1
    assert compared == 3 * len(report[1]["stats"])


def test_every_number_of_a_chosen_head_equals_stats_json(page, report):
    css(page, "#table tbody tr[data-layer='4'][data-head='2'][data-fold='effective'] button")[0].click()
    assert page.find_element("id", "detail-title").text == "Layer 4, head 2, effective"
    for circuit in ("qk", "ov"):
        record = next(
            r
            for r in report[1]["stats"]
            if (r["layer"], r["head"], r["circuit"], r["fold"]) == (4, 2, circuit, "effective")
        )
        shown = {
            cell.get_attribute("data-name"): float(cell.get_attribute("data-value"))
            for cell in css(page, f"#detail-{circuit} .numbers td")
            if cell.get_attribute("data-value")  # empty: what is of balanced products alone
        }
        numbers = {name: value for name, value in record.items() if isinstance(value, float)}
        assert len(numbers) == 13
        assert numbers.items() <= shown.items()


def test_sorting_changes_the_order_by_mouse_and_by_key(page):
    from selenium.webdriver.common.keys import Keys

    def column():
        rows = page.execute_script(
            "return [...document.querySelectorAll('#table tbody tr')].filter((row) => row.offsetParent)"
            ".map((row) => row.cells[4].dataset.sort)"
        )
        return [float(value) for value in rows if value]

    before = column()
    header(page, "QK β").click()
    page.execute_async_script("setTimeout(arguments[0], 50)")
    assert column() == sorted(before, reverse=True) != before
    assert header(page, "QK β").get_attribute("aria-sort") == "descending"
    header(page, "QK β").send_keys(Keys.ENTER)
    page.execute_async_script("setTimeout(arguments[0], 50)")
    assert column() == sorted(before)


def test_filters_change_which_rows_are_shown(page):
    assert {row["fold"] for row in visible_rows(page)} == {"effective"}
    select(page, "fold", "raw")
    select(page, "layer", "3")
    rows = visible_rows(page)
    assert [(row["layer"], row["head"], row["fold"]) for row in rows] == [
        ("3", head, "raw") for head in ("0", "1", "2", "all")
    ]
    select(page, "kind", "layer sums")
    assert [row["head"] for row in visible_rows(page)] == ["all"]
    assert page.find_element("id", "shown").text == "1 of 48 rows"
    select(page, "layer", "all")
    select(page, "kind", "heads and sums")
    judged = {(e.layer, e.head, e.verdict) for e in attnlens.fit_params().entries if e.fold == "raw"}
    for verdict in ("none", "not described by this model"):
        select(page, "verdict", verdict)
        expected = {(str(layer), str(head)) for layer, head, found in judged if found == verdict}
        assert {(row["layer"], row["head"]) for row in visible_rows(page)} == expected


def test_choosing_a_head_changes_every_picture_the_verdict_and_the_address(page):
    def pictures():
        image = "document.querySelector('#detail-qk .heatmap image').getAttribute('href')"
        charts = "#detail-qk .histogram svg, #detail-qk .spectrum svg"
        drawn = f"[...document.querySelectorAll('{charts}')].map((svg) => svg.outerHTML)"
        return page.execute_script(f"return [{image}, ...{drawn}]")

    first = pictures()
    css(page, "#table tbody tr[data-layer='2'][data-head='1'][data-fold='effective']")[0].click()
    second = pictures()
    assert len(first) == 3
    assert all(a != b for a, b in zip(first, second, strict=True))
    entry = next(
        e for e in attnlens.fit_params().entries if (e.layer, e.head, e.circuit, e.fold) == (2, 1, "ov", "effective")
    )
    assert css(page, "#detail-ov .verdict")[0].text == f"{entry.verdict}: {entry.reason}"
    assert page.current_url.endswith("#head=2.1.effective")
    select(page, "fold", "raw")
    assert page.find_element("id", "detail-title").text == "Layer 2, head 1, raw"


def test_an_address_with_a_head_opens_that_head(page, report):
    open_page(page, report[0].as_uri() + "#head=5.all.raw")
    assert page.find_element("id", "detail-title").text == "Layer 5, sum over heads, raw"
    assert not page.find_element("id", "detail-qk").is_displayed()
    assert "not computed" in css(page, "#detail-ov .spectrum .plot")[0].text


def test_the_heatmap_shows_rows_down_columns_across_and_positive_red(page):
    css(page, "#table tbody tr[data-layer='1'][data-head='0'][data-fold='effective']")[0].click()
    corner = attnlens.inspect().circuits(1, 0, circuit="ov", fold="effective").dense(64)
    image = css(page, "#detail-ov .heatmap image")[0]
    assert "scale(1,1)" in image.get_attribute("transform")  # row 0 on top, column 0 on the left
    href = image.get_attribute("href")
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(href.partition(",")[2]))).convert("RGB")).astype(int)
    assert pixels.shape == (64, 64, 3)
    warmth = pixels[..., 0] - pixels[..., 2]
    large = np.abs(corner) > 0.3 * np.sqrt(np.mean(corner**2))
    assert (np.sign(warmth) == np.sign(corner))[large].mean() == 1
    assert (np.sign(warmth.T) == np.sign(corner))[large].mean() < 0.8


def test_zoom_by_button_and_key_shows_a_part_and_the_whole_again(page):
    from selenium.webdriver.common.keys import Keys

    def shown(circuit):
        values = css(page, f"#detail-{circuit} .heatmap .plot")[0].get_attribute("data-shown").split()
        return [float(value) for value in values]

    assert shown("qk") == [0, 64, 0, 64]
    css(page, "#detail-qk [data-zoom=in]")[0].click()
    assert shown("qk") == [16, 48, 16, 48]
    assert shown("ov") == [0, 64, 0, 64]
    box = css(page, "#detail-qk .heatmap .plot")[0]
    box.send_keys("+", Keys.ARROW_LEFT)
    left, right, top, bottom = shown("qk")
    assert (round(right - left, 1), round(bottom - top, 1)) == (16, 16)  # shown to one decimal
    assert left < 24 == top
    box.send_keys("0")
    assert shown("qk") == [0, 64, 0, 64]
    assert page.get_log("browser") == []


def test_a_head_is_chosen_with_the_keyboard_alone(page):
    from selenium.webdriver.common.keys import Keys

    page.execute_script("document.getElementById('verdict').focus()")
    for _ in range(60):
        page.switch_to.active_element.send_keys(Keys.TAB)
        if page.switch_to.active_element.get_attribute("aria-label") == "Show layer 0, head 1, effective":
            break
    page.switch_to.active_element.send_keys(Keys.ENTER)
    assert page.find_element("id", "detail-title").text == "Layer 0, head 1, effective"


def test_curves_and_comparison_are_drawn(page):
    assert len(css(page, "#training-plots svg")) == 2
    assert len(css(page, "#comparison-plots svg")) == 6
    lines = css(page, "#training-plots figure:first-child g[aria-label=line] path")
    assert len(lines) == 4 + 2  # a line a run, and one an arm
    means = css(page, "#training-plots figure:first-child g[aria-label=dot] path")
    assert len(means) == 2 * 3  # an arm's mean at each epoch


def test_it_fits_a_phone_follows_the_dark_and_prints_whole(page):
    sizes = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", sizes)
    assert page.execute_script("return document.documentElement.scrollWidth") <= 390
    page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    colour = "return getComputedStyle(document.body).backgroundColor"
    schemes = {}
    for scheme in ("light", "dark"):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        schemes[scheme] = page.execute_script(colour)
    assert schemes == {"light": "rgb(255, 255, 255)", "dark": "rgb(21, 24, 27)"}
    features = [{"name": "prefers-color-scheme", "value": "dark"}]
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print", "features": features})
    assert page.execute_script(colour) == "rgb(255, 255, 255)"
    assert not css(page, ".controls")[0].is_displayed()
    table = css(page, ".tall")[0]
    assert page.execute_script("return arguments[0].scrollHeight <= arguments[0].clientHeight", table)


def test_names_from_files_run_nothing_and_are_shown_as_text(browser, tmp_path):
    from safetensors.torch import save_model

    folder = tmp_path / "<img src=x onerror=window.hacked=1>"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architecture": "vit_tiny_patch16_224", "model_args": SMALL}))
    save_model(small_vit(), folder / "model.safetensors")
    train = results_folder(tmp_path / "made", HOSTILE, devices=[HOSTILE], commands=[HOSTILE])
    path = tmp_path / "report.html"
    path.write_text(reports.report(folder, compare=[folder], train=train, command=HOSTILE))
    open_page(browser, path.as_uri())
    assert browser.execute_script("return window.hacked") is None
    assert browser.get_log("browser") == []
    assert browser.title.startswith("<img src=x")
    assert HOSTILE in browser.find_element("id", "training").text
    assert len(css(browser, "#training-legend svg")) > 1
    assert not css(browser, "img")


def test_a_script_that_got_in_all_the_same_would_not_run(browser, report, tmp_path):
    path = tmp_path / "report.html"
    path.write_text(report[0].read_text().replace("<main>", "<main><script>window.hacked=1</script>"))
    open_page(browser, path.as_uri())
    assert browser.execute_script("return window.hacked") is None
    assert any("Content Security Policy" in entry["message"] for entry in browser.get_log("browser"))


WIDE, HIGH = 1280, 900
"""The screen of a laptop."""
_OVERLAPS = """
const found = [];
for (const svg of document.querySelectorAll("main svg")) {
  const texts = [...svg.querySelectorAll("text")].filter((text) => !text.closest("[aria-label=text], [aria-label=tip]"));
  const boxes = texts.map((text) => [text.textContent, text.getBoundingClientRect()]).filter(([, box]) => box.width);
  boxes.forEach(([one, a], i) => boxes.slice(0, i).forEach(([other, b]) => {
    const [across, down] = [Math.min(a.right, b.right) - Math.max(a.left, b.left), Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top)];
    if (across > 0.5 && down > 0.5) found.push([one, other]);
  }));
}
return found;
"""  # noqa: E501


@pytest.fixture
def laptop(page):
    sizes = {"width": WIDE, "height": HIGH, "deviceScaleFactor": 1, "mobile": False}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", sizes)
    settle(page)
    yield page
    page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def settle(page):
    """Wait for two frames: charts are drawn again after the room they have changes."""
    page.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(arguments[0], 100)))")


def test_a_laptop_shows_beta_prominence_and_verdict_of_both_circuits_without_scrolling_sideways(laptop):
    box = css(laptop, ".tall")[0]
    assert laptop.execute_script("return document.documentElement.scrollWidth") <= WIDE
    assert laptop.execute_script("return arguments[0].scrollWidth <= arguments[0].clientWidth", box)
    right = laptop.execute_script("return arguments[0].getBoundingClientRect().right", box)
    row = css(laptop, "#table tbody tr[data-layer='2'][data-head='1'][data-fold='effective']")[0]
    for circuit in ("qk", "ov"):
        for name in ("alpha", "beta", "diagonal_prominence", "verdict"):
            (cell,) = row.find_elements("css selector", f"[data-name='{circuit}.{name}']")
            assert cell.text
            assert cell.rect["x"] + cell.rect["width"] <= right
    detail = laptop.find_element("id", "detail")
    assert laptop.execute_script("return arguments[0].scrollWidth <= arguments[0].clientWidth", detail)


def test_decimal_points_of_a_column_stand_below_each_other(laptop):
    script = """
    const [name] = arguments, places = new Set();
    for (const cell of document.querySelectorAll(`#table tbody tr:not([hidden]) [data-name='${name}']`)) {
      const text = cell.firstChild, point = text?.textContent.indexOf(".");
      if (!(point > 0)) continue;
      const range = document.createRange();
      range.setStart(text, point);
      range.setEnd(text, point + 1);
      places.add(Math.round(range.getBoundingClientRect().left));
    }
    return [...places];
    """
    for name in ("qk.alpha", "qk.beta", "qk.diagonal_prominence", "ov.beta"):
        places = laptop.execute_script(script, name)
        assert max(places) - min(places) <= 1, name


def test_a_choice_that_no_row_has_says_so_and_is_taken_back(laptop):
    empty = laptop.find_element("id", "empty")
    assert not empty.is_displayed()
    select(laptop, "layer", "3")
    select(laptop, "verdict", "mixed diagonal")
    assert visible_rows(laptop) == []
    assert empty.is_displayed()
    assert empty.text.startswith("No row has all that was chosen.")
    empty.find_element("tag name", "button").click()
    assert not empty.is_displayed()
    assert {row["fold"] for row in visible_rows(laptop)} == {"effective"}
    assert len(visible_rows(laptop)) == 24
    select(laptop, "fold", "raw")
    css(laptop, ".controls .reset")[0].click()
    assert {row["fold"] for row in visible_rows(laptop)} == {"effective"}


def test_maps_have_a_colour_key_with_the_ends_of_its_scale(laptop):
    for key in ("map-key", "comparison-key"):
        (legend,) = css(laptop, f"#{key} svg")
        texts = [text.get_attribute("textContent") for text in legend.find_elements("tag name", "text")]
        assert {"\N{MINUS SIGN}1.0", "0.0", "1.0", "identity cosine ÷ the largest its rank allows"} <= set(texts)


def test_no_two_labels_of_a_chart_overlap_on_a_laptop_or_a_phone(laptop):
    assert laptop.execute_script(_OVERLAPS) == []
    sizes = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    laptop.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", sizes)
    settle(laptop)
    assert laptop.execute_script(_OVERLAPS) == []


def test_overlapping_labels_would_be_found(laptop):
    laptop.execute_script(
        "const text = document.querySelector('#map-qk svg text');"
        "text.parentNode.appendChild(text.cloneNode(true)).textContent = 'over it';"
    )
    assert len(laptop.execute_script(_OVERLAPS)) > 0


def test_two_models_are_compared_side_by_side_in_one_scale(laptop):
    for circuit in ("qk", "ov"):
        figures = css(laptop, f"#comparison-{circuit} figure")
        assert [figure.find_element("tag name", "figcaption").text for figure in figures] == [
            f"{circuit.upper()}, embedded",
            f"{circuit.upper()}, vit_tiny_patch16_224",
        ]
        first, second = (figure.rect for figure in figures)
        assert first["y"] == second["y"]
        assert first["x"] + first["width"] <= second["x"]
        cells = [figure.find_elements("css selector", "[aria-label=cell] rect") for figure in figures]
        assert [len(found) for found in cells] == [18, 9]
    plots = [figure.rect for figure in css(laptop, "#comparison-plots figure")]
    assert [plot["y"] for plot in plots[::2]] == [plot["y"] for plot in plots[1::2]]


def test_filters_appear_with_their_table_beside_the_words_of_the_page(browser, tmp_path):
    from tests.filter_models import convnext

    path = tmp_path / "report.html"
    path.write_text(reports.report(convnext()))
    browser.get(path.as_uri())
    rows = css(browser, "#filter-table tbody tr")
    assert len(rows) > 1
    assert all(row.is_displayed() for row in rows)
    assert css(browser, "nav a[href='#filters']")[0].is_displayed()
    assert len(css(browser, "#filters img")) == 3
    assert browser.get_log("browser") == []
