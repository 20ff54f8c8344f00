"""What is known of a network: tracing, attention, and which units go together."""
