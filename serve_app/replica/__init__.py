"""What runs in a replica: one engine, and the requests it answers."""
