"""What several tests share: small nets, shards, a hub, a second route, and processes that start warm."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
