"""Commands to run by hand; ``python scripts/NAME.py --help`` tells what each does."""
