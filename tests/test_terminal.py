"""What a person sees: whole numbers at any width, on any terminal; one line where a stream takes nothing."""

import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from statistics import fmean

import pytest

from attnlens.cli.sheet import Sheet
from attnlens.printable import spelled, utf8_text
from attnlens.words import counted, numbered, p_text, told_apart

pty = pytest.importorskip("pty", reason="there are no pseudo-terminals here")
PROGRAM = [sys.executable, "-m", "attnlens"]
WIDTHS = (60, 80, 120)
ELLIPSIS = "\u2026"


def on_terminal(folder, width, *arguments, stop_after=None, environment=None):
    """Run a command on a pseudo-terminal; return its exit code and what it showed, terminal escapes left out."""
    import fcntl
    import struct
    import termios

    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 50, width, 0, 0))
    own = {**os.environ, "TERM": "xterm", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **(environment or {})}
    own.pop("COLUMNS", None)
    streams = {"stdin": slave, "stdout": slave, "stderr": slave}
    command = [*PROGRAM, *map(str, arguments)]
    ignored = signal.signal(signal.SIGINT, signal.default_int_handler)  # of a test run in the background, and inherited
    process = subprocess.Popen(command, cwd=folder, env=own, **streams)
    signal.signal(signal.SIGINT, ignored)
    os.close(slave)
    shown, start = b"", time.monotonic()
    while True:
        ready, _, _ = select.select([master], [], [], 0.1)
        if ready:
            try:
                chunk = os.read(master, 65536)
            except OSError:  # the other side is closed
                break
            if not chunk:
                break
            shown += chunk
        if stop_after is not None and stop_after in shown:
            process.send_signal(signal.SIGINT)
            stop_after = None
        assert time.monotonic() - start < 500, shown
    code = process.wait(timeout=60)
    os.close(master)
    return code, re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode(errors="replace"))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Write a network and a parameter file to look at."""
    folder = tmp_path_factory.mktemp("terminal")
    for command in (["init", "-o", "runs/a/model.safetensors", "-q"], ["fit-params", "-o", "params.json", "-q"]):
        subprocess.run([*PROGRAM, *command], cwd=folder, check=True, capture_output=True)
    return folder


def numbers_of(name, made):
    """Return numbers that a command must show, as it writes them, from the files it wrote."""
    if name == "inspect":
        rows = json.loads((made / "out" / "stats.json").read_text())["stats"]
        sums = [row for row in rows if row["head"] == "all" and row["fold"] == "effective"]
        return [f"{row[column]:.4f}" for row in sums for column in ("alpha", "beta")]
    entries = json.loads((made / "params.json").read_text())["entries"]
    sums = [entry for entry in entries if entry["head"] == "all" and entry["fold"] == "effective"]
    return [f"{entry[name]:.4f}" for entry in sums for name in ("alpha", "beta", "beta_low", "beta_high")]


COMMANDS = {
    "inspect": ("inspect", "-o", "out"),
    "inspect balanced": ("inspect", "--fold", "balanced", "-o", "out2"),
    "fit-params": ("fit-params", "-o", "params.json", "--figures", "figures"),
    "compose": ("compose", "-o", "composed"),
    "verify-init": ("verify-init", "-c", "runs/a/model.safetensors"),
    "compare": ("compare", "runs/a", "runs/a/model.safetensors", "--figures", "compared"),
    "list-models": ("list-models", "vit_tiny"),
    "init --list": ("init", "--list"),
    "signal": ("signal", "--arms", "e-spa,softmax", "--seeds", "2", "--depth", "2", "-o", "signalled"),
    "doctor": ("doctor",),
    "scan": ("scan", "runs/**", "-o", "scanned"),
}
TRAINING = (
    *("--arms", "default,norm-matched-mimetic", "--seeds", "2", "--epochs", "2", "--train-images", "100"),
    *("--embed-dim", "24", "--depth", "2", "--num-heads", "3", "--batch-size", "50", "--device", "cpu"),
)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_no_command_cuts_a_number_at_any_width(made, name):
    for width in WIDTHS:
        code, shown = on_terminal(made, width, *COMMANDS[name])
        assert code == 0, shown
        assert ELLIPSIS not in shown
        tables = [line for line in shown.splitlines() if "─" in line and "━" not in line]
        assert tables
        assert max(map(len, tables)) <= width
        if name in ("inspect", "fit-params"):
            flat = re.sub(r"\s+", " ", shown)
            assert [number for number in numbers_of(name, made) if number not in flat] == []


@pytest.mark.slow
@pytest.mark.parametrize("width", WIDTHS)
def test_the_live_table_of_a_training_and_its_report_cut_no_number(made, width):
    code, shown = on_terminal(made, width, "train-compare", *TRAINING, "-o", f"trained{width}", "--force")
    assert code == 0, shown
    assert ELLIPSIS not in shown
    live = [line.rstrip() for line in re.split(r"[\r\n]+", shown.split("# ")[0]) if re.search(r"\d/2", line)]
    assert live
    assert max(map(len, live)) <= width
    records = [json.loads(line) for line in (made / f"trained{width}" / "results.jsonl").read_text().splitlines()]
    last = {record["run"]: record for record in records if record.get("accuracy") is not None}
    means = {
        f"{100 * fmean(one['accuracy'] for run, one in last.items() if run.startswith(arm)):.1f}%"
        for arm in ("default-", "norm-matched-mimetic-")
    }
    assert all(any(mean in line for line in live) for mean in means), live[-4:]


@pytest.mark.slow
def test_what_init_drew_is_said_whole_at_any_width(made):
    for width in WIDTHS:
        name = f"drawn{width}.safetensors"
        code, shown = on_terminal(made, width, "init", "vit_tiny_patch16_224", "--init", "mimetic", "-o", name)
        assert code == 0, shown
        assert ELLIPSIS not in shown
        flat = re.sub(r"\s+", " ", shown)
        assert re.search(r"QK: mean alpha 0\.\d{4}, beta \+0\.\d{4} over 36 heads", flat)
        assert f"attnlens verify-init --checkpoint {name}" in flat
        assert (made / name).stat().st_size > 20_000_000


@pytest.mark.slow
def test_the_report_says_where_it_is_at_any_width(made):
    for width in WIDTHS:
        code, shown = on_terminal(made, width, "report", "-o", f"report{width}.html")
        assert code == 0, shown
        assert f"report{width}.html" in shown
        assert ELLIPSIS not in shown
        assert (made / f"report{width}.html").stat().st_size > 100_000


def rows_of(sheet, width, encoding="utf-8"):
    """Return what a sheet shows at a width, line by line."""
    from io import StringIO

    from rich.console import Console

    file = StringIO()
    console = Console(file=file, width=width, highlight=False)
    options = console.options.update(width=width)
    options.encoding = encoding
    console.print(*sheet.__rich_console__(console, options), sep="\n")
    return file.getvalue().splitlines()


def wide_sheet():
    sheet = Sheet("[bold]a title[/bold]", "a caption")
    sheet.number("layer", key=True)
    sheet.number("QK α", "QK β", group=1)
    sheet.label("verdict", group=1)
    sheet.number("OV α", "a heading of many words", group=2)
    sheet.add_row("0", "0.123456789", "-0.987654321", "negative identity and low rank", "12345.6789", "-1.5e-09")
    sheet.add_row("1", "1.123456789", "-1.987654321", "none", "22345.6789", "-2.5e-09")
    return sheet


@pytest.mark.parametrize("width", [34, 40, 50, 60, 70, 80, 100, 200])
@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "ascii"])
def test_numbers_are_whole_and_every_part_names_its_rows(width, encoding):
    lines = rows_of(wide_sheet(), width, encoding)
    text = "\n".join(lines)
    assert max(map(len, lines)) <= width
    for number in ("0.123456789", "-0.987654321", "12345.6789", "-1.5e-09", "22345.6789"):
        assert re.search(rf"(^|\s){re.escape(number)}(\s|$)", text, re.MULTILINE), text
    parts = sum("layer" in line for line in lines)
    assert sum(line.lstrip().startswith("0 ") for line in lines) == parts
    assert text.isascii() == (encoding != "utf-8" or width < 0) or encoding == "latin-1"


def test_labels_shrink_before_columns_move():
    widths = [len(wide_sheet().parts(width)) for width in (34, 60, 70, 120)]
    assert widths == sorted(widths, reverse=True)
    assert widths[-1] == 1
    narrow = wide_sheet().natural_width() - 10
    assert len(wide_sheet().parts(narrow)) == 1


def test_groups_stay_together_where_there_is_room():
    sheet = wide_sheet()
    parts = [[sheet.columns[place].name for place in part] for part in sheet.parts(60)]
    assert parts == [["layer", "QK α", "QK β", "verdict"], ["layer", "OV α", "a heading of many words"]]


def test_a_label_without_a_word_is_left_out():
    sheet = Sheet("")
    sheet.label("name", key=True)
    sheet.label("empty", "told")
    sheet.add_row("a", "", "x")
    assert [[sheet.columns[place].name for place in part] for part in sheet.parts(80)] == [["name", "told"]]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_without_greek_gets_words(tmp_path, encoding):
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*PROGRAM, "inspect", "-o", "out"], cwd=tmp_path, env=environment, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert b"alpha Z + beta I" in done.stdout
    assert b"QK alpha" in done.stdout


def test_every_sign_of_ours_has_a_spelling_of_its_own_in_ascii():
    from attnlens.cli.tables import LEGEND

    assert spelled(LEGEND, "ascii") == "P > 3, p > 1, . between, n < -1, N < -3"
    assert spelled("α·β \u4e2d", "ascii") == "alpha.beta \\u4e2d"
    assert spelled("± ·", "latin-1") == "± ·"


@pytest.mark.parametrize("command", [("inspect", "-o", "out"), ("--help",), ("list-models", "vit_tiny", "--json")])
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full here")  # noqa: PTH110
def test_a_stream_that_takes_nothing_is_told_in_one_line(tmp_path, command):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}

    def run(redirection):
        line = " ".join([*PROGRAM, *command, redirection])
        how = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
        return subprocess.run(["sh", "-c", line], check=False, **how)

    full = run("> /dev/full")
    assert (full.returncode, full.stderr) == (1, "attnlens: cannot write to stdout: No space left on device\n")
    closed = run(">&-")
    assert closed.returncode == 1
    assert closed.stderr.startswith("attnlens: stdout is closed")
    assert closed.stderr.count("\n") == 1
    for redirection in ("2> /dev/full", "2>&-"):
        quiet = run(redirection)
        assert (quiet.returncode, quiet.stderr) == (0, "")
        assert quiet.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="sets a limit of POSIX")
def test_unbuffered_output_that_is_cut_off_is_told(tmp_path):
    def run(**limit):
        how = {"env": {**os.environ, "PYTHONUNBUFFERED": "1"}, "stderr": subprocess.PIPE, "text": True, **limit}
        with (tmp_path / "out").open("w") as file:
            done = subprocess.run([*PROGRAM, "list-models", "--json"], stdout=file, check=False, **how)
        return done.returncode, done.stderr

    def small():
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))

    assert run()[0] == 0
    assert json.loads((tmp_path / "out").read_text())
    code, err = run(preexec_fn=small)
    assert (code, err) == (1, "attnlens: cannot write to stdout: File too large\n")


@pytest.mark.skipif(sys.platform == "darwin", reason="file names are UTF-8 there")
def test_a_name_that_is_no_utf8_is_read_and_shown(made, tmp_path):
    name = os.fsdecode(b"\xff-x.safetensors")
    (tmp_path / name).write_bytes((made / "runs" / "a" / "model.safetensors").read_bytes())
    for command in (["inspect", name, "-o", "out"], ["report", name, "-o", "r.html"], ["scan", name, "-o", "sc"]):
        done = subprocess.run([*PROGRAM, *command], cwd=tmp_path, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out" / "stats.json").read_text())["model"] == "\\xff-x"
    assert utf8_text("\udcff\ud800é") == "\\xff\\ud800é"


def test_ctrl_c_says_what_is_left_behind(tmp_path):
    code, shown = on_terminal(tmp_path, 80, "signal", "--seeds", "200", "-o", "out", stop_after=b"networks")
    assert code == 130, shown
    assert "attnlens: interrupted: no file was written" in shown
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "module", ["attnlens.cli.program", "pathlib", "attnlens.threads", "typer", "attnlens.cli.inspect"]
)
def test_ctrl_c_while_a_module_is_imported_ends_in_one_line(tmp_path, module):
    code = f"""if True:
        import sys
        class Pressed:
            def find_spec(self, name, *rest):
                if name == {module!r}:
                    raise KeyboardInterrupt
        [sys.modules.pop(name) for name in ("pathlib",) if name in sys.modules]
        sys.meta_path.insert(0, Pressed())
        from attnlens.cli import main
        main()"""
    done = subprocess.run(
        [sys.executable, "-c", code, "inspect"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "attnlens: interrupted: no file was written\n"


def test_what_was_written_is_counted_by_file_as_far_as_it_is_there(tmp_path, monkeypatch):
    from attnlens import atomic

    monkeypatch.setattr(atomic, "_WRITTEN", {})
    assert atomic.what_was_written() == "no file was written"
    atomic.write_text_atomic(tmp_path / "a", "a")
    assert atomic.what_was_written() == f"1 file is written whole, in {tmp_path}; none is half-written"
    atomic.write_text_atomic(tmp_path / "b", "b")
    atomic.write_text_atomic(tmp_path / "b", "again")
    assert atomic.what_was_written().startswith("2 files are written whole")
    (tmp_path / "a").unlink()
    assert atomic.what_was_written().startswith("1 file is written whole")


def test_quiet_leaves_results_alone(run):
    code, out, err = run("inspect", "-o", "made", "-q")
    assert (code, err) == (0, "")
    assert "effective products" in out


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0421, ".042"), (1e-9, "< .001"), (0.0, "< .001"), (1.0, "1"), (0.9999, "> .999"), (0.5, ".500")],
)
def test_p_values_read_as_people_write_them(value, text):
    assert p_text(value) == text


def test_one_and_many():
    assert [counted(n, "model") for n in (0, 1, 2)] == ["0 models", "1 model", "2 models"]
    assert counted(1, "part is", "parts are") == "1 part is"
    assert [numbered(of, "layer") for of in ([3], [3, 0, 1], range(12))] == ["layer 3", "layers 0-1, 3", "layers 0-11"]
    assert numbered([2], "layer of filters", "layers of filters") == "layer of filters 2"


def test_models_of_one_name_are_told_apart_by_their_folders():
    assert told_apart(["vit", "vit", "b"], ["x/vit", "y/vit", None]) == ["x/vit", "y/vit", "b"]
    assert told_apart(["m", "m"], ["x/p/m", "y/p/m"]) == ["x/p/m", "y/p/m"]
    assert told_apart(["m", "m"], [None, None]) == ["m (1)", "m (2)"]
    assert told_apart(["m", "m"], ["a/m", "a/m"]) == ["m (1)", "m (2)"]
