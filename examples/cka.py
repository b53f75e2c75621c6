"""Compare the layers of two models on the same images: linear CKA.

    python examples/cka.py images/
    python examples/cka.py --left vgg11 'features.*@mean23' --right resnet50 'layer?@mean23' images/

Prints a table with a row for each layer of the left model and a column for each of the right one; 1.00 means that the
two layers arrange the images alike (Kornblith et al., 2019, https://arxiv.org/abs/1905.00414). `--weights none` takes
random weights, which need no download.
"""

import argparse

import numpy as np
from numpy.typing import NDArray

import hookx


def centred_gram(activations: hookx.Activations) -> NDArray[np.float64]:
    """Return the inner products of all pairs of images, centred and scaled to norm 1."""
    vectors = activations.numpy().reshape(len(activations), -1).astype(np.float64)
    vectors -= vectors.mean(0)
    gram = vectors @ vectors.T
    return np.asarray(gram / np.linalg.norm(gram))


def main() -> None:
    """Extract layers of two models, or take them from an earlier call, and compare all pairs."""
    parser = argparse.ArgumentParser(description="Compare the layers of two models by linear CKA.")
    parser.add_argument("images", nargs="?", default="images", help="a folder, searched recursively")
    parser.add_argument("--left", nargs=2, default=["resnet18", "layer?@mean23"], metavar=("MODEL", "LAYERS"))
    parser.add_argument("--right", nargs=2, default=["resnet34", "layer?@mean23"], metavar=("MODEL", "LAYERS"))
    parser.add_argument("--weights", default="default")
    options = parser.parse_args()

    runs = []
    for side, (model, layers) in (("left", options.left), ("right", options.right)):
        hookx.extract(model, layers, options.images, weights=options.weights, out=f"features-{side}")
        runs.append(hookx.open(f"features-{side}"))
    joined = hookx.join(*runs)  # The images that both could read, in one order.

    right = {address: centred_gram(activations) for address, activations in joined.right.items()}
    print(" " * 16, *(f"{address:>16}" for address in right))
    for address, activations in joined.left.items():
        left = centred_gram(activations)
        print(f"{address:16}", *(f"{(left * gram).sum():16.2f}" for gram in right.values()))


if __name__ == "__main__":
    main()
