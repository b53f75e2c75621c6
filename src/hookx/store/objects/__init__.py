"""Object stores: places in them, and the process that talks to them."""
