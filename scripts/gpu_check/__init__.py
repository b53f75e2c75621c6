"""The steps of scripts/gpu-check, which proves hookx on a GPU, and the command that runs them."""
