"""Train a linear classifier on one layer; the folders of the images are the classes.

    python examples/linear_probe.py images/
    python examples/linear_probe.py --model vit_b_16 --layer encoder.ln@cls path/to/classes/

Prints how many images a classifier gets right that was trained on all the others: ridge regression gives every
leave-one-out prediction in closed form. `--weights none` takes random weights, which need no download.
"""

import argparse

import numpy as np

import hookx


def main() -> None:
    """Extract one layer, or take it from an earlier call, and classify it."""
    parser = argparse.ArgumentParser(description="Train a linear classifier on one layer.")
    parser.add_argument("images", nargs="?", default="images", help="a folder with a subfolder for each class")
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--layer", default="avgpool")
    parser.add_argument("--weights", default="default")
    parser.add_argument("--out", default="features-probe", help="where the activations are kept")
    options = parser.parse_args()

    hookx.extract(options.model, options.layer, options.images, weights=options.weights, out=options.out)
    features = hookx.open(options.out)
    [activations] = features.values()
    vectors = activations.numpy().reshape(len(features.keys), -1).astype(np.float64)
    classes, labels = np.unique([key.split("/")[0] for key in features.keys], return_inverse=True)

    vectors = (vectors - vectors.mean(0)) / (vectors.std(0) + 1e-6)
    vectors = np.hstack([vectors, np.ones((len(vectors), 1))])
    targets = np.eye(len(classes))[labels]
    penalty = vectors.shape[1] * np.eye(vectors.shape[1])
    # The weight of an image in its own prediction is taken out: the leave-one-out prediction of a linear smoother.
    solution = np.linalg.solve(vectors.T @ vectors + penalty, vectors.T)
    own_weight = (vectors * solution.T).sum(1, keepdims=True)
    predictions = (vectors @ (solution @ targets) - own_weight * targets) / (1 - own_weight)

    right = predictions.argmax(1) == labels
    for name in classes:
        of_class = labels == list(classes).index(name)
        print(f"{name:12}  {right[of_class].sum()} of {of_class.sum()}")
    print(f"{'all':12}  {right.sum()} of {len(right)}")


if __name__ == "__main__":
    main()
