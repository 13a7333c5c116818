"""The subcommands of `parity`, one module each: `add(commands)` declares it and sets `run`, given the namespace."""
