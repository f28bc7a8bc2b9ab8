"""Seeded problems, the limits of this machine, and peers to compare with."""
