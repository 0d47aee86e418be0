"""``fapool bench``: the same work done in several ways, in turns, and compared."""
