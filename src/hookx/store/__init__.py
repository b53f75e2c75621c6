"""The output directory: files that are whole or absent, shards and their records."""
