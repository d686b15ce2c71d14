"""The strategies by which attention over spread tokens runs, and what each cannot do.

* ``allgather_kv``: everyone gets all keys and values. Source: Llama 3 (arXiv:2407.21783, section 3.3).
* ``fetch``: a rank gets the keys and values that its queries can see, by the mask's rule and by which requests are
  apart. Source: the group-cast of MagiAttention.
* ``window``: the same, for layers with a sliding window only; what is fetched is the halo.
* ``local``: nothing is exchanged, since every request lies whole on one rank.
* ``ring``: what ``fetch`` brings comes from one rank after another, nearest first, and is attended to while the next
  travels; what no query sees is neither sent nor computed. Partial outputs are merged by log-sum-exp. A block comes
  straight from its owner, so that no rank has to pass on what it does not need itself. Source: Ring Attention
  (arXiv:2310.01889).
* ``ulysses``: heads are spread over the ranks instead of tokens, by all-to-all, and outputs come back. Any number of
  heads will do, see :mod:`sp_compile.heads`. Source: DeepSpeed Ulysses (arXiv:2309.14509).
* ``hybrid``: ``ulysses`` among the ranks of a node, ``allgather_kv`` across nodes, so that keys and values cross
  between nodes once for all ranks of one. Source: USP (arXiv:2405.07719).
"""

from sp_compile.strategies import heads, keys, ring
from sp_compile.strategies.base import Site, Strategy

STRATEGIES: dict[str, Strategy] = {
    "allgather_kv": Strategy(keys.all_gathered),
    "fetch": Strategy(keys.fetched),
    "window": Strategy(keys.fetched, keys.against_window),
    "local": Strategy(keys.local),
    "ring": Strategy(ring.ringed, ring.against),
    "ulysses": Strategy(heads.spread, Site.against_pairs),
    "hybrid": Strategy(heads.spread_in_nodes, heads.against_nodes),
}
ALWAYS_OFFERED = [name for name in STRATEGIES if name != "local"]  # which depends on the batch


def applicable(site: Site) -> list[str]:
    """The strategies that an attention can run by, whatever the batch."""
    return [name for name in ALWAYS_OFFERED if not STRATEGIES[name].against(site)]


def refused(site: Site) -> dict[str, str]:
    """The others, and why."""
    reasons = {name: STRATEGIES[name].against(site) for name in ALWAYS_OFFERED}
    return {name: reason for name, reason in reasons.items() if reason}


__all__ = ["STRATEGIES", "Site", "Strategy", "applicable", "refused"]
