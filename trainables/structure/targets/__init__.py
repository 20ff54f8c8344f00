"""What penalties act on in a network, and compaction takes out: hidden units, inner layers,
residual branches."""
