"""What differs on a device: which of them a rank gets, clocks that it turns, copies on streams of their own."""
