"""What the operator sees: metrics (``performance``) and one log line per request (``report``).  Imports no torch."""
