"""The transformers engine: continuous batching over a static key-value cache, with transformers' own model code.

One answer through the files: ``scheduler`` gives it a slot and takes turns, ``vision`` encodes its image, ``runner``
prefills and decodes, ``slots`` holds keys and values and attends to them, ``graphs`` replays decode steps on a GPU,
``sampling`` chooses tokens, ``prefixes`` remembers images, ``memory`` says how much of all that fits.
"""
