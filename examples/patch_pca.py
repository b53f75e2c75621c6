"""Colour the patches of a vision transformer by their first three principal components.

    python examples/patch_pca.py images/
    python examples/patch_pca.py --model timm:vit_small_patch14_dinov2.lvd142m --layer norm photos/

Writes patches.png: an image for each file, in which patches of one colour have similar tokens. The components are those
of all images together. `--weights none` takes random weights, which need no download.
"""

import argparse
import math

import torch
from torchvision.utils import save_image

import hookx


def main() -> None:
    """Extract the tokens of one layer, or take them from an earlier call, and draw them."""
    parser = argparse.ArgumentParser(description="Colour the patches of a vision transformer.")
    parser.add_argument("images", nargs="?", default="images", help="a folder, searched recursively")
    parser.add_argument("--model", default="vit_b_16")
    parser.add_argument("--layer", default="encoder.ln", help="a layer that returns tokens: N,tokens,channels")
    parser.add_argument("--weights", default="default")
    parser.add_argument("--out", default="features-tokens", help="where the activations are kept")
    parser.add_argument("--to", default="patches.png")
    options = parser.parse_args()

    hookx.extract(options.model, options.layer, options.images, weights=options.weights, out=options.out)
    features = hookx.open(options.out)
    [activations] = features.values()
    tokens = activations.torch().float()
    side = math.isqrt(tokens.shape[1])
    patches = tokens[:, -(side * side) :]  # Class and register tokens come first.

    flat = patches.flatten(0, 1)
    components = torch.linalg.eigh(torch.cov(flat.T)).eigenvectors[:, -3:]
    colours = (flat - flat.mean(0)) @ components
    low, high = colours.quantile(0.01, dim=0), colours.quantile(0.99, dim=0)
    colours = ((colours - low) / (high - low)).clamp(0, 1)

    pictures = colours.reshape(-1, side, side, 3).permute(0, 3, 1, 2).repeat_interleave(16, 2).repeat_interleave(16, 3)
    save_image(pictures, options.to, nrow=math.ceil(math.sqrt(len(pictures))))
    print(f"{options.to}  {len(pictures)} images of {side} x {side} patches")


if __name__ == "__main__":
    main()
