"""What happened, and when: counters, a trace, an endpoint for Prometheus; and what memory is left."""
