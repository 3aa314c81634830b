"""What the service tells monitoring: one table of metrics, their recording, and their ways out."""
