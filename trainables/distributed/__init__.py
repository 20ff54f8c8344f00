"""A training on several processes of one machine, a GPU each: what they share (`ranks`), and who
starts and leads them (`team`).

This file imports nothing: `slimfront.trainables.training.loop` needs `ranks`, and `team` needs
`slimfront.trainables.training.loop`.
"""
