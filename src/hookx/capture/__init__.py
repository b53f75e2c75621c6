"""What passes through a module: hooks, the probe, rows for a run, and `Capture`."""
