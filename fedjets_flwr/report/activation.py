"""Which experts of a language model a domain's texts activate, and who holds which: functions of a run's results."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

UNKNOWN_DOMAIN = "unknown"


class Holder(NamedTuple):
    """A client and the ids of the experts that it holds in each layer."""

    client: str
    domain: str
    held: list[list[int]]


def holders(results: Mapping[str, Any]) -> list[Holder]:
    """Return who holds what, those of a domain one after the other, as the run orders domains."""
    found = results.get("experts_held") or {}
    return [Holder(c, _domain(results, c), found[c]) for c in sorted(found, key=lambda c: (_place(results, c), int(c)))]


def by_domain(results: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return the mean activation, (L, E), of the clients of each domain that told theirs, as the run orders domains."""
    found = {c: np.array(p, dtype=float) for c, p in (results.get("activation") or {}).items()}
    shape = next((p.shape for p in found.values()), ())
    alike = sorted((c for c, p in found.items() if p.shape == shape and p.ndim == 2), key=lambda c: _place(results, c))
    names = dict.fromkeys(_domain(results, client) for client in alike)
    return {n: np.mean([found[client] for client in alike if _domain(results, client) == n], axis=0) for n in names}


def _place(results: Mapping[str, Any], client: str) -> int:
    """Return the position of a client's domain among the run's; an unknown one comes last."""
    kinds = results.get("kinds") or []
    place: int = (results.get("domain_of") or {}).get(client, len(kinds))
    return min(place, len(kinds))


def _domain(results: Mapping[str, Any], client: str) -> str:
    return str([*(results.get("kinds") or []), UNKNOWN_DOMAIN][_place(results, client)])
