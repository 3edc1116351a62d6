"""Rules to blocks: what the user says matters, resolved on a disk to extents and reasons."""
