"""Attacks on the weights, made as a user would make them: through the SDK, with a key and a budget.

They are the regression test of the gate. Nothing here knows the true weights or a server's inside.
"""
