"""Deep networks without skips: measure what becomes of their tokens, then build one that keeps them apart.

    python docs/rewire.py [FOLDER]

needs no network and no GPU; the figure goes to FOLDER, by default docs/gallery/signal.
"""

import sys
from pathlib import Path

import timm
import torch

from attnlens.figures import save_figures
from attnlens.gpt import create_gpt
from attnlens.signal import rewire_
from attnlens.signal.figure import draw_signal
from attnlens.signal.propagation import propagate

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/gallery/signal")

# 1. Measure: 12 blocks without skips and norms, from three starts. One number a block: mean cosine of two tokens.
found = propagate(arms=["default", "value-skipinit", "e-spa"], depth=12, tokens=16, seeds=3, skips=False, norms=False)
for arm in found.arms:
    print(f"{arm:14}", " ".join(f"{value:.2f}" for value in found.curve(arm, "cosine").mean(0)))
save_figures({"signal": draw_signal(found)}, folder)

# 2. Rewire a ViT in place, and multiply what its attention modules hold: the tokens' kernel is the one asked for.
vit = timm.create_model("vit_tiny_patch16_224", img_size=64, embed_dim=48, depth=12, num_heads=3, num_classes=10)
vit = vit.double()
print(rewire_(vit, "e-spa", skips=False, norms=False, gamma=0.1))
product = torch.eye(17, dtype=torch.float64)  # class token and 16 patches
for block in vit.blocks:
    product = block.attn.D * block.attn.log_P.softmax(-1) @ product
places = torch.arange(17, dtype=torch.float64)
kernel = (-0.1 * (places[:, None] - places).abs()).exp()
print(f"largest difference to exp(-gamma |i - j|): {(product @ product.mT - kernel).abs().max():.1e}")

# 3. The same for a causal network, which is then trained as any other.
gpt = create_gpt("gpt-tiny", depth=12)
print(rewire_(gpt, "shaped", skips=False, norms=False))
text = torch.frombuffer(bytearray(Path(__file__).read_bytes()[:2048]), dtype=torch.uint8).view(16, 128)
logits = gpt(text)
loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), text[:, 1:].flatten().long())
loss.backward()
missing = [name for name, parameter in gpt.named_parameters() if parameter.grad is None]
print(f"loss of the next byte {loss.item():.2f} (log 256 is 5.55), parameters without a gradient: {len(missing)}")
