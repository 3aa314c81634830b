"""Files that run a service elsewhere: on Kubernetes, under Slurm, in a container, under systemd."""
