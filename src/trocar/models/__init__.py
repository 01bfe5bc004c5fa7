"""Models on this machine: pull, fingerprint, site adapters, load-time validation.

The lowest room that imports torch. It knows where a site lives in a module tree and proves it by numbers; it
knows nothing about programs, budgets or HTTP, and it never runs code that came with a model.
"""
