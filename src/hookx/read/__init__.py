"""Read runs back: features (a run), activations (one address), datasets (for torch) and join (two runs)."""
