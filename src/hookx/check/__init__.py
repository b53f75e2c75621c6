"""Check a run: is it whole (verify), is it true (recompute), and what does it hold (inspect)?"""
