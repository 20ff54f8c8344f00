"""What is done with a search whose trials have ended: tests, times, trainings with other seeds."""
