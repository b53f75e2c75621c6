"""Find the most similar images of a folder, by the cosine of one layer.

    python examples/nearest_neighbours.py images/
    python examples/nearest_neighbours.py --model timm:vit_small_patch14_dinov2.lvd142m --layer norm@cls photos/

Prints a line for each image: its key, then the keys of its neighbours with their cosines. `--weights none` takes random
weights, which need no download.
"""

import argparse

import torch

import hookx

ROWS_AT_ONCE = 1024


def main() -> None:
    """Extract one layer, or take it from an earlier call, and compare all pairs."""
    parser = argparse.ArgumentParser(description="Find the most similar images of a folder.")
    parser.add_argument("images", nargs="?", default="images", help="a folder, searched recursively")
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--layer", default="avgpool")
    parser.add_argument("--weights", default="default")
    parser.add_argument("--neighbours", type=int, default=2)
    parser.add_argument("--out", default="features-neighbours", help="where the activations are kept")
    options = parser.parse_args()

    hookx.extract(options.model, options.layer, options.images, weights=options.weights, out=options.out)
    features = hookx.open(options.out)
    [activations] = features.values()
    vectors = activations.torch().flatten(1).float()
    vectors = torch.nn.functional.normalize(vectors - vectors.mean(0), dim=1)

    for start in range(0, len(vectors), ROWS_AT_ONCE):
        cosines = vectors[start : start + ROWS_AT_ONCE] @ vectors.T
        cosines[torch.arange(len(cosines)), torch.arange(start, start + len(cosines))] = -2  # not its own neighbour
        values, rows = cosines.topk(min(options.neighbours, len(vectors) - 1))
        for number, (of_image, neighbours) in enumerate(zip(values.tolist(), rows.tolist(), strict=True)):
            found = [f"{features.keys[row]} {cosine:.2f}" for row, cosine in zip(neighbours, of_image, strict=True)]
            print("  ".join([features.keys[start + number], *found]))


if __name__ == "__main__":
    main()
