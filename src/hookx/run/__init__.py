"""The straight line from images and a model to shards."""
