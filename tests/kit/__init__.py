"""Helpers that several tests share: small networks, shards, a hub, a second route, and processes that start fast."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
