"""The peers' benchmark: the same workloads on stillblock, QEMU and nbdkit, in interleaved rounds.

Run it from the repository root with `python -m bench`. It needs nothing but the standard library,
fio and the peers themselves. docs/performance.md tells how to read what it prints.
"""
