"""The smallest change of the user's code with which a refused model would go, where it is known."""

from cachefree.advice.change import Change, apply
from cachefree.advice.known import changes_for

__all__ = ["Change", "apply", "changes_for"]
