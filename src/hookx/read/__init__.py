"""Read runs back: features (a run, or two joined), activations (one address) and datasets (for torch)."""
