"""The Turkish commentary: prompt, privacy masks, the service's client and the faithfulness check.

Reading order: ``record`` (what comes out), ``client`` (the flow), ``service`` (the network), ``prompt``,
``privacy`` and ``glossary`` (what goes out), ``faithfulness`` (what is believed).  Nothing here imports torch.
"""
