# %% [markdown]
# # attnlens in a notebook
#
# The whole chain on the small vision transformer that the package ships: look, judge, draw, start a new network there.
# It needs no network and no GPU, and takes well under a minute.

# %%
# %matplotlib inline
import attnlens
from attnlens.figures import figure_style

# %% [markdown]
# ## Look
#
# Each head's query-key product `W_Q W_K^T` and value-output product `W_V W_O` is fitted as alpha Z + beta I: noise of
# one scale and a multiple of the identity. A result at the end of a cell shows its table and its figure.

# %%
inspection = attnlens.inspect()
inspection

# %% [markdown]
# `stats` is the table behind it: select rows, take a column, or hand it to pandas.

# %%
sums = inspection.stats.select(head="all", fold="effective")
for row in sums.records():
    print(f"layer {row['layer']}: beta of the summed OV {row['beta']:+.4f}")

# %% [markdown]
# `figure` draws any of the figures by name: here the top left 32 x 32 entries of every OV product.

# %%
inspection.figure("ov_heatmap", size=32)

# %% [markdown]
# ## Judge
#
# `fit_params` gives intervals, p-values and a verdict for each product, and what an initialiser has to draw with.

# %%
params = attnlens.fit_params()
for entry in params.select("ov", "all"):
    interval = f"[{entry.beta_low:.3f}, {entry.beta_high:.3f}]"
    print(f"layer {entry.layer}: beta in {interval}, {entry.verdict}")

# %%
params.figure("fit_profile")

# %% [markdown]
# ## Into a paper
#
# Axes of your own, text of 8 points, one column wide. The page on figures for papers says more.

# %%
import matplotlib.pyplot as plt

with figure_style("paper", "column"):
    size = {"figsize": (3.25, 1.5), "layout": "constrained"}
    figure, (left, right) = plt.subplots(1, 2, **size)
    inspection.figure("depth_profile", ax={"beta sum": right, "beta qk": left})
    left.set_title("QK")
    right.set_title("OV, sum")

# %% [markdown]
# ## Start a new network there
#
# Another width, another depth, other heads: drawn so that its products have the parameters that were fitted.

# %%
network = {"embed_dim": 128, "depth": 4, "num_heads": 4, "img_size": 32, "patch_size": 4}
start = {"init": "fitted", "init_options": {"params": params}, "seed": 0}
model = attnlens.create_model("vit_tiny_patch16_224", **start, **network)

stats = attnlens.inspect(model).stats
drawn = stats.select(circuit="ov", head="all", fold="effective").column("beta")
asked = [request.ov[1] for request in params.for_model(model)]
for layer, (request, beta) in enumerate(zip(asked, drawn, strict=True)):
    print(f"new layer {layer}: OV beta asked for {request:+.3f}, drawn {beta:+.3f}")
