"""Numbers as a reader wants them; None is a dash."""

import math

__all__ = ["amount", "kind", "number", "percent", "points", "setting", "size", "span"]

DASH = "–"


def percent(value: float | None) -> str:
    """Return 0.9676 as ``96.8 %``."""
    return DASH if value is None else f"{100 * value:.1f}\N{NARROW NO-BREAK SPACE}%"


def percent_mark(value: float) -> str:
    """Return a share as an axis writes it: 0.8 as ``80 %``, 0.925 as ``92.5 %``."""
    return f"{100 * value:.4g}\N{NARROW NO-BREAK SPACE}%"


def kind(expert: int) -> str:
    """Return the class that colours an expert."""
    return f"c{expert % 8}"


def points(value: float | None) -> str:
    """Return a difference of shares, 0.183, as ``+18.3``."""
    return DASH if value is None else f"{100 * value:+.1f}".replace("-", "\N{MINUS SIGN}")


def number(value: float | None) -> str:
    """Return a number with about three digits."""
    if value is None:
        return DASH
    return f"{value:.3g}" if abs(value) < 1000 else amount(round(value))


def amount(value: int | None) -> str:
    """Return a count with thin gaps between thousands."""
    return DASH if value is None else f"{value:,}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def setting(value: object) -> str:
    """Return a setting's value as TOML writes it, text without quotes unless it is empty."""
    return str(value).lower() if isinstance(value, bool) else str(value) or '""'


def size(value: float | None) -> str:
    """Return bytes as ``24.3 MB``."""
    if value is None:
        return DASH
    units = ("B", "kB", "MB", "GB", "TB")
    power = min(len(units) - 1, int(math.log10(value) // 3)) if value >= 1 else 0
    scaled = value / 1000**power
    return f"{scaled:.{0 if power == 0 or scaled >= 99.95 else 1}f}\N{NARROW NO-BREAK SPACE}{units[power]}"


def span(seconds: float | None) -> str:
    """Return seconds as ``1.24 s``, ``3 min 20 s`` or ``2 h 5 min``."""
    if seconds is None:
        return DASH
    if seconds < 99.5:
        return f"{seconds:.{0 if seconds >= 9.95 else 2}f}\N{NARROW NO-BREAK SPACE}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}\N{NARROW NO-BREAK SPACE}min {rest}\N{NARROW NO-BREAK SPACE}s"
    return f"{minutes // 60}\N{NARROW NO-BREAK SPACE}h {minutes % 60}\N{NARROW NO-BREAK SPACE}min"
