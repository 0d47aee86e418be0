"""Where pool ranks come from: started on this machine, or out of the launch."""
