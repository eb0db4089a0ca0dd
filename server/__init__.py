"""Our own HTTP server around the handler: status codes, streaming, OpenAI's chat route, health, metrics.

``serve.py`` at the root starts it.  Imports run downward: run, app, the routes, their leaves; none of it imports torch
before the model is loaded, so that the port is open at once.
"""
