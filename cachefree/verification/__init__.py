"""Random tests of a rewritten model against the original.

Every call of whole generations, on every backend.
"""

from cachefree.verification.plan import Plan
from cachefree.verification.verifying import Verification, replay, verify

__all__ = ["Plan", "Verification", "replay", "verify"]
