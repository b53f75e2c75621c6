"""Is a run whole, is it true, and what does it hold?"""
