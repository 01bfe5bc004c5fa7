"""The command line: `trocar serve | model | key | ledger | airlock | doctor | ops | demo`.

Importing a module of this room imports typer and no more; each verb imports what it needs when it runs, so
`trocar --help` stays quick. It knows nothing that the rooms below do not say.
"""
