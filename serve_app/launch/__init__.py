"""What runs in the command that starts a service, and watches and ends it."""
