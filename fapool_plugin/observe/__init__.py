"""What happened, and when: counters, a trace, an endpoint for Prometheus."""
