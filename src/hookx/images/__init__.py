"""Sources of images: list them, and decode each to pixels."""
