"""The whole chain in one script: look, judge, start a new network there, check it, write the report.

    python docs/example.py [FOLDER]

needs no network and no GPU; figures and report go to FOLDER, by default docs/gallery.
"""

import sys
from pathlib import Path

import attnlens
from attnlens import reports
from attnlens.figures import save_figures

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/gallery")

# 1. Look: every head's QK and OV circuit of the small ViT inside the package, fitted as alpha Z + beta I.
inspection = attnlens.inspect()
print(f"{inspection.model}: {len(inspection.stats)} products")
for fold in inspection.folds:
    sums = inspection.stats.select(head="all", fold=fold)
    print(f"  OV sums, {fold}: beta by layer {sums.column('beta').round(3).tolist()}")
drawn = save_figures(inspection.figures("effective"), folder)

# 2. Judge: intervals, p-values, a verdict for each product.
params = attnlens.fit_params()
for entry in params.select("ov", "all"):
    print(f"  layer {entry.layer}: beta in [{entry.beta_low:.3f}, {entry.beta_high:.3f}], {entry.verdict}")
drawn += save_figures(params.figures(), folder)

# 3. Start a new network there, of another width and depth, and check that it has the parameters asked for.
network = {"num_classes": 10, "img_size": 32, "patch_size": 4, "embed_dim": 128, "depth": 4, "num_heads": 4}
model = attnlens.create_model("vit_tiny_patch16_224", init="fitted", init_options={"params": params}, seed=0, **network)
sums = attnlens.inspect(model).stats.select(head="all", fold="effective")
for layer, (request, beta) in enumerate(zip(params.for_model(model), sums.column("beta"), strict=True)):
    print(f"  new layer {layer}: OV beta asked for {request.ov[1]:.3f}, drawn {beta:.3f}")

# 4. Share it: one HTML file that opens anywhere.
reports.report(output=folder / "report.html", command="python docs/example.py")
print("wrote report.html,", ", ".join(sorted(path.stem for path in drawn)))
