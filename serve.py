"""Serve PULSE-7B over HTTP.

    python serve.py --model FOLDER --host 0.0.0.0 --port 8080

``python serve.py --help`` lists the flags; README.md has them with their environment variables, and the routes.
"""

from __future__ import annotations

import sys

from server.run import main

if __name__ == "__main__":
    sys.exit(main())
