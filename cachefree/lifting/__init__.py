"""Caches that are kept elsewhere than in arguments and results, made arguments and results.

`find_lifting` finds what a first call leaves behind: attributes and buffers of modules, entries of
dicts and objects that the caller passes, what hooks fill. `Lifted` is the model with that as one
more argument and one more result, so that all else of cachefree sees an ordinary cache. `Keeper`
puts it back for the model's own way of being called.
"""
