"""What kernels, links and calls cost on this machine."""
