"""What makes training steps faster and changes nothing else: compiled, recorded, laid out for a
GPU."""
