"""What can be asked for: addresses, selectors and the layers of a probed model. No torch."""
