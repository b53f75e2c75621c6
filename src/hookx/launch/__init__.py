"""Many processes, one run: the devices of a host, a cluster of Ray, arrays of Slurm."""
