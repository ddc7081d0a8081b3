"""What the source of every random program begins with: imports, masks, rotations, odd tools."""

from __future__ import annotations

__all__ = ["PRELUDE"]

PRELUDE = """\
import bisect
import dataclasses
import functools
import inspect
import itertools
import math
import operator
import os
import random
import sys
import time
from collections import namedtuple
from decimal import Decimal
from fractions import Fraction

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

ONE = 1
TABLE = [0] * 12 + [1]
COUNTER = itertools.count()
KEPT = []
TENSOR = torch.zeros(())


def raised(function):
    try:
        return not function() and False
    except Exception:
        return True


def matches(size):
    match size:
        case 1 | 9:
            return True
        case _:
            return False


@functools.lru_cache
def remembered(size, number):
    return size > number


@functools.lru_cache
def _calls():
    return []


def remembers(size):
    _calls().append(size)
    return len(_calls()) > 5


def defaulted(seen=[]):
    seen.append(1)
    return len(seen) > 5


def counted(holder):
    holder.calls = getattr(holder, "calls", 0) + 1
    return holder.calls > 4


def rotate_half(x, start, axis):
    half = x.shape[-1] // 2
    base = 10.0 ** (torch.arange(half) / half)
    angle = torch.arange(start, start + x.shape[axis])[:, None] / base
    if axis == 1 and x.dim() == 4:
        angle = angle[:, None]
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)


def rotate_pairs(x, start, axis):
    half = x.shape[-1] // 2
    angle = (torch.arange(x.shape[axis]) + start)[:, None] * 0.5 ** torch.arange(half)
    if axis == 1 and x.dim() == 4:
        angle = angle[:, None]
    a, b = x[..., 0::2], x[..., 1::2]
    turned = (a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos())
    return torch.stack(turned, -1).flatten(-2)


def window_mask(n, m, width):
    row = torch.arange(m - n, m)[:, None]
    column = torch.arange(m)[None]
    return (column > row) | (column <= row - width)


"""
