"""Which code this is: where it lies, and a digest of it."""

import hashlib
from functools import cache
from pathlib import Path

APP_ROOT = Path(__file__).resolve().parents[1]
DISTRIBUTION = "fedjets-flwr"
PACKAGES = ("fedjets_flwr", "client_app", "server_app", "strategies")
"""What an app for Flower is made of; they lie side by side in a checkout and where a wheel is installed."""


@cache
def code_digest() -> str:
    """Return twelve hex digits of a SHA-256 over the Python files of this app, methods of a user's own included."""
    digest = hashlib.sha256()
    for file in sorted(path for package in PACKAGES for path in (APP_ROOT / package).rglob("*.py")):
        digest.update(f"{file.relative_to(APP_ROOT)}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:12]
