"""How fast the simulator is, and how well it agrees with the real engine on this machine."""
