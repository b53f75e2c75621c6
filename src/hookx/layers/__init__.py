"""What a user can request: addresses, selectors, and the layers of a probed model. Nothing here imports torch."""
