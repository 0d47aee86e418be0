"""Where keys and values lie that a rank holds: the same for pool ranks and the base."""
