"""How much memory a model will take, from its header alone: before it is loaded, or even pulled."""

from lmd.registry.memory.estimate import estimate
from lmd.registry.memory.kv_fit import keeps_keys, kv_type_problem
from lmd.registry.memory.values import LayerMemory, MemoryEstimate

__all__ = ["LayerMemory", "MemoryEstimate", "estimate", "keeps_keys", "kv_type_problem"]
