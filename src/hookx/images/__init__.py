"""Sources of images: listing them, and decoding one to pixels."""
