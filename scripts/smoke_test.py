"""Install a wheel, then the sdist, into an empty environment and try the tool from an empty folder.

    python scripts/smoke_test.py dist            # a fresh environment with every dependency: minutes and 6 GB
    python scripts/smoke_test.py dist --here     # this environment's dependencies, the package alone from the wheel

Every command must end with exit code 0 and leave the files it names. The checkout is never on the path.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

COMMANDS = [
    (["--version"], []),
    (["--help"], []),
    (["doctor"], []),
    (["list-models", "vit_tiny*"], []),
    (["inspect"], ["figures/embedded/stats.csv", "figures/embedded/stats.json", "figures/embedded/ov_heatmap.png"]),
    (["fit-params", "-o", "params.json"], ["params.json"]),
    (["init", "vit_tiny_patch16_224", "--init", "fitted", "--params", "params.json", "-o", "new.safetensors"],
     ["new.safetensors"]),
    (["verify-init", "vit_tiny_patch16_224", "--checkpoint", "new.safetensors", "--params", "params.json"], []),
    (["report", "-o", "report.html"], ["report.html"]),
    (["signal", "--no-skips", "--depth", "2", "--seeds", "1"], ["figures/embedded/signal.png"]),
    (["train-compare", "--arms", "default,mimetic", "--seeds", "1", "--epochs", "1", "--train-images", "100",
      "--test-images", "50", "-o", "comparison"], ["comparison/summary.json", "comparison/report.md"]),
]  # fmt: skip


def run(command: list[str], **options: object) -> str:
    """Return what a command prints; end with what it says where it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]
    if done.returncode:
        sys.exit(f"exit code {done.returncode}: {' '.join(command)}\n{done.stdout}\n{done.stderr}")
    return str(done.stdout)


def try_commands(python: Path, environment: dict[str, str]) -> None:
    """Run every command in one empty folder and look at the files it leaves."""
    with tempfile.TemporaryDirectory() as empty:
        where = run([str(python), "-c", "import attnlens; print(attnlens.__file__)"], cwd=empty, env=environment)
        for arguments, files in COMMANDS:
            run([str(python), "-m", "attnlens", *arguments], cwd=empty, env=environment)
            missing = [name for name in files if not (path := Path(empty) / name).is_file() or not path.stat().st_size]
            if missing:
                sys.exit(f"{' '.join(arguments)} left no {', '.join(missing)}")
        if not json.loads((Path(empty) / "figures/embedded/stats.json").read_text())["stats"]:
            sys.exit("the table is empty")
    print(f"{len(COMMANDS)} commands pass with {where.strip()}")


def main() -> None:
    """Install and try."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dist", type=Path, help="folder with one wheel and one sdist")
    parser.add_argument("--here", action="store_true", help="use this environment's dependencies")
    chosen = parser.parse_args()
    (wheel,), (sdist,) = chosen.dist.resolve().glob("*.whl"), chosen.dist.resolve().glob("*.tar.gz")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    with tempfile.TemporaryDirectory() as folder:
        if chosen.here:
            for package in (wheel, sdist):
                target = Path(folder) / package.suffix.lstrip(".")
                options = ["--quiet", "--no-deps", "--no-build-isolation", "--target", str(target)]
                run([sys.executable, "-m", "pip", "install", *options, str(package)])
                try_commands(Path(sys.executable), environment | {"PYTHONPATH": str(target)})
            return
        venv.create(folder, with_pip=True)
        python = Path(folder) / "bin" / "python"
        run([str(python), "-m", "pip", "install", "--quiet", str(wheel)])
        try_commands(python, environment)
        run([str(python), "-m", "pip", "install", "--quiet", "--no-deps", "--force-reinstall", str(sdist)])
        try_commands(python, environment)


if __name__ == "__main__":
    main()
