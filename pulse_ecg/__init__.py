"""PULSE-7B, native on transformers: an ECG image and a question in, the model's own answer out.

The folder reads from the request to the answer: ``request`` -> ``images`` -> ``anyres`` -> ``prompt`` ->
``generation`` -> ``analyzer``.  Imports run downward only; nothing here imports ``handler`` or ``utils``.
"""
