"""What scripts/conformance.py sweeps over, beyond the models that hookx itself lists."""
