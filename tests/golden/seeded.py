"""Deterministic weights from names: no state dict has to be stored.

Every parameter is a pure function of (its state-dict key, its shape, salt).
numpy's legacy RandomState (MT19937 + polar gauss) is frozen by numpy's
compatibility policy, so these numbers are the same on every machine.

  seed   = crc32((salt + key).encode()) & 0x7fffffff
  n      = RandomState(seed).standard_normal(shape)      (float64)
  value  = rule(key, n)  -> float32

rule:
  key ends with 'modulation'                  n / sqrt(shape[-1])
  key ends with 'gamma' , or 'weight' with ndim 1
            (all norms), or 'weight_g'        1 + 0.1 n
  key ends with 'bias' (any shape)            0.05 n
  'embedding' tables (2-d, key contains
      'token_embedding','type_embedding',
      'pos_embedding','cls_embedding',
      'relative', '.embedding.weight')        0.5 n
  everything else                             n / sqrt(prod(shape[1:]))   (fan-in)
"""

import math
import zlib

import numpy as np
import torch


def rule(key, n):
    shp = n.shape
    if key.endswith("modulation"):
        return n / math.sqrt(shp[-1])
    if key.endswith("bias"):
        return 0.05 * n
    if key.endswith(("gamma", "weight_g", "original0")) or (key.endswith("weight") and len(shp) == 1):
        return 1 + 0.1 * n
    if (
        any(
            s in key
            for s in (
                "token_embedding",
                "type_embedding",
                "pos_embedding",
                "cls_embedding",
                ".embedding.weight",
            )
        )
        and "patch" not in key
    ):
        return 0.5 * n
    fan = int(np.prod(shp[1:])) if len(shp) > 1 else 1
    return n / math.sqrt(max(fan, 1))


def tensor(key, shape, salt=""):
    rs = np.random.RandomState(zlib.crc32((salt + key).encode()) & 0x7FFFFFFF)
    n = rs.standard_normal(tuple(shape))
    return torch.from_numpy(np.ascontiguousarray(rule(key, n), dtype=np.float32).reshape(tuple(shape)))


def fill(module, salt=""):
    """In place; returns {key: [shape, sum, abs-sum]} for verification."""
    sig = {}
    with torch.no_grad():
        for k, p in module.state_dict().items():
            if not p.is_floating_point():
                continue
            v = tensor(k, p.shape, salt)
            p.copy_(v.to(p.dtype))
            d = v.double()
            sig[k] = [list(p.shape), float(d.sum()), float(d.abs().sum())]
    return sig


def randn(name, shape, scale=1.0):
    """Named, seeded input tensor (plain normal)."""
    rs = np.random.RandomState(zlib.crc32(("input:" + name).encode()) & 0x7FFFFFFF)
    return torch.from_numpy((rs.standard_normal(tuple(shape)) * scale).astype(np.float32))


def rand(name, shape):
    rs = np.random.RandomState(zlib.crc32(("input:" + name).encode()) & 0x7FFFFFFF)
    return torch.from_numpy(rs.random_sample(tuple(shape)).astype(np.float32))
