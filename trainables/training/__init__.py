"""Training of one candidate: the step, the loop, refit, optimisers and precision."""
