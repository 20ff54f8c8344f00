"""Which units of a network go together, what reads them, and which can go without a change of the
outputs: our own graph of units, over the traced network.

Every entry of a tensor belongs to units: those of its channel, of its head, and so on. An operation
hands them on (a view moves them, an addition ties those of its two sides), a layer reads the units
of its inputs and writes new ones. A unit can go if every reader of it reads exact zeros, or has
weights of exact zero for it. Each kind of operation and layer says so in one handler.
"""
