"""Rare garbage collection: tracing makes many objects, which last, and every collection visits all.

Importing this is enough; the processes that a process forks inherit it.
"""

import gc

gc.set_threshold(50_000, 20, 20)
