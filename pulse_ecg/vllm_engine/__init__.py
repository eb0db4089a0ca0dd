"""vLLM in the place of the transformers engine, for what one GPU cannot do: its scheduler and its parallelism.

vLLM's own LLaVA knows one way to merge tiles, and not this checkpoint's.  So images stay ours: one answer goes through
``engine``, which has ``pulse_ecg.engine.vision`` encode its image and hands vLLM a prompt of embeddings (``prompts``).
``language_model`` is what vLLM's processes load of the checkpoint, ``arguments`` how they are started.  vLLM is
imported by this package alone, and only once ``PULSE_ENGINE`` asks for it; ``version`` says whether it can be.
"""
