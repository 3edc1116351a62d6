"""Snapshots of exactly the blocks you choose, of a disk that stays in use."""
