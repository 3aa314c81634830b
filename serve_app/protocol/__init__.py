"""The request forms of the APIs that are served: JSON bodies in, typed requests out, one sentence for a bad one."""
