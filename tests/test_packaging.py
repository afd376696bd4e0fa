"""The wheel and the sdist: what they hold, that they run from an empty folder, and what a release checks."""

import os
import re
import subprocess
import sys
import tarfile
import zipfile

import pytest

from scripts.release_notes import release_notes
from tests.conftest import ROOT

DATA = {
    "attnlens/py.typed",
    "attnlens/embedded/config.json",
    "attnlens/embedded/model.safetensors",
    "attnlens/embedded/README.md",
    "attnlens/reports/assets/report.js",
    "attnlens/reports/assets/vendor/LICENSES.txt",
    "attnlens/templates/report.html.j2",
}


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """Build both from the checkout, as `make dist` does: the sdist, then the wheel from it."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_wheel_holds_the_package_with_its_data_and_nothing_else(dist):
    (wheel,) = dist.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "attnlens").rglob("*.py")}
    assert sources <= names
    assert names >= DATA
    assert any(re.fullmatch(r"attnlens/catalogues/timm-[\d.]+\.json\.xz", name) for name in names)
    outside = {name for name in names if not re.match(r"attnlens(-[\d.]+\.dist-info)?/", name)}
    assert not outside
    assert not {name for name in names if name.endswith((".pyc", ".npz", ".log", ".pt"))}


def test_sdist_holds_tests_docs_and_figures(dist):
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = ["tests/conftest.py", "docs/index.md", "docs/gallery/depth_profile.png", "Makefile", "mkdocs.yml"]
    assert names >= {*wanted, "README.md", "LICENSE", "SECURITY.md", "CHANGELOG.md", "scripts/smoke_test.py"}
    assert not {name for name in names if name.startswith((".venv", "site/", "dist/"))}


def test_installed_wheel_runs_from_an_empty_folder(dist, tmp_path):
    (wheel,) = dist.glob("*.whl")
    target, empty = tmp_path / "target", tmp_path / "empty"
    empty.mkdir()
    options = ["--quiet", "--no-deps", "--no-index", "--target", str(target)]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(wheel)], check=True)
    environment = os.environ | {"PYTHONPATH": str(target)}
    where = [sys.executable, "-c", "import attnlens; print(attnlens.__file__)"]
    found = subprocess.run(where, cwd=empty, env=environment, capture_output=True, text=True, check=True).stdout
    assert found.strip() == str(target / "attnlens" / "__init__.py")
    for arguments in (["inspect"], ["report", "-o", "report.html"]):
        command = [sys.executable, "-m", "attnlens", *arguments]
        done = subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert (empty / "figures/embedded/stats.csv").stat().st_size > 1000
    assert "<!doctype html>" in (empty / "report.html").read_text()[:200].lower()


PACKAGE = '__version__ = "1.2.0"\n'
CHANGELOG = (
    "# Changelog\n\n## Unreleased\n\n- later\n\n## 1.2.0 - 2026-01-31\n\n- new\n\n## 1.1.0 - 2025-01-01\n\n- old\n"
)


def test_release_notes_are_the_versions_own_entry():
    assert release_notes("1.2.0", CHANGELOG, PACKAGE) == "- new\n"


@pytest.mark.parametrize(
    ("wanted", "changelog", "package", "says"),
    [
        ("1.3.0", CHANGELOG, PACKAGE, "says 1.2.0, not 1.3.0"),
        ("1.3.0", CHANGELOG, '__version__ = "1.3.0"\n', "no dated entry"),
        ("1.2.0", "## 1.2.0 - 2026-01-31\n\n## 1.1.0 - 2025-01-01\n\n- old\n", PACKAGE, "no dated entry"),
    ],
)
def test_release_stops_where_tag_package_and_changelog_differ(wanted, changelog, package, says):
    with pytest.raises(ValueError, match=says):
        release_notes(wanted, changelog, package)


def test_changelog_has_the_packages_own_version():
    package = (ROOT / "attnlens" / "__init__.py").read_text()
    version = re.search(r'^__version__ = "(.+)"$', package, re.MULTILINE)[1]
    assert release_notes(version, (ROOT / "CHANGELOG.md").read_text(), package)
