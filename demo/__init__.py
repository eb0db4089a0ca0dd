"""A PULSE-7B to try without its 14 GB: a printed ECG to ask about, and a small random checkpoint in the real layout."""
