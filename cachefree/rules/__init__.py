"""The rules that make one graph of two paths, in the order in which they are tried."""

from cachefree.rules.first_call_mask import FirstCallMask
from cachefree.rules.kept_ends import KeptEnds
from cachefree.rules.last_rows_of_both import LastRowsOfBoth
from cachefree.rules.one_token_attention import OneTokenAttention
from cachefree.rules.rule import Closing, Edit, Rule, Site, replaced, sites
from cachefree.rules.truncated_join import TruncatedJoin

__all__ = ["RULES", "Closing", "Edit", "Rule", "Site", "replaced", "sites"]

RULES: tuple[Rule, ...] = (
    TruncatedJoin(),
    KeptEnds(),
    LastRowsOfBoth(),
    FirstCallMask(),
    OneTokenAttention(),
)
