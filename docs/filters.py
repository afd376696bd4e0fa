"""Depthwise filters from start to end: train a small ConvMixer, look at its filters, start a larger one with them.

    python docs/filters.py [FOLDER] [EPOCHS]

needs no network and no GPU: the images are scikit-learn's digits, 8 x 8 pixels. Figures go to FOLDER, by default
docs/gallery/filters.
"""

import sys
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from timm.models.convmixer import ConvMixer

import attnlens
from attnlens.figures import save_figures

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/gallery/filters")
epochs = int(sys.argv[2]) if len(sys.argv) > 2 else 30
torch.set_num_threads(1)  # the same numbers on every run of one machine
torch.manual_seed(0)


def network(dim, depth, kernel_size):
    return ConvMixer(dim=dim, depth=depth, kernel_size=kernel_size, patch_size=1, in_chans=1, num_classes=10)


def layers_of(model, title):
    print(f"{title}\n  layer  rank (chance)  s/side²  blur  slope  contrast  explained  covariances  verdict")
    for row in attnlens.inspect(model).filters.stats.records():
        ranks = f"{row['effective_rank']:4.1f}  ({row['effective_rank_null']:4.1f})"
        shares = f"{row['blur_share']:4.2f}  {row['slope_share']:5.2f}  {row['contrast_share']:8.2f}"
        gained = f"{row['explained']:9.2f}  {row['explained_covariances']:11.2f}"
        print(f"  {row['layer']:5}  {ranks}  {row['relative_s']:7.3f}  {shares}  {gained}  {row['verdict']}")


# 1. Train: a plain loop on 1,437 digits, the last 360 held out.
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
labels = torch.tensor(digits.target)
model = network(64, 6, 5)
layers_of(model, "before training")
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.05)
steps = epochs * (1437 // 48 + 1)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
for _ in range(epochs):
    for batch in torch.randperm(1437).split(48):
        loss = torch.nn.functional.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
model.eval()
with torch.no_grad():
    accuracy = (model(images[1437:]).argmax(1) == labels[1437:]).float().mean()
print(f"accuracy after {epochs} epochs: {accuracy:.3f} of 360 held out")

# 2. Look at what training made of the filters.
layers_of(model, "after training")
drawn = save_figures(attnlens.inspect(model).figures(), folder)

# 3. Fit, and start a deeper, wider network with larger kernels from it, and one from the closed form alone.
params = attnlens.fit_params(model)
drawn += save_figures(params.figures(), folder)
for form in ("full", "parametric"):
    larger = network(96, 9, 7)
    report = attnlens.init_(larger, "conv-covariance", params=params, form=form, seed=0)
    layers_of(larger, f"96 wide, 9 deep, 7 x 7, {form}")
    print(f"  rms of a weight {report.filters[0].rms_before:.4f} before and {report.filters[0].rms:.4f} after")
print("drew", ", ".join(path.stem for path in drawn))
