"""Speed of the simulator, and its agreement with the real engine on this machine."""
