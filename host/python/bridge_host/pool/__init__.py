"""The kernels of one host: started, watched, chosen from, waited for, replaced. It knows nothing of what commands do."""

from .breaker import Breaker
from .dispatch import Lease
from .kernel import KernelStatus, PoolStatus
from .options import PoolOptions, Recycle
from .pool import Pool
from .routing import Ask, Routing

__all__ = ("Ask", "Breaker", "KernelStatus", "Lease", "Pool", "PoolOptions", "PoolStatus", "Recycle", "Routing")
