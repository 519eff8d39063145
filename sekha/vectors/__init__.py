"""Where vectors are kept: the contract in `base`, and the backends that keep it."""
