"""Activations -> pictures. The only package that imports matplotlib."""
